// The steps of a RIM on a GPU, its four stages in the paper's order, then their gradients in reverse.
//
// A batch row never meets another, so a tile of R rows goes through all steps alone. A block has one unit of the tile, j, and the
// blocks of a tile, one for each unit, are a circle: they meet twice a step in forward, to tell their bids, and their keys and
// values, and once in backward. Where the GPU has clusters, a circle is one, and reads what others say in their shared memory;
// elsewhere it says it in global memory, and meets at a counter there.
//
// A thread has one row of the tile, r, and every STRIDE-th feature d of whatever a row has; in a product it has four columns of
// all rows. Symbols are those of csrc/problem.h: n units of which k win, u and p the cell and output state of one unit. What
// depends on x alone is computed before, and what backward needs of a step computed again, for all steps of a chunk at once, by
// large products: cuda.py. sizes.h is written there, too, for one layer and GPU.
#include "sizes.h"
#include "device.cuh"

// ---- Sizes, and what they make ----

constexpr int G = lstm ? 4 : 3;                              // gates: LSTM i f g o, GRU r z n
constexpr int C = comm_heads, dk = comm_key, dv = comm_value;
constexpr int w = C * dv, shown = C * (dk + dv), talk = C * (2 * dk + dv);  // of one head after the other: [query | key | value]
constexpr int STRIDE = threads / R;
static_assert(R % 4 == 0 && threads % R == 0, "a row for each thread, four rows in a load");

constexpr int pad4(int size) { return (size + 3) / 4 * 4; }
constexpr int some(int size) { return size ? size : 1; }     // C++ has no empty arrays
constexpr int share(int size) { return (size + STRIDE - 1) / STRIDE; }  // of one thread

// A matrix per unit in global memory, (n, ROWS, pad4(COLS)): copied to shared memory where it fits, else read where it is.
template <int ROWS, int COLS, bool KEPT>
struct Matrix {
  static constexpr int SIZE = ROWS * pad4(COLS);
  alignas(16) float kept[KEPT ? some(SIZE) : 1];

  __device__ void keep(const float* weight, int j) {
    if (KEPT)
      for (int i = threadIdx.x * 4; i < SIZE; i += threads * 4)
        *reinterpret_cast<float4*>(kept + i) = load_constant(weight + (long long)j * SIZE + i);
  }
  // take(c, row[R]) for each column c: row[r] = sum over i of operand[i][r] * weight[i][c].
  template <class Take>
  __device__ void multiply(const float* operand, const float* weight, int j, Take&& take) const {
    const float* from = KEPT ? kept : weight + (long long)j * SIZE;
    for (int c = threadIdx.x * 4; c < COLS; c += threads * 4) {
      float sum[4][R] = {};
#pragma unroll 4
      for (int i = 0; i < ROWS; ++i) {
        const float* at = from + i * pad4(COLS) + c;
        const float4 b = KEPT ? *reinterpret_cast<const float4*>(at) : load_constant(at);
#pragma unroll
        for (int r = 0; r < R; r += 4) {
          const float4 four = *reinterpret_cast<const float4*>(operand + i * R + r);
          const float a[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            sum[0][r + q] += a[q] * b.x;
            sum[1][r + q] += a[q] * b.y;
            sum[2][r + q] += a[q] * b.z;
            sum[3][r + q] += a[q] * b.w;
          }
        }
      }
#pragma unroll
      for (int q = 0; q < 4; ++q)
        if (c + q < COLS) take(c + q, sum[q]);
    }
  }
};

__device__ void put(float* column, const float* row) {
#pragma unroll
  for (int r = 0; r < R; ++r) column[r] = row[r];
}

// visit(d, x): this thread's features, and which of them it is.
template <int SIZE, class Visit>
__device__ __forceinline__ void each(Visit&& visit) {
#pragma unroll
  for (int x = 0; x < share(SIZE); ++x) {
    const int d = threadIdx.x / R + x * STRIDE;
    if (d < SIZE) visit(d, x);
  }
}

