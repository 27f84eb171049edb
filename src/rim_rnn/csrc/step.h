// One step of a RIM for one block of the batch, its four stages in the paper's order, then their gradients in reverse.
//
// A batch row never meets another, so a block of the batch goes through all steps alone, on one thread that waits for nobody.
// Where rows are few, several hands, a thread each, share a block instead: each has some of the units and some of the rows for
// its own, and they wait for each other between the phases of a step. Symbols are those of problem.h; i counts rows of the
// block, j units, m units that are read, and inside a unit r counts its rows, winners first.
#pragma once

#include "weights.h"

namespace rim {
namespace RIM_ISA {

// Rows for a weight gradient, collected over steps until they make one product of some size: total += A^T B.
template <class T>
struct Panel {
  T *A, *B;
  int ld_a, ld_b, rows = 0, capacity;
  bool begun = false;

  Panel() = default;
  Panel(Arena& arena, int cols_a, int cols_b, int capacity_) : capacity(capacity_) {
    ld_a = pad<T>(cols_a), ld_b = pad<T>(cols_b) + WIDTH<T>;
    A = arena.take<T>(int64_t(capacity) * ld_a);
    B = arena.take<T>(int64_t(capacity) * ld_b);
  }
  T* a(int r) const { return A + int64_t(rows + r) * ld_a; }
  T* b(int r) const { return B + int64_t(rows + r) * ld_b; }
};

template <class T>
struct Block {
  const Problem<T>& problem;
  const Sizes& s;
  const Weights<T>& W;
  const int block, hand, most;           // most: rows of this block of the batch
  const int first_unit, last_unit;       // of this hand
  const int64_t n, k, u, p, p1, in1, K, H;

  // The step at hand.
  int rows;
  int first_row, last_row;  // of this hand
  int64_t start;            // of its rows in packed order

  // Of all hands. One row of the block each.
  T *x, *key, *value;     // [x | 1]; x W^e + b^e; x W^v + b^v
  T *h, *c;               // (n, p1) with a 1 behind each unit's state if there are biases, and (n, u)
  T* score;               // (n, heads)
  // One row of the block each, per unit: (n, most, ...).
  T *read, *ask, *heard;  // key and value, query, what the heads heard

  // Of this hand, as all that follows. One row of the block each.
  T *a_input, *bids;      // (n, heads), (n)
  int32_t* winners;       // (k)
  int* place;             // (n): where unit j has the row; only of winners in forward
  // One row of the block each, per unit: (n, most, ...).
  int* row;               // winners first
  int* won;               // (n): how many winners
  int* slot;              // which of the row's winners
  int64_t ld_x, ld_key, ld_value, ld_query, ld_operand, ld_gates, ld_state, ld_read, ld_ask, ld_heard;
  T *query, *operand, *gates, *state, *projected;  // of the unit at hand
  // Of the row at hand, per pair of a winner and a head.
  int64_t pairs, ld_pairs;
  T *probabilities, **asking, **hearing;  // (n, pairs), (pairs), (pairs)
  T** reads;                              // (n)
  int* head_of;                           // (pairs)

  // Backward only.
  T *dh, *dc, *dx, *dheard, *dasked, *doperand, *dscores, *dropped, *tilde;
  T **dasking, **dhearing;
  const T** before;       // of each row: h before the step, (n, p)
  Panel<T>*gates_panel, *query_panel, *project_panel, *talk_panel, *output_panel;  // of each unit
  Panel<T> key_panel, value_panel;