__device__ __forceinline__ float sigmoid(float x) { return 1 / (1 + expf(-x)); }
// What a GRU's h~ leaves below 1: max(0, 1 - |h~|).
__device__ __forceinline__ float room(float state) { return fmaxf(0, 1 - fabsf(state)); }

// The blocks of a tile, and what they say: one Said each.
template <class Said>
struct Circle {
  Said* own;
  const Said* all;       // where they are no cluster
  unsigned *met, due = 0;

  __device__ Circle(Said* shared, void* global, unsigned* counters, int group, int j) {
    all = static_cast<const Said*>(global) + (long long)group * n;
    own = cluster ? shared : const_cast<Said*>(all) + j;
    met = counters + group;
  }
  __device__ void arrive() {
    if (cluster) return cluster_arrive();
    __syncthreads();
    if (threadIdx.x == 0) add_release(met);
  }
  __device__ void wait() {
    if (cluster) return cluster_wait();
    due += n;
    if (threadIdx.x == 0)
      for (unsigned polls = 0; load_acquire(met) < due; ++polls)
        if (polls >> 26) give_up();  // half a minute: an error rather than a GPU that hangs
    __syncthreads();
  }
  // What unit m says: `part` is where one says it oneself.
  __device__ const float* of(int m, const float* part) const {
    if (cluster) return in_block(part, m);
    return part + (all + m - own) * (long long)(sizeof(Said) / sizeof(float));
  }
  __device__ static float hear(const float* said) { return cluster ? *said : load_fresh(said); }
};

// Steps of a chunk, in order of time; rows of one behind those of another, `starts` tells where they differ in number.
struct Steps {
  const long long* starts;  // steps + 1 of them, counted from any number; or null
  long long batch, steps, reverse, tiles;

  __device__ long long start(long long t) const { return starts ? starts[t] - starts[0] : t * batch; }
  __device__ int present(long long t, long long first_row) const {  // of the tile
    const long long rows = (starts ? starts[t + 1] - starts[t] : batch) - first_row;
    return rows < 0 ? 0 : rows < R ? int(rows) : R;
  }
  __device__ long long time(long long step) const { return reverse ? steps - 1 - step : step; }
};

// The sum over the threads of a row of what each has, to the first of them.
template <int COUNT>
struct Sums {
  alignas(16) float part[COUNT * R * STRIDE];

  __device__ void put(int i, float value) { part[(i * R + threadIdx.x % R) * STRIDE + threadIdx.x / R] = value; }
  __device__ float total(int i) const {
    float sum[4] = {};
    const float* of_row = part + (i * R + threadIdx.x % R) * STRIDE;
#pragma unroll 4
    for (int s = 0; s < STRIDE; ++s) sum[s % 4] += of_row[s];
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }
};

// ---- Forward ----

struct ForwardArguments {  // rows of the chunk come first, unless it says otherwise; what may be null is not wanted, or not there
  const float *z, *z_bias, *gates_x;      // (n, heads, p), (n, heads) or null, (n, heads, G*u): see Scan::input_attention
  const float *keep_input, *keep_comm;    // dropout: (n, heads), (C, n, n); or null
  const float *weight_hh, *bias, *weight_hr, *weight_talk, *weight_output;  // of all units; bias (n, 4*u), or null
  float *h, *c;                           // (N, n, p) and (N, n, u): before the chunk, and after it
  float *output, *cells, *tilde, *scores; // (n, p), (n, u), (n, p), (n, heads); all but output may be null
  unsigned char* won;                     // (n), or null
  void* said;
  unsigned* met;
  Steps time;
};

struct ForwardSaid {
  float bids[2][R];  // of steps with an even number, and an odd one: one is read while the next is written
  float read[some(shown) * R];
};

struct ForwardMemory {
  Matrix<p, G * u, keep_hh> weight_hh;
  Matrix<u, projected ? p : 0, keep_hr> weight_hr;
  Matrix<p, talk, keep_talk> weight_talk;
  Matrix<w, p, keep_output> weight_output;
  alignas(16) ForwardSaid said;
  // [feature][row of the tile]
  alignas(16) float h[p * R], c[lstm ? u * R : 1], bias[4 * u];
  alignas(16) float gates[G * u * R], cell_output[projected ? u * R : 4], message[p * R];
  alignas(16) float score[heads * R], query[some(C * dk) * R], attention[some(C * n) * R], heard[some(w) * R];
  Sums<heads> sums;
};
static_assert(sizeof(ForwardMemory) == forward_bytes, "cuda.py counts the same");

struct Scan {
  const ForwardArguments& a;
  ForwardMemory& s;
  Circle<ForwardSaid>& circle;
  const int j, r, lane;  // unit, row of the tile, first feature
  const long long first_row;

  // The step at hand.
  long long position = 0;  // of this thread's row
  bool there = false, won = false;
  // What the next step needs of x, loaded before it begins.
  float z[share(p)][heads], z_bias[heads], gates_x[share(u)][heads][G];

  __device__ Scan(const ForwardArguments& a_, ForwardMemory& s_, Circle<ForwardSaid>& circle_, int j_, long long tile)
      : a(a_), s(s_), circle(circle_), j(j_), r(threadIdx.x % R), lane(threadIdx.x / R), first_row(tile * R) {}

  __device__ long long of_unit() const { return position * n + j; }

  __device__ void first_states() {
    const long long row = first_row + r;
    const bool is = row < a.time.batch;
    each<p>([&](int d, int) { s.h[d * R + r] = is ? a.h[(row * n + j) * p + d] : 0; });
    if (lstm) each<u>([&](int d, int) { s.c[d * R + r] = is ? a.c[(row * n + j) * u + d] : 0; });
  }
  __device__ void last_states() {
    const long long row = first_row + r;
    if (row >= a.time.batch) return;
    each<p>([&](int d, int) { a.h[(row * n + j) * p + d] = s.h[d * R + r]; });
    if (lstm) each<u>([&](int d, int) { a.c[(row * n + j) * u + d] = s.c[d * R + r]; });
  }

  __device__ void look_ahead(long long t) {
    if (r >= a.time.present(t, first_row)) return;
    const long long next = (a.time.start(t) + first_row + r) * n + j;
    each<p>([&](int d, int x) {
      for (int head = 0; head < heads; ++head) z[x][head] = a.z[(next * heads + head) * p + d];
    });
    for (int head = 0; head < heads; ++head) z_bias[head] = a.z_bias ? a.z_bias[next * heads + head] : 0;
    each<u>([&](int d, int x) {
      for (int head = 0; head < heads; ++head)
        for (int g = 0; g < G; ++g) gates_x[x][head][g] = a.gates_x[((next * heads + head) * G + g) * u + d];
    });
  }

  // Input attention, equation 2: score = query . key / sqrt(key size). With query = h W^q + b^q this is h . z + z_bias, where
  // z = W^q key / sqrt(key size) and z_bias = b^q . key / sqrt(key size) depend on x alone. A bid is a score averaged over heads.
  __device__ void input_attention(int turn) {
    for (int head = 0; head < heads; ++head) {
      float part = 0;
      if (there) each<p>([&](int d, int x) { part += s.h[d * R + r] * z[x][head]; });
      s.sums.put(head, part);
    }
    __syncthreads();
    if (lane) return;
    float bid = 0;
    for (int head = 0; head < heads; ++head) {
      const float score = s.sums.total(head) + (there ? z_bias[head] : 0);
      s.score[head * R + r] = score;
      bid += score;
      if (there && a.scores) a.scores[of_unit() * heads + head] = score;
    }
    circle.own->bids[turn & 1][r] = bid / heads;
  }

  // Competition: the k highest bids win, ties to the lowest unit, NaN below all.
  __device__ void competition(int turn) {
    const float* said = &circle.own->bids[turn & 1][r];
    const float mine = circle.hear(said);
    int ahead = 0;
    for (int m = 0; m < n; ++m) {
      const float other = circle.hear(circle.of(m, said));
      const bool alike = other == mine || (other != other && mine != mine);
      ahead += other > mine || (mine != mine && other == other) || (alike && m < j);
    }
    won = there && ahead < k;
    if (there && lane == 0 && a.won) a.won[of_unit()] = won;
  }