  Block(const Problem<T>& problem_, const Weights<T>& W_, Arena& shared, Arena& arena, int block_, int hand_, bool backward)
      : problem(problem_), s(problem_.s), W(W_), block(block_), hand(hand_), most(int((s.batch - block_ + s.blocks - 1) / s.blocks)),
        first_unit(int(int64_t(s.n) * hand_ / s.hands)), last_unit(int(int64_t(s.n) * (hand_ + 1) / s.hands)),
        n(s.n), k(s.k), u(s.u), p(s.p), p1(s.p1()), in1(s.in1()), K(s.K()), H(s.heads) {
    const int64_t R = most;
    const int slack = WIDTH<T>;
    ld_x = pad<T>(in1), ld_key = pad<T>(H * s.key), ld_value = pad<T>(H * s.value), ld_query = pad<T>(H * s.S());
    ld_operand = pad<T>(K) + slack, ld_gates = pad<T>(s.gates()) + slack, ld_state = pad<T>(p > u ? p : u);
    ld_read = pad<T>(s.e() + s.w()), ld_ask = pad<T>(s.e()), ld_heard = pad<T>(s.w());
    x = shared.take<T>(R * ld_x);
    key = shared.take<T>(s.fold_key ? 0 : R * ld_key);
    value = shared.take<T>(s.fold_value ? 0 : R * ld_value);
    h = shared.take<T>(R * n * p1);
    c = shared.take<T>(s.lstm ? R * n * u : 0);
    score = shared.take<T>(R * n * H);
    read = shared.take<T>(R * n * ld_read);
    ask = shared.take<T>(R * n * ld_ask);
    heard = shared.take<T>(R * n * ld_heard);
    a_input = arena.take<T>(R * n * H);
    bids = arena.take<T>(n);
    winners = arena.take<int32_t>(R * k);
    place = arena.take<int>(R * n);
    row = arena.take<int>(R * n);
    won = arena.take<int>(n);
    slot = arena.take<int>(R * n);
    query = arena.take<T>(R * ld_query);
    operand = arena.take<T>(R * ld_operand);
    gates = arena.take<T>(R * ld_gates);
    state = arena.take<T>(R * ld_state);
    projected = arena.take<T>(R * ld_state);
    pairs = k * s.comm_heads, ld_pairs = pad<T>(int(pairs));
    probabilities = arena.take<T>(n * ld_pairs + slack);  // coefficients are read a vector at a time
    asking = arena.take<T*>(pairs);
    hearing = arena.take<T*>(pairs);
    reads = arena.take<T*>(n);
    head_of = arena.take<int>(pairs);
    for (int64_t pair = 0; pair < pairs && arena.base; ++pair) head_of[pair] = int(pair % s.comm_heads);
    if (!backward) return;
    dh = arena.take<T>(R * n * p);
    dc = arena.take<T>(s.lstm ? R * n * u : 0);
    dx = arena.take<T>(R * ld_x);
    doperand = arena.take<T>(R * ld_operand);
    dheard = arena.take<T>(R * n * ld_heard);
    dasked = arena.take<T>(R * ld_state);
    dscores = arena.take<T>(n * ld_pairs + slack);
    dropped = problem.keep_comm ? arena.take<T>(n * ld_pairs + slack) : probabilities;
    dasking = arena.take<T*>(pairs);
    dhearing = arena.take<T*>(pairs);
    tilde = arena.take<T>(R * n * p);
    before = arena.take<const T*>(R);
    gates_panel = arena.take<Panel<T>>(n);
    query_panel = arena.take<Panel<T>>(n);
    project_panel = arena.take<Panel<T>>(n);
    talk_panel = arena.take<Panel<T>>(n);
    output_panel = arena.take<Panel<T>>(n);
    const int64_t all = most * s.steps, enough = (s.in_place ? MOST_IN_PLACE : 63) + most;  // grow with the rows of a block
    const int held = int(all < enough ? all : enough);
    for (int j = 0; j < n; ++j) {
      const Panel<T> gates_(arena, K, s.gates(), held), query_(arena, 0, H * s.S(), held);
      const Panel<T> project_(arena, s.projected ? u : 0, s.projected ? p : 0, held);
      const Panel<T> talk_(arena, s.comm_heads ? p : 0, 2 * s.e() + s.w(), held), output_(arena, s.w(), s.comm_heads ? p : 0, held);
      if (!arena.base) continue;
      gates_panel[j] = gates_, query_panel[j] = query_, project_panel[j] = project_, talk_panel[j] = talk_, output_panel[j] = output_;
    }
    key_panel = Panel<T>(arena, s.fold_key ? 0 : H * s.key, in1, held);
    value_panel = Panel<T>(arena, s.fold_value ? 0 : H * s.value, in1, held);
  }

  int64_t batch_row(int i) const { return block + int64_t(i) * s.blocks; }
  int64_t position(int i) const { return start + batch_row(i); }
  T* state_of(int i, int j) const { return h + (int64_t(i) * n + j) * p1; }
  T* cell_of(int i, int j) const { return c + (int64_t(i) * n + j) * u; }
  const T* key_of(int i, int head) const { return s.fold_key ? x + i * int64_t(ld_x) : key + i * int64_t(ld_key) + head * s.key; }
  const T* value_of(int i, int head) const { return s.fold_value ? x + i * int64_t(ld_x) : value + i * int64_t(ld_value) + head * s.value; }
  T* of_unit(T* base, int64_t j, int64_t ld) const { return base + int64_t(j) * most * ld; }

  void at_step(int64_t t) {
    const int64_t present = s.batch_sizes[t];
    rows = present > block ? int((present - block + s.blocks - 1) / s.blocks) : 0;
    start = s.offsets[t];
    first_row = int(int64_t(rows) * hand / s.hands), last_row = int(int64_t(rows) * (hand + 1) / s.hands);
  }

  // What depends on x alone: [x | 1] and, where they are not folded into the weights, key and value.
  void project() {
    for (int i = first_row; i < last_row; ++i) {
      copy(x + i * ld_x, problem.input + position(i) * s.input, s.input);
      if (s.bias) x[i * ld_x + s.input] = 1;
    }
    const auto own = [&](T* of_rows, int64_t ld) { return of_rows + first_row * ld; };
    if (!s.fold_key) multiply(last_row - first_row, own(x, ld_x), ld_x, W.key, own(key, ld_key), ld_key);
    if (!s.fold_value) multiply(last_row - first_row, own(x, ld_x), ld_x, W.value, own(value, ld_value), ld_value);
  }

  // ---- Forward ----

  // Input attention, equation 2: score = query . key / sqrt(key size), a_input = softmax([0, score])_1 = sigmoid(score).
  void input_attention() {
    for (int j = first_unit; j < last_unit; ++j) {
      multiply(rows, h + j * p1, n * p1, W.unit[j].query, query, ld_query);
      for (int i = 0; i < rows; ++i)
        for (int head = 0; head < H; ++head)
          score[(i * n + j) * H + head] = dot(query + i * ld_query + head * s.S(), key_of(i, head), s.S()) * T(s.input_scale);
    }
  }