  // Independent dynamics, equation 4: the winners' LSTM or GRU; losers keep h and c. s.gates has h W_hh of every row.
  __device__ void dynamics() {
    float a_input[heads];  // softmax([0, score])_1 = sigmoid(score), after dropout
    for (int head = 0; head < heads; ++head) {
      a_input[head] = sigmoid(s.score[head * R + r]);
      if (there && a.keep_input) a_input[head] *= a.keep_input[of_unit() * heads + head];
    }
    each<u>([&](int d, int x) {
      if (won) {
        float read[G], gate[G];
        for (int g = 0; g < G; ++g) {
          read[g] = 0;
          for (int head = 0; head < heads; ++head) read[g] += a_input[head] * gates_x[x][head][g];
          gate[g] = s.gates[(g * u + d) * R + r] + s.bias[g * u + d];
        }
        float* to = projected ? s.cell_output : s.h;
        to[d * R + r] = lstm ? lstm_unit(read, gate, s.c[d * R + r]) : gru_unit(read, gate, s.bias[3 * u + d], s.h[d * R + r]);
      }
      if (lstm && there && a.cells) a.cells[of_unit() * u + d] = s.c[d * R + r];
    });
    if (projected) {
      __syncthreads();
      s.weight_hr.multiply(s.cell_output, a.weight_hr, j, [&](int d, const float* row) { put(s.message + d * R, row); });
      __syncthreads();
      if (won) each<p>([&](int d, int) { s.h[d * R + r] = s.message[d * R + r]; });
    }
    if (there && a.tilde) each<p>([&](int d, int) { a.tilde[of_unit() * p + d] = s.h[d * R + r]; });
  }
  // c~ = f c + i g, h~ = o tanh(c~)
  __device__ static float lstm_unit(const float* read, const float* gate, float& cell) {
    const float in = sigmoid(read[0] + gate[0]), forget = sigmoid(read[1] + gate[1]);
    const float candidate = tanhf(read[2] + gate[2]), out = sigmoid(read[G - 1] + gate[G - 1]);
    cell = forget * cell + in * candidate;
    return out * tanhf(cell);
  }
  // n = tanh(W_in x + b_in + r (W_hn h + b_hn)), h~ = (1 - z) n + z h
  __device__ static float gru_unit(const float* read, const float* gate, float bias, float state) {
    const float reset = sigmoid(read[0] + gate[0]), update = sigmoid(read[1] + gate[1]);
    const float candidate = tanhf(read[2] + bias + reset * gate[2]);
    return (1 - update) * candidate + update * state;
  }

  // Communication, equations 5 and 6: message = softmax(query . key / sqrt(key size)) value W^o, and h = h~ + room * tanh(message),
  // or h~ + message as printed. The root rides on the weights of the queries.
  __device__ void ask_and_show() {
    __syncthreads();
    s.weight_talk.multiply(s.h, a.weight_talk, j, [&](int column, const float* row) {
      const int head = column / (2 * dk + dv), at = column % (2 * dk + dv);
      put(at < dk ? s.query + (head * dk + at) * R : circle.own->read + (head * (dk + dv) + at - dk) * R, row);
    });
  }
  __device__ void exchange() {
    each<C * n>([&](int pair, int) {
      const int head = pair / n, m = pair % n;
      const float* key = circle.of(m, circle.own->read + head * (dk + dv) * R + r);
      float score = 0;
#pragma unroll 8
      for (int f = 0; f < dk; ++f) score += s.query[(head * dk + f) * R + r] * circle.hear(key + f * R);
      s.attention[pair * R + r] = score;
    });
    __syncthreads();
    each<w>([&](int e, int) {
      const int head = e / dv;
      const float* scores = s.attention + head * n * R + r;
      const float* value = circle.own->read + (head * (dk + dv) + dk + e % dv) * R + r;
      const float* keep = there && a.keep_comm ? a.keep_comm + ((position * C + head) * n + j) * n : nullptr;
      float highest = scores[0], total = 0, sum = 0;
      for (int m = 1; m < n; ++m) highest = fmaxf(highest, scores[m * R]);
      for (int m = 0; m < n; ++m) {
        const float power = expf(scores[m * R] - highest);
        total += power;
        sum += (keep ? power * keep[m] : power) * circle.hear(circle.of(m, value));
      }
      s.heard[e * R + r] = sum / total;
    });
    __syncthreads();
  }
  // What was heard, through W^o, onto the winners' states.
  __device__ void take_up() {
    s.weight_output.multiply(s.heard, a.weight_output, j, [&](int d, const float* row) { put(s.message + d * R, row); });
    __syncthreads();
    if (won)
      each<p>([&](int d, int) {
        const float message = s.message[d * R + r], state = s.h[d * R + r];
        s.h[d * R + r] = state + (!bounded ? message : lstm ? tanhf(message) : room(state) * tanhf(message));
      });
  }

  __device__ void run(int& turn) {
    first_states();
    long long step = 0;
    while (step < a.time.steps && !a.time.present(a.time.time(step), first_row)) ++step;
    if (step < a.time.steps) look_ahead(a.time.time(step));
    for (; step < a.time.steps; ++step, ++turn) {
      const long long t = a.time.time(step);
      const int present = a.time.present(t, first_row);
      if (!present) break;
      position = a.time.start(t) + first_row + r, there = r < present;
      input_attention(turn);
      circle.arrive();
      s.weight_hh.multiply(s.h, a.weight_hh, j, [&](int d, const float* row) { put(s.gates + d * R, row); });  // and wait meanwhile
      circle.wait();
      competition(turn);
      dynamics();
      if (step + 1 < a.time.steps) look_ahead(a.time.time(step + 1));
      if (C) {
        ask_and_show();
        circle.arrive();
        circle.wait();
        exchange();
        take_up();
      }
      if (there) each<p>([&](int d, int) { a.output[of_unit() * p + d] = s.h[d * R + r]; });
    }
    last_states();
  }
};

extern "C" __global__ void __launch_bounds__(threads) forward(const ForwardArguments a) {
  ForwardMemory& s = *reinterpret_cast<ForwardMemory*>(shared_memory());
  const int j = blockIdx.x % n, group = blockIdx.x / n, groups = gridDim.x / n;
  s.weight_hh.keep(a.weight_hh, j);
  if (projected) s.weight_hr.keep(a.weight_hr, j);
  if (C) s.weight_talk.keep(a.weight_talk, j), s.weight_output.keep(a.weight_output, j);
  for (int i = threadIdx.x; i < 4 * u; i += threads) s.bias[i] = a.bias ? a.bias[j * 4 * u + i] : 0;
  Circle<ForwardSaid> circle(&s.said, a.said, a.met, group, j);
  int turn = 0;
  for (long long tile = group; tile < a.time.tiles; tile += groups) Scan(a, s, circle, j, tile).run(turn);
  circle.arrive();  // nobody leaves while others read what it says
  circle.wait();
}

// ---- Backward: d<name> is the gradient of <name> ----

struct BackwardArguments {  // as above
  const float *grad_output;                   // (n, p), or null
  const float *cells, *cells_before, *before; // (n, u), (n, u), (n, p): after the step, before it; h before it
  const float *tilde;                         // h~, (n, p)
  float *squashed, *gates;                    // tanh(message) or message, (n, p); gates after activation, (n, 4*u), as csrc/problem.h
                                              // has them: replaced by dmessage and dgates
  const float *talk, *attention;              // queries, keys and values of h~, (n, talk); probabilities before dropout, (C, n, n)
  const float *z, *gates_x, *scores;
  const unsigned char* won;
  const float *keep_input, *keep_comm;
  const float *weight_output, *weight_talk, *weight_hr, *weight_hh;  // transposed
  float *dh, *dc;                             // (N, n, p) and (N, n, u): after the chunk, and before it
  float *dtalk, *dtilde, *dscores;            // (n, talk), (n, p), (n, heads); dtilde of winners, where they are projected, or null
  void* said;
  unsigned* met;
  Steps time;
};