  // Competition: the k highest bids win, a bid being the score averaged over heads; ties to the lowest unit, NaN below all.
  // Every hand finds all of this out for itself, so that all of them number a unit's winners alike.
  void competition() {
    for (int j = 0; j < n; ++j) won[j] = 0;
    for (int i = 0; i < rows; ++i) {
      const T* scores = score + i * n * H;
      for (int j = 0; j < n; ++j) {
        bids[j] = 0;
        for (int head = 0; head < H; ++head) bids[j] += scores[j * H + head];
        bids[j] /= T(H);
      }
      int* wins = place + i * n;
      for (int j = 0; j < n; ++j) wins[j] = -1;
      for (int rank = 0; rank < k; ++rank) {
        int best = -1;
        for (int j = 0; j < n; ++j)
          if (wins[j] < 0 && (best < 0 || bids[j] > bids[best] || (bids[best] != bids[best] && bids[j] == bids[j]))) best = j;
        wins[best] = 0;
      }
      for (int j = 0, place_ = 0; j < n; ++j)
        if (wins[j] == 0) winners[i * k + place_++] = j;
      enlist(i);
      for (int a = 0; a < n * H; a += WIDTH<T>) store(a_input + i * n * H + a, sigmoid<T>(load(scores + a, n * H - a)), n * H - a);
    }
    if (!problem.save) return;
    for (int i = first_row; i < last_row; ++i)
      for (int a = 0; a < k; ++a) {
        problem.saved.winners[position(i) * k + a] = winners[i * k + a];
        copy(problem.saved.attention + (position(i) * k + a) * H, a_input + (i * n + winners[i * k + a]) * H, H);
      }
  }
  void enlist(int i) {  // row i with each of its winners
    for (int a = 0; a < k; ++a) {
      const int j = winners[i * k + a], r = won[j]++;
      row[j * most + r] = i;
      slot[j * most + r] = a;
      place[i * n + j] = r;
    }
  }

  // A winner's operand: [h | 1 | a_input * feature], a_input after dropout.
  void gather(int i, int j, const T* state_, const T* a, T* to) const {
    copy(to, state_, p);
    if (s.bias) to[p] = 1;
    to += p1;
    for (int head = 0; head < H; ++head, to += s.F()) {
      const T* feature = value_of(i, head);
      const T coefficient = a[head] * kept(i, j, head);
      each_vector<T>(s.F(), [&](int f, int left) { store(to + f, coefficient * load(feature + f, left), left); });
    }
  }
  // What dropout scales a_input with.
  T kept(int i, int j, int head) const { return problem.keep_input ? problem.keep_input[(position(i) * n + j) * H + head] : T(1); }

  // Independent dynamics, equation 4: the winners' LSTM or GRU; losers keep h and c.
  void dynamics() {
    for (int j = first_unit; j < last_unit; ++j) {
      const int* rows_ = row + j * most;
      const int count = won[j];
      for (int r = 0; r < count; ++r) gather(rows_[r], j, state_of(rows_[r], j), a_input + (rows_[r] * n + j) * H, operand + int64_t(r) * ld_operand);
      multiply(count, operand, ld_operand, W.unit[j].gates, gates, ld_gates);
      for (int r = 0; r < count; ++r) {
        const int i = rows_[r];
        const int64_t at = position(i) * k + slot[j * most + r];
        T* saved = problem.save ? problem.saved.gates + at * 4 * u : nullptr;
        T* new_state = s.projected ? state + r * ld_state : state_of(i, j);
        if (s.lstm)
          lstm(gates + int64_t(r) * ld_gates, cell_of(i, j), new_state, saved, problem.save ? problem.saved.cell + at * u : nullptr);
        else
          gru(gates + int64_t(r) * ld_gates, new_state, saved);
      }
      if (s.projected) {
        multiply(count, state, ld_state, W.unit[j].project, projected, ld_state);
        for (int r = 0; r < count; ++r) copy(state_of(rows_[r], j), projected + r * ld_state, p);
      }
      if (problem.save)
        for (int r = 0; r < count; ++r)
          copy(problem.saved.state + (position(rows_[r]) * k + slot[j * most + r]) * p, state_of(rows_[r], j), p);
    }
  }
  // c~ = f c + i g, h~ = o tanh(c~)
  void lstm(const T* gate, T* cell, T* new_state, T* saved, T* saved_cell) const {
    for (int d = 0; d < u; d += WIDTH<T>) {
      const int left = u - d;
      const Vec<T> in = sigmoid<T>(load(gate + d, left)), forget = sigmoid<T>(load(gate + u + d, left));
      const Vec<T> candidate = tanh<T>(load(gate + 2 * u + d, left)), out = sigmoid<T>(load(gate + 3 * u + d, left));
      const Vec<T> old = load(cell + d, left), now = forget * old + in * candidate;
      store(cell + d, now, left);
      store(new_state + d, out * tanh<T>(now), left);
      if (!saved) continue;
      store(saved + d, in, left);
      store(saved + u + d, forget, left);
      store(saved + 2 * u + d, candidate, left);
      store(saved + 3 * u + d, out, left);
      store(saved_cell + d, old, left);
    }
  }
  // n = tanh(W_in x + b_in + r (W_hn h + b_hn)), h~ = (1 - z) n + z h
  void gru(const T* gate, T* state_, T* saved) const {
    for (int d = 0; d < u; d += WIDTH<T>) {
      const int left = u - d;
      const Vec<T> reset = sigmoid<T>(load(gate + d, left)), update = sigmoid<T>(load(gate + u + d, left));
      const Vec<T> from_h = load(gate + 2 * u + d, left);
      const Vec<T> candidate = tanh<T>(load(gate + 3 * u + d, left) + reset * from_h);
      store(state_ + d, (T(1) - update) * candidate + update * load(state_ + d, left), left);
      if (!saved) continue;
      store(saved + d, reset, left);
      store(saved + u + d, update, left);
      store(saved + 2 * u + d, candidate, left);
      store(saved + 3 * u + d, from_h, left);
    }
  }

  // Communication, equations 5 and 6: message = softmax(query . key / sqrt(key size)) value W^o, and h = h~ + room * tanh(message),
  // or h~ + message as printed.
  // Winners ask, every unit shows: the queries, keys and values.
  void ask_and_show() {
    for (int j = first_unit; j < last_unit && s.comm_heads; ++j) {
      const int count = won[j];
      multiply(rows, h + j * p1, n * p1, W.unit[j].read, of_unit(read, j, ld_read), ld_read);
      for (int r = 0; r < count; ++r) copy(state + r * ld_state, state_of(row[j * most + r], j), p);
      multiply(count, state, ld_state, W.unit[j].ask, of_unit(ask, j, ld_ask), ld_ask);
    }
  }
  // The attention, row by row: what each winner's heads hear.
  void exchange() {
    for (int i = first_row; i < last_row && s.comm_heads; ++i) {
      for (int a = 0; a < k; ++a) {
        const int j = winners[i * k + a], r = place[i * n + j];
        share(asking, a, of_unit(ask, j, ld_ask) + r * ld_ask, s.comm_key);
        share(hearing, a, of_unit(heard, j, ld_heard) + r * ld_heard, s.comm_value);
      }
      find_reads(i, nullptr);
      attend();
      if (problem.save)
        for (int m = 0; m < n; ++m) copy(problem.saved.probabilities + (position(i) * n + m) * pairs, probabilities + m * ld_pairs, pairs);
      drop(i, probabilities);
      gather_units(probabilities, s.e(), s.comm_value, hearing);
    }
  }
  // What was heard, through W^o, onto the winners' states.
  void take_up() {
    for (int j = first_unit; j < last_unit && s.comm_heads; ++j) {
      multiply(won[j], of_unit(heard, j, ld_heard), ld_heard, W.unit[j].output, state, ld_state);
      for (int r = 0; r < won[j]; ++r) {
        const int i = row[j * most + r];
        const T* message = state + r * ld_state;
        if (s.bounded)
          squash(message, state_of(i, j), problem.save ? problem.saved.squashed + (position(i) * k + slot[j * most + r]) * p : nullptr);
        else
          add(state_of(i, j), message, p);
      }
    }
  }
  void squash(const T* message, T* state_, T* saved) const {
    each_vector<T>(p, [&](int d, int left) {
      const Vec<T> squashed = tanh<T>(load(message + d, left)), old = load(state_ + d, left);
      store(state_ + d, old + (s.lstm ? squashed : room(old) * squashed), left);
      if (saved) store(saved + d, squashed, left);
    });
  }
  // What a GRU's h~ leaves below 1: max(0, 1 - |h~|).
  static Vec<T> room(Vec<T> state_) {
    const Vec<T> left = T(1) - (state_ < T(0) ? -state_ : state_);
    return left > T(0) ? left : Vec<T>{};
  }

  // Below, of one row: a pair is a winner and a head, and a lane of a vector; every unit m is read.

  // The heads' parts of what winner `a` has.
  void share(T** parts, int a, T* of_winner, int size) const {
    for (int head = 0; head < s.comm_heads; ++head) parts[a * s.comm_heads + head] = of_winner + head * size;
  }
  // Where the units' keys and values lie; in backward units have their rows in an order of their own.
  void find_reads(int i, const int* places) const {
    for (int m = 0; m < n; ++m) reads[m] = of_unit(read, m, ld_read) + int64_t(places ? places[i * n + m] : i) * ld_read;
  }

  // Loops over the parts of heads have their length known to the compiler where it is a multiple of 4 up to 32, else SIZE is 0.
  // Where a vector is longer than a head, or no multiple of it, several heads are taken at a time: those that fill whole vectors.
#define RIM_PER_LENGTH(size, call)                                          \
  switch (s.comm_heads % TOGETHER<T>(size) ? 0 : (size)) {                  \
    case 4: { constexpr int SIZE = 4; return call; }                        \
    case 8: { constexpr int SIZE = 8; return call; }                        \
    case 12: { constexpr int SIZE = 12; return call; }                      \
    case 16: { constexpr int SIZE = 16; return call; }                      \
    case 20: { constexpr int SIZE = 20; return call; }                      \
    case 24: { constexpr int SIZE = 24; return call; }                      \
    case 28: { constexpr int SIZE = 28; return call; }                      \
    case 32: { constexpr int SIZE = 32; return call; }                      \
    default: { constexpr int SIZE = 0; return call; }                       \
  }