struct BackwardSaid {
  // What a reader tells the units that it read: the gradients of what it heard, and of the scores of each pair of head and unit.
  struct { float dheard[some(w) * R], dscore[some(C * n) * R]; } of_step[2];
};

struct BackwardMemory {
  Matrix<p, w, keep_output> weight_output;
  Matrix<talk, p, keep_talk> weight_talk;
  Matrix<p, projected ? u : 0, keep_hr> weight_hr;
  Matrix<G * u, p, keep_hh> weight_hh;
  alignas(16) BackwardSaid said;
  alignas(16) float dh[p * R], dc[lstm ? u * R : 1], dmessage[p * R], dprobability[some(C * n) * R];
  alignas(16) float dtalk[some(talk) * R], dcell_output[projected ? u * R : 4], dgates[G * u * R], dscore[heads * R];
  Sums<heads> sums;
};
static_assert(sizeof(BackwardMemory) == backward_bytes, "cuda.py counts the same");

struct ScanBackward {
  const BackwardArguments& a;
  BackwardMemory& s;
  Circle<BackwardSaid>& circle;
  const int j, r, lane;
  const long long first_row;
  long long position = 0;
  bool there = false, won = false;

  __device__ ScanBackward(const BackwardArguments& a_, BackwardMemory& s_, Circle<BackwardSaid>& circle_, int j_, long long tile)
      : a(a_), s(s_), circle(circle_), j(j_), r(threadIdx.x % R), lane(threadIdx.x / R), first_row(tile * R) {}

  __device__ long long of_unit() const { return position * n + j; }
  __device__ const float* talk_of(int m, int head) const { return a.talk + (position * n + m) * talk + head * (2 * dk + dv); }
  __device__ long long pair(int head, int reader) const { return ((position * C + head) * n + reader) * n; }

  __device__ void begin() {
    const long long row = first_row + r;
    const bool is = row < a.time.batch;
    each<p>([&](int d, int) { s.dh[d * R + r] = is ? a.dh[(row * n + j) * p + d] : 0; });
    if (lstm) each<u>([&](int d, int) { s.dc[d * R + r] = is ? a.dc[(row * n + j) * u + d] : 0; });
  }
  __device__ void end() {
    const long long row = first_row + r;
    if (row >= a.time.batch) return;
    each<p>([&](int d, int) { a.dh[(row * n + j) * p + d] = s.dh[d * R + r]; });
    if (lstm) each<u>([&](int d, int) { a.dc[(row * n + j) * u + d] = s.dc[d * R + r]; });
  }