  // to[m][pair] = left[pair] . (what unit m has for the pair's head), of which each head has `size`
  void dots(T* const* left, int64_t at, int size, T* to) const { RIM_PER_LENGTH(size, dots_of<SIZE>(left, at, size, to)) }
  template <int SIZE>
  void dots_of(T* const* left, int64_t at, int size, T* to) const {
    size = SIZE ? SIZE : size;
    constexpr int HEADS = SIZE && SIZE < WIDTH<T> && WIDTH<T> % SIZE == 0 ? WIDTH<T> / SIZE : 1;  // in a vector of products
    for (int m = 0; m < n; ++m) {
      const T* right = reads[m] + at;
      for (int64_t first = 0; first < pairs; first += WIDTH<T>) {
        Vec<T> products[WIDTH<T> / HEADS];
        for (int i = 0; i < WIDTH<T> / HEADS; ++i) {
          const int64_t pair = first + i * HEADS;
          Vec<T> total{};
          if (pair < pairs) {
            const T *l = left[pair], *r = right + head_of[pair] * size;
            for (int d = 0; d < size * HEADS; d += WIDTH<T>) total += load(l + d, size * HEADS - d) * load(r + d, size * HEADS - d);
          }
          products[i] = total;
        }
        store(to + m * ld_pairs + first, sums<T, HEADS>(products));
      }
    }
  }
  // to[pair] = sum over m of coefficient[m][pair] * (what unit m has for the pair's head)
  void gather_units(const T* coefficients, int64_t at, int size, T* const* to) const {
    RIM_PER_LENGTH(size, gather_units_of<SIZE>(coefficients, at, size, to))
  }
  template <int SIZE>
  void gather_units_of(const T* coefficients, int64_t at, int size, T* const* to) const {
    for (int64_t pair = 0; pair < pairs; pair += TOGETHER<T>(SIZE))
      gather_heads<SIZE>(size, to[pair], n, [&](int64_t m) { return coefficients + m * ld_pairs + pair; },
                         [&](int64_t m) { return reads[m] + at + int64_t(head_of[pair]) * size; });
  }
  // to, for each head: the sum over winners of coefficient[pair] * part[pair]
  void gather_winners(const T* coefficients, T* const* parts, int size, T* to) const {
    RIM_PER_LENGTH(size, gather_winners_of<SIZE>(coefficients, parts, size, to))
  }
  template <int SIZE>
  void gather_winners_of(const T* coefficients, T* const* parts, int size, T* to) const {
    for (int head = 0; head < s.comm_heads; head += TOGETHER<T>(SIZE))
      gather_heads<SIZE>(size, to + head * size, k, [&](int64_t a) { return coefficients + a * s.comm_heads + head; },
                         [&](int64_t a) { return parts[a * s.comm_heads + head]; });
  }
  // to = sum over i < count of coefficient(i)[head] * part(i), for one head or those that fill whole vectors.
  template <int SIZE, class Coefficient, class Part_>
  RIM_INLINE static void gather_heads(int size, T* to, int64_t count, const Coefficient& coefficient, const Part_& part) {
    constexpr int N = SIZE ? TOGETHER<T>(SIZE) * SIZE / WIDTH<T> : 1;
    size = SIZE ? N * WIDTH<T> : size;
    for (int d = 0; d < size; d += N * WIDTH<T>) {
      Vec<T> total[N] = {};
      for (int64_t i = 0; i < count; ++i) {
        const T *of_heads = coefficient(i), *from = part(i) + d;
#pragma GCC unroll 8
        for (int v = 0; v < N; ++v) total[v] += spread<T, SIZE>(of_heads, v) * load(from + v * WIDTH<T>, size - d - v * WIDTH<T>);
      }
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) store(to + d + v * WIDTH<T>, total[v], size - d - v * WIDTH<T>);
    }
  }
#undef RIM_PER_LENGTH

  // Dropout: probabilities, or their gradients, times what it drew.
  void drop(int i, T* of_pairs) const {
    if (!problem.keep_comm) return;
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const int64_t head = position(i) * s.comm_heads + head_of[pair], j = winners[i * k + pair / s.comm_heads];
      for (int m = 0; m < n; ++m) of_pairs[m * ld_pairs + pair] *= problem.keep_comm[(head * n + j) * n + m];
    }
  }

  void attend() const {
    dots(asking, 0, s.comm_key, probabilities);
    for (int64_t first = 0; first < pairs; first += WIDTH<T>) {
      T* score = probabilities + first;
      Vec<T> highest = load(score), total{};
      for (int m = 1; m < n; ++m) {
        const Vec<T> other = load(score + m * ld_pairs);
        highest = other > highest ? other : highest;
      }
      for (int m = 0; m < n; ++m) {
        const Vec<T> power = exp<T>((load(score + m * ld_pairs) - highest) * T(s.comm_scale));
        total += power;
        store(score + m * ld_pairs, power);
      }
      total = T(1) / total;
      for (int m = 0; m < n; ++m) store(score + m * ld_pairs, load(score + m * ld_pairs) * total);
    }
  }
  // The first and the last states of this hand's units.
  void first_states() {
    for (int i = 0; i < most; ++i)
      for (int j = first_unit; j < last_unit; ++j) {
        copy(state_of(i, j), problem.h + (batch_row(i) * n + j) * p, p);
        if (s.bias) state_of(i, j)[p] = 1;
        if (s.lstm) copy(cell_of(i, j), problem.c + (batch_row(i) * n + j) * u, u);
      }
  }
  void last_states() const {
    for (int i = 0; i < most; ++i)
      for (int j = first_unit; j < last_unit; ++j) {
        copy(problem.last_h + (batch_row(i) * n + j) * p, state_of(i, j), p);
        if (s.lstm) copy(problem.last_c + (batch_row(i) * n + j) * u, cell_of(i, j), u);
      }
  }
  enum Phase { PROJECT, BID, RUN, EXCHANGE, TAKE_UP };
  static_assert(TAKE_UP + 1 == PHASES, "as problem.h has it");
  // Phases [from, to) of all steps, each of which has PHASES: what one needs of the other hands, they did in phases before.
  void forward(int64_t from, int64_t to) {
    for (int64_t phase = from; phase < to; ++phase) {
      const int64_t step = phase / PHASES;
      at_step(s.reverse ? s.steps - 1 - step : step);
      switch (phase % PHASES) {
        case PROJECT:
          if (step == 0) first_states();
          project();
          break;
        case BID:
          input_attention();
          break;
        case RUN:
          competition();
          dynamics();
          ask_and_show();
          break;
        case EXCHANGE:
          exchange();
          break;
        case TAKE_UP:
          take_up();
          for (int i = 0; i < rows; ++i)
            for (int j = first_unit; j < last_unit; ++j) copy(problem.output + (position(i) * n + j) * p, state_of(i, j), p);
          if (step == s.steps - 1) last_states();
      }
    }
  }

  // ---- Backward: d<name> is the gradient of <name> ----

  // Find the step again: its winners, h before it and h~, and what depends on x alone.
  void recall(int64_t t) {
    const int64_t earlier = s.reverse ? t + 1 : t - 1;
    const int64_t present = earlier >= 0 && earlier < s.steps ? s.batch_sizes[earlier] : 0;
    for (int j = 0; j < n; ++j) won[j] = 0;
    for (int i = 0; i < rows; ++i) {
      const int64_t b = batch_row(i), at = position(i) * k;
      before[i] = b < present ? problem.output + (s.offsets[earlier] + b) * n * p : problem.h + b * n * p;
      copy(tilde + i * n * p, before[i], n * p);
      for (int j = 0; j < n; ++j) place[i * n + j] = -1;
      for (int a = 0; a < k; ++a) {
        winners[i * k + a] = problem.saved.winners[at + a];
        copy(tilde + (i * n + winners[i * k + a]) * p, problem.saved.state + (at + a) * p, p);
      }
      enlist(i);
    }
    for (int j = 0; j < n; ++j)  // losers behind the winners
      for (int i = 0, r = won[j]; i < rows; ++i)
        if (place[i * n + j] < 0) row[j * most + r] = i, place[i * n + j] = r++;
    project();
    zero(dx, int64_t(rows) * ld_x);
  }

  void communication_backward() {
    if (!s.comm_heads) return;
    const int e = s.e(), w = s.w();
    for (int j = 0; j < n; ++j) {
      Panel<T>&talk = talk_panel[j], &output = output_panel[j];
      for (int r = 0; r < rows; ++r) copy(talk.a(r), tilde + (row[j * most + r] * n + j) * p, p);
      multiply(rows, talk.a(0), talk.ld_a, W.unit[j].read, of_unit(read, j, ld_read), ld_read);
      multiply(won[j], talk.a(0), talk.ld_a, W.unit[j].ask, of_unit(ask, j, ld_ask), ld_ask);
      for (int r = won[j]; r < rows; ++r) zero(talk.b(r) + e + w, e);  // losers did not ask
      for (int r = 0; r < won[j]; ++r) {
        const int i = row[j * most + r];
        if (s.bounded)
          squash_backward(problem.saved.squashed + (position(i) * k + slot[j * most + r]) * p, talk.a(r), dh + (i * n + j) * p, output.b(r));
        else
          copy(output.b(r), dh + (i * n + j) * p, p);
      }
      multiply(won[j], output.b(0), output.ld_b, W.unit_t[j].output, of_unit(dheard, j, ld_heard), ld_heard);
    }
    for (int i = 0; i < rows; ++i) {
      for (int a = 0; a < k; ++a) {
        const int j = winners[i * k + a], r = place[i * n + j];
        share(asking, a, of_unit(ask, j, ld_ask) + r * ld_ask, s.comm_key);
        share(hearing, a, output_panel[j].a(r), s.comm_value);
        share(dhearing, a, of_unit(dheard, j, ld_heard) + r * ld_heard, s.comm_value);
        share(dasking, a, talk_panel[j].b(r) + e + w, s.comm_key);
      }
      for (int m = 0; m < n; ++m) copy(probabilities + m * ld_pairs, problem.saved.probabilities + (position(i) * n + m) * pairs, pairs);
      find_reads(i, place);
      if (problem.keep_comm) copy(dropped, probabilities, n * ld_pairs);
      drop(i, dropped);
      gather_units(dropped, s.e(), s.comm_value, hearing);
      attend_backward(i);
    }
    for (int j = 0; j < n; ++j) {
      Panel<T>& talk = talk_panel[j];
      multiply(rows, talk.b(0), talk.ld_b, W.unit_t[j].read, dasked, ld_state);
      multiply(won[j], talk.b(0) + e + w, talk.ld_b, W.unit_t[j].ask, dasked, ld_state, true);
      for (int r = 0; r < rows; ++r) add(dh + (row[j * most + r] * n + j) * p, dasked + r * ld_state, p);
      talk.rows += rows;
      output_panel[j].rows += won[j];
    }
  }
  // The gradient of the message, and to that of h~, which it has as a summand, what comes through a GRU's room.
  void squash_backward(const T* squashed_, const T* state_, T* dstate, T* dmessage) const {
    each_vector<T>(p, [&](int d, int left) {
      const Vec<T> squashed = load(squashed_ + d, left), dy = load(dstate + d, left), dsquash = dy * (T(1) - squashed * squashed);
      if (s.lstm) return store(dmessage + d, dsquash, left);
      const Vec<T> old = load(state_ + d, left), room_ = room(old), droom = room_ > T(0) ? dy * squashed : Vec<T>{};
      store(dmessage + d, room_ * dsquash, left);
      store(dstate + d, old > T(0) ? dy - droom : old < T(0) ? dy + droom : dy, left);
    });
  }
  void attend_backward(int i) const {
    dots(dhearing, s.e(), s.comm_value, dscores);
    drop(i, dscores);
    for (int64_t first = 0; first < pairs; first += WIDTH<T>) {
      Vec<T> mean{};
      for (int m = 0; m < n; ++m) mean += load(probabilities + m * ld_pairs + first) * load(dscores + m * ld_pairs + first);
      for (int m = 0; m < n; ++m) {
        T* dscore = dscores + m * ld_pairs + first;
        store(dscore, load(probabilities + m * ld_pairs + first) * (load(dscore) - mean) * T(s.comm_scale));
      }
    }
    for (int m = 0; m < n; ++m) {
      T* dread = talk_panel[m].b(place[i * n + m]);
      gather_winners(dscores + m * ld_pairs, asking, s.comm_key, dread);
      gather_winners(dropped + m * ld_pairs, dhearing, s.comm_value, dread + s.e());
    }
    gather_units(dscores, 0, s.comm_key, dasking);
  }