  // dh becomes the gradient of h~ but for what goes through queries, keys and values.
  __device__ void take_up_backward() {
    each<p>([&](int d, int) {
      const long long at = of_unit() * p + d;
      float dmessage = 0, dstate = s.dh[d * R + r];
      if (won) {
        const float squashed = a.squashed[at];
        dmessage = !bounded ? dstate : dstate * (1 - squashed * squashed);
        if (bounded && !lstm) {
          const float state = a.tilde[at], droom = room(state) > 0 ? dstate * squashed : 0;
          dmessage *= room(state);
          dstate = state > 0 ? dstate - droom : state < 0 ? dstate + droom : dstate;
        }
      }
      s.dh[d * R + r] = dstate;
      s.dmessage[d * R + r] = dmessage;
      if (there) a.squashed[at] = dmessage;
    });
    __syncthreads();
  }
  __device__ void exchange_backward(int turn) {
    auto& said = circle.own->of_step[turn & 1];
    s.weight_output.multiply(s.dmessage, a.weight_output, j, [&](int e, const float* row) { put(said.dheard + e * R, row); });
    __syncthreads();
    each<C * n>([&](int pair_, int) {
      const int head = pair_ / n, m = pair_ % n;
      float dprobability = 0;
      if (won) {
        const float* value = talk_of(m, head) + 2 * dk;
#pragma unroll 8
        for (int f = 0; f < dv; ++f) dprobability += circle.hear(said.dheard + (head * dv + f) * R + r) * value[f];
        if (a.keep_comm) dprobability *= a.keep_comm[pair(head, j) + m];
      }
      s.dprobability[pair_ * R + r] = dprobability;
    });
    __syncthreads();
    each<C * n>([&](int pair_, int) {
      const int head = pair_ / n, m = pair_ % n;
      float dscore = 0;
      if (won) {
        const float* attention = a.attention + pair(head, j);
        float mean = 0;
        for (int i = 0; i < n; ++i) mean += attention[i] * s.dprobability[(head * n + i) * R + r];
        dscore = attention[m] * (s.dprobability[pair_ * R + r] - mean);
      }
      said.dscore[pair_ * R + r] = dscore;
    });
  }
  __device__ void ask_and_show_backward(int turn) {
    auto& said = circle.own->of_step[turn & 1];
    each<talk>([&](int column, int) {
      const int head = column / (2 * dk + dv), at = column % (2 * dk + dv);
      float sum = 0;
      if (there)
        for (int m = 0; m < n; ++m) {
          if (at < dk) {  // unit j asked m
            sum += circle.hear(said.dscore + (head * n + m) * R + r) * talk_of(m, head)[dk + at];
          } else if (at < 2 * dk) {  // m asked unit j
            sum += circle.hear(circle.of(m, said.dscore + (head * n + j) * R + r)) * talk_of(m, head)[at - dk];
          } else {  // and heard it
            const long long of_pair = pair(head, m) + j;
            const float probability = a.keep_comm ? a.attention[of_pair] * a.keep_comm[of_pair] : a.attention[of_pair];
            sum += probability * circle.hear(circle.of(m, said.dheard + (head * dv + at - 2 * dk) * R + r));
          }
        }
      s.dtalk[column * R + r] = sum;
      if (there) a.dtalk[of_unit() * talk + column] = sum;
    });
    __syncthreads();
    s.weight_talk.multiply(s.dtalk, a.weight_talk, j, [&](int d, const float* row) { add(s.dh + d * R, row); });
    __syncthreads();
  }
  __device__ static void add(float* column, const float* row) {
#pragma unroll
    for (int i = 0; i < R; ++i) column[i] += row[i];
  }

  // dh and dc become the gradients of what was before the step, dh but for what goes through the gates and the query.
  __device__ void dynamics_backward() {
    if (projected) {
      each<p>([&](int d, int) {
        const float dstate = won ? s.dh[d * R + r] : 0;
        s.dmessage[d * R + r] = dstate;
        if (there) a.dtilde[of_unit() * p + d] = dstate;
      });
      __syncthreads();
      s.weight_hr.multiply(s.dmessage, a.weight_hr, j, [&](int d, const float* row) { put(s.dcell_output + d * R, row); });
      __syncthreads();
    }
    float da[heads] = {};
    each<u>([&](int d, int) {
      float dgate[4] = {}, dread[G] = {};
      if (won) {
        const float* gate = a.gates + of_unit() * 4 * u + d;
        const float dy = projected ? s.dcell_output[d * R + r] : s.dh[d * R + r];
        if (lstm)
          lstm_backward(gate, a.cells[of_unit() * u + d], a.cells_before[of_unit() * u + d], dy, s.dc[d * R + r], dgate);
        else
          gru_backward(gate, a.before[of_unit() * u + d], dy, s.dh[d * R + r], dgate);
        for (int g = 0; g < G; ++g) {
          dread[g] = dgate[!lstm && g == 2 ? 3 : g];
          for (int head = 0; head < heads; ++head) da[head] += dread[g] * a.gates_x[((of_unit() * heads + head) * G + g) * u + d];
        }
      }
      for (int g = 0; g < G; ++g) s.dgates[(g * u + d) * R + r] = dgate[g];
      if (there)
        for (int g = 0; g < 4; ++g) a.gates[(of_unit() * 4 + g) * u + d] = dgate[g];
    });
    for (int head = 0; head < heads; ++head) s.sums.put(head, da[head]);
    if (lstm && won) each<p>([&](int d, int) { s.dh[d * R + r] = 0; });
    __syncthreads();
  }
  __device__ static void lstm_backward(const float* gate, float cell, float before, float dy, float& dcell, float* dgate) {
    const float in = gate[0], forget = gate[u], candidate = gate[2 * u], out = gate[3 * u], squashed = tanhf(cell);
    const float dnow = dcell + dy * out * (1 - squashed * squashed);
    dgate[0] = dnow * candidate * in * (1 - in);
    dgate[1] = dnow * before * forget * (1 - forget);
    dgate[2] = dnow * in * (1 - candidate * candidate);
    dgate[3] = dy * squashed * out * (1 - out);
    dcell = dnow * forget;
  }
  // `dbefore` receives what reaches h directly, through z.
  __device__ static void gru_backward(const float* gate, float before, float dy, float& dbefore, float* dgate) {
    const float reset = gate[0], update = gate[u], candidate = gate[2 * u], from_h = gate[3 * u];
    const float dinner = dy * (1 - update) * (1 - candidate * candidate);
    dgate[0] = dinner * from_h * reset * (1 - reset);
    dgate[1] = dy * (before - candidate) * update * (1 - update);
    dgate[2] = dinner * reset;
    dgate[3] = dinner;
    dbefore = dy * update;
  }