  void dynamics_backward() {
    for (int j = 0; j < n; ++j) {
      Panel<T>&panel = gates_panel[j], &project_ = project_panel[j];
      const int* rows_ = row + j * most;
      const int count = won[j];
      for (int r = 0; r < count; ++r) {
        const int i = rows_[r];
        gather(i, j, before[i] + j * p, problem.saved.attention + (position(i) * k + slot[j * most + r]) * H, panel.a(r));
        copy(s.projected ? project_.b(r) : state + r * ld_state, dh + (i * n + j) * p, p);
        const int64_t at = position(i) * k + slot[j * most + r];
        fetch(problem.saved.gates + at * 4 * u, 4 * u);
        if (s.lstm) fetch(problem.saved.cell + at * u, u);
      }
      if (s.projected) multiply(count, project_.b(0), project_.ld_b, W.unit_t[j].project, state, ld_state);
      for (int r = 0; r < count; ++r) {
        const int i = rows_[r];
        const int64_t at = position(i) * k + slot[j * most + r];
        const T* gate = problem.saved.gates + at * 4 * u;
        if (s.lstm)
          lstm_backward(gate, problem.saved.cell + at * u, state + r * ld_state, dc + (i * n + j) * u, panel.b(r), s.projected ? project_.a(r) : nullptr);
        else
          gru_backward(gate, panel.a(r), state + r * ld_state, panel.b(r), dh + (i * n + j) * p);
      }
      multiply(count, panel.b(0), panel.ld_b, W.unit_t[j].gates, doperand, ld_operand);
      for (int r = 0; r < count; ++r) {
        T* dstate = dh + (rows_[r] * n + j) * p;
        if (s.lstm)
          copy(dstate, doperand + r * ld_operand, p);
        else
          add(dstate, doperand + r * ld_operand, p);
      }
      project_.rows += s.projected ? count : 0;
      input_attention_backward(j);
      panel.rows += count;
      query_panel[j].rows += count;
    }
  }
  // dc becomes the gradient of c before the step; `output` receives o tanh(c~), where a projection needs it.
  void lstm_backward(const T* gate, const T* cell, const T* dstate, T* dcell, T* dgate, T* output) const {
    for (int d = 0; d < u; d += WIDTH<T>) {
      const int left = u - d;
      const Vec<T> in = load(gate + d, left), forget = load(gate + u + d, left);
      const Vec<T> candidate = load(gate + 2 * u + d, left), out = load(gate + 3 * u + d, left);
      const Vec<T> old = load(cell + d, left), squashed = tanh<T>(forget * old + in * candidate);
      const Vec<T> dy = load(dstate + d, left);
      const Vec<T> dnow = load(dcell + d, left) + dy * out * (T(1) - squashed * squashed);
      store(dgate + d, dnow * candidate * in * (T(1) - in), left);
      store(dgate + u + d, dnow * old * forget * (T(1) - forget), left);
      store(dgate + 2 * u + d, dnow * in * (T(1) - candidate * candidate), left);
      store(dgate + 3 * u + d, dy * squashed * out * (T(1) - out), left);
      store(dcell + d, dnow * forget, left);
      if (output) store(output + d, out * squashed, left);
    }
  }
  // `dold` receives what reaches h directly, through z.
  void gru_backward(const T* gate, const T* old_state, const T* dstate, T* dgate, T* dold) const {
    for (int d = 0; d < u; d += WIDTH<T>) {
      const int left = u - d;
      const Vec<T> reset = load(gate + d, left), update = load(gate + u + d, left);
      const Vec<T> candidate = load(gate + 2 * u + d, left), from_h = load(gate + 3 * u + d, left);
      const Vec<T> old = load(old_state + d, left), dy = load(dstate + d, left);
      const Vec<T> dinner = dy * (T(1) - update) * (T(1) - candidate * candidate);
      store(dgate + d, dinner * from_h * reset * (T(1) - reset), left);
      store(dgate + u + d, dy * (old - candidate) * update * (T(1) - update), left);
      store(dgate + 2 * u + d, dinner * reset, left);
      store(dgate + 3 * u + d, dinner, left);
      store(dold + d, dy * update, left);
    }
  }

  // A bid chooses and has no gradient; a winner's a_input has: da_input = d(a_input * feature) . feature.
  void input_attention_backward(int j) {
    const Panel<T>&panel = gates_panel[j], &queries = query_panel[j];
    const int count = won[j], S = s.S(), F = s.F();
    multiply(count, panel.a(0), panel.ld_a, W.unit[j].query, query, ld_query);
    for (int r = 0; r < count; ++r) {
      const int i = row[j * most + r];
      const T* a = problem.saved.attention + (position(i) * k + slot[j * most + r]) * H;
      for (int head = 0; head < H; ++head) {
        const T* dread = doperand + r * ld_operand + p1 + head * F;
        const T keep = kept(i, j, head), da = dot(dread, value_of(i, head), F) * keep;
        const T dscore = da * a[head] * (1 - a[head]) * T(s.input_scale);
        const T* key_ = key_of(i, head);
        T* dquery = queries.b(r) + head * S;
        each_vector<T>(S, [&](int d, int left) { store(dquery + d, dscore * load(key_ + d, left), left); });
        add(s.fold_value ? dx + i * ld_x : value_panel.a(i) + head * s.value, dread, F, a[head] * keep);
        add(s.fold_key ? dx + i * ld_x : key_panel.a(i) + head * s.key, query + r * ld_query + head * S, S, dscore);
      }
    }
    multiply(count, queries.b(0), queries.ld_b, W.unit_t[j].query, dasked, ld_state);
    for (int r = 0; r < count; ++r) add(dh + (row[j * most + r] * n + j) * p, dasked + r * ld_state, p);
  }

  // The gradient of x, through key and value where they are not folded.
  void project_backward() {
    const auto through = [&](Panel<T>& panel, const Parts<T>& weight_t) {
      for (int i = 0; i < rows; ++i) copy(panel.b(i), x + i * ld_x, in1);
      if (problem.grad_input) multiply(rows, panel.a(0), panel.ld_a, weight_t, dx, ld_x, true);
      panel.rows += rows;
    };
    if (!s.fold_key) through(key_panel, W.key_t);
    if (!s.fold_value) through(value_panel, W.value_t);
    if (!problem.grad_input) return;
    for (int i = 0; i < rows; ++i) copy(problem.grad_input + position(i) * s.input, dx + i * ld_x, s.input);
  }

  // The products that panels were filled for, if the next step might not fit, or at the end.
  void sum_up(const Gradients<T>& total, bool end) {
    for (int j = 0; j < n && !s.in_place; ++j) sum_up_unit(total.unit[j], j, end, false);
    sum_up(total.key, key_panel, key_panel, end, false);
    sum_up(total.value, value_panel, value_panel, end, false);
  }
  void sum_up_unit(const UnitGradients<T>& total, int j, bool end, bool begun) {
    sum_up(total.query, query_panel[j], gates_panel[j], end, begun);
    sum_up(total.gates, gates_panel[j], gates_panel[j], end, begun);
    sum_up(total.project, project_panel[j], project_panel[j], end, begun);
    sum_up(total.talk, talk_panel[j], talk_panel[j], end, begun);
    sum_up(total.output, output_panel[j], output_panel[j], end, begun);
  }
  // total = or += A^T B, with A of `left` and B of `panel`.
  void sum_up(const Sums<T>& total, Panel<T>& panel, const Panel<T>& left, bool end, bool begun) {
    if (!end && panel.rows + most <= panel.capacity) return;
    for (int i = 0; i < total.count; ++i) {
      const Sum<T>& sum = total.sum[i];
      multiply<T, true>(sum.rows, left.A + sum.row, left.ld_a, in_place(panel.B + sum.col, panel.rows, sum.cols, panel.ld_b), sum.to, sum.ld, begun || panel.begun);
    }
    panel.begun = true;
    panel.rows = 0;
  }

  void backward(const Gradients<T>& total) {
    for (int i = 0; i < most; ++i) {
      const auto begin = [&](T* to, const T* from, int64_t size) { from ? copy(to + i * size, from + batch_row(i) * size, size) : zero(to + i * size, size); };
      begin(dh, problem.grad_last_h, n * p);
      if (s.lstm) begin(dc, problem.grad_last_c, n * u);
    }
    for (int64_t step = s.steps - 1; step >= 0; --step) {
      const int64_t t = s.reverse ? s.steps - 1 - step : step;
      at_step(t);
      recall(t);
      if (problem.grad_output)
        for (int i = 0; i < rows; ++i) add(dh + i * n * p, problem.grad_output + position(i) * n * p, n * p);
      if (!s.fold_key) zero(key_panel.a(0), int64_t(rows) * key_panel.ld_a);
      if (!s.fold_value) zero(value_panel.a(0), int64_t(rows) * value_panel.ld_a);
      communication_backward();
      dynamics_backward();
      project_backward();
      sum_up(total, step == 0);
    }
    for (int i = 0; i < most; ++i) {
      copy(problem.grad_h + batch_row(i) * n * p, dh + i * n * p, n * p);
      if (s.lstm) copy(problem.grad_c + batch_row(i) * n * u, dc + i * n * u, n * u);
    }
  }
};

}  // namespace RIM_ISA
}  // namespace rim