  // A bid chooses and has no gradient; a winner's a_input has.
  __device__ void input_attention_backward() {
    if (lane == 0)
      for (int head = 0; head < heads; ++head) {
        float dscore = s.sums.total(head);
        if (there) {
          const long long at = of_unit() * heads + head;
          const float a_input = sigmoid(a.scores[at]);
          dscore *= a_input * (1 - a_input) * (a.keep_input ? a.keep_input[at] : 1);
          a.dscores[at] = dscore;
        }
        s.dscore[head * R + r] = dscore;
      }
    s.weight_hh.multiply(s.dgates, a.weight_hh, j, [&](int d, const float* row) { add(s.dh + d * R, row); });
    __syncthreads();
    if (won)
      each<p>([&](int d, int) {
        for (int head = 0; head < heads; ++head) s.dh[d * R + r] += s.dscore[head * R + r] * a.z[(of_unit() * heads + head) * p + d];
      });
  }

  __device__ void run(int& turn) {
    begin();
    long long step = a.time.steps - 1;
    while (step >= 0 && !a.time.present(a.time.time(step), first_row)) --step;
    for (; step >= 0; --step, ++turn) {
      const long long t = a.time.time(step);
      const int present = a.time.present(t, first_row);
      if (!present) break;
      position = a.time.start(t) + first_row + r, there = r < present, won = there && a.won[of_unit()];
      if (there && a.grad_output) each<p>([&](int d, int) { s.dh[d * R + r] += a.grad_output[of_unit() * p + d]; });
      if (C) {
        take_up_backward();
        exchange_backward(turn);
        circle.arrive();
        circle.wait();
        ask_and_show_backward(turn);
      }
      dynamics_backward();
      input_attention_backward();
    }
    end();
  }
};

extern "C" __global__ void __launch_bounds__(threads) backward(const BackwardArguments a) {
  BackwardMemory& s = *reinterpret_cast<BackwardMemory*>(shared_memory());
  const int j = blockIdx.x % n, group = blockIdx.x / n, groups = gridDim.x / n;
  s.weight_hh.keep(a.weight_hh, j);
  if (projected) s.weight_hr.keep(a.weight_hr, j);
  if (C) s.weight_talk.keep(a.weight_talk, j), s.weight_output.keep(a.weight_output, j);
  Circle<BackwardSaid> circle(&s.said, a.said, a.met, group, j);
  int turn = 0;
  for (long long tile = group; tile < a.time.tiles; tile += groups) ScanBackward(a, s, circle, j, tile).run(turn);
  circle.arrive();
  circle.wait();
}
