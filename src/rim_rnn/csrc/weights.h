// The weights in the form the products want them, and their gradients back in the form of the parameters.
//
// Two facts make the form. A read is a scalar times a projection of x, so a winner's gates are one product of
// [h | 1 | a_input * feature] with its weights stacked: W_hh, the biases, and W_ih where the feature is the value. And where
// x is the smaller, W^v W_ih and W^q W^e are multiplied out, and the feature is [x | 1] itself.
#pragma once

#include "gemm.h"

namespace rim {
namespace RIM_ISA {

// Hands out pieces of one allocation. From nullptr it only counts.
struct Arena {
  char* base;
  int64_t used = 0;

  template <class P>
  P* take(int64_t count) {
    const int64_t offset = (used + 63) / 64 * 64;
    used = offset + count * int64_t(sizeof(P));
    return base ? reinterpret_cast<P*>(base + offset) : nullptr;
  }
};

// A block of the stacked gate weights: rows of the operand that meet columns of the gates. An LSTM has one; in a GRU the gate n
// has h and the input apart, n = tanh(W_in x + b_in + r (W_hn h + b_hn)), so columns are r z | n of h | n of the input.
struct GateBlock {
  int row, rows, col, cols;
};
RIM_INLINE int gate_blocks(const Sizes& s, GateBlock* blocks) {
  blocks[0] = {0, s.K(), 0, s.gates()};
  if (s.lstm) return 1;
  blocks[0].cols = 2 * s.u;
  blocks[1] = {0, s.p1(), 2 * s.u, s.u};
  blocks[2] = {s.p, s.K() - s.p, 3 * s.u, s.u};
  return 3;
}

// Columns of weight_ih, and where they are among the gates: an LSTM's are where they were, a GRU's n moves behind W_hn h.
struct Columns {
  int from, to, count;
};
RIM_INLINE int input_columns(const Sizes& s, Columns* columns) {
  columns[0] = {0, 0, s.gates()};
  if (s.lstm) return 1;
  columns[0].count = 2 * s.u;
  columns[1] = {2 * s.u, 3 * s.u, s.u};
  return 2;
}

// The right operands, or their transposes for backward, which needs of the operands themselves only query, read and ask.
template <class T>
struct UnitWeights {
  Parts<T> query;    // (p1, heads * S); transposed without the bias, for the 1 has no gradient
  Parts<T> gates;    // (K, 4u)
  Parts<T> project;  // (u, p)
  Parts<T> read;     // (p, e + w): keys and values
  Parts<T> ask;      // (p, e): queries
  Parts<T> output;   // (w, p)
};
template <class T>
struct Weights {
  Parts<T> key, value;  // (in1, heads * size), where they are not folded
  UnitWeights<T>* unit;
  Parts<T> key_t, value_t;
  UnitWeights<T>* unit_t;

  Weights(const Problem<T>& problem, Arena& arena, bool backward) {
    const Sizes& s = problem.s;
    const Parameters<const T>& P = problem.weight;
    const int d_q = s.heads * s.key, d_v = s.heads * s.value;
    unit = arena.take<UnitWeights<T>>(s.n);
    unit_t = arena.take<UnitWeights<T>>(backward ? s.n : 0);
    if (s.in_place) {
      key.add(0, 0, false, transposed(P.key, s.input, d_q, s.input));
      value.add(0, 0, false, transposed(P.value, s.input, d_v, s.input));
      if (s.bias) key.add(s.input, 0, true, rim::RIM_ISA::in_place(P.key_bias, 1, d_q, d_q));
      if (s.bias) value.add(s.input, 0, true, rim::RIM_ISA::in_place(P.value_bias, 1, d_v, d_v));
    } else {
      key = space(arena, s.fold_key ? 0 : s.in1(), d_q);
      value = space(arena, s.fold_value ? 0 : s.in1(), d_v);
    }
    if (backward && s.in_place) {
      key_t.add(0, 0, false, rim::RIM_ISA::in_place(P.key, d_q, s.input, s.input));
      value_t.add(0, 0, false, rim::RIM_ISA::in_place(P.value, d_v, s.input, s.input));
    } else if (backward) {
      key_t = space(arena, d_q, s.fold_key ? 0 : s.input);
      value_t = space(arena, d_v, s.fold_value ? 0 : s.input);
    }
    for (int j = 0; j < s.n; ++j) {
      if (s.in_place && !arena.base) break;  // nothing to count
      const UnitWeights<T> unit_ = s.in_place ? as_they_lie(problem, j) : packed(s, arena, false, backward);
      if (arena.base) unit[j] = unit_;
      if (!backward) continue;
      const UnitWeights<T> transpose = s.in_place ? as_they_lie_transposed(problem, j) : packed(s, arena, true, true);
      if (arena.base) unit_t[j] = transpose;
    }
  }

 private:
  static Parts<T> space(Arena& arena, int inner, int cols, bool rounded = false) {
    Parts<T> parts;
    parts.add(0, 0, false, panels<T>(arena.take<T>(packed_size<T>(inner, cols)), inner, cols, rounded));
    return parts;
  }
  // Space for prepare() to fill.
  static UnitWeights<T> packed(const Sizes& s, Arena& arena, bool t, bool backward) {
    const auto either = [&](int inner, int cols) { return t ? space(arena, cols, inner, s.rounded) : space(arena, inner, cols, s.rounded); };
    UnitWeights<T> unit;
    unit.query = t ? space(arena, s.heads * s.S(), s.p) : space(arena, s.p1(), s.heads * s.S());  // of the bids
    unit.read = either(s.p, s.e() + s.w());
    unit.ask = either(s.p, s.e());
    if (backward && !t) return unit;
    GateBlock blocks[3];
    const int count = gate_blocks(s, blocks);
    for (int b = 0; b < count; ++b) {
      const GateBlock& block = blocks[b];
      const Matrix<T> matrix = either(block.rows, block.cols)[0];
      t ? unit.gates.add(block.col, block.row, b > 0, matrix) : unit.gates.add(block.row, block.col, false, matrix);
    }
    unit.project = either(s.projected ? s.u : 0, s.p);
    unit.output = either(s.w(), s.p);
    return unit;
  }
  static UnitWeights<T> as_they_lie(const Problem<T>& problem, int64_t j) {
    const Sizes& s = problem.s;
    const Parameters<const T>& P = problem.weight;
    const int d_q = s.heads * s.key, d_v = s.heads * s.value, gates = s.weight_gates(), p = s.p, e = s.e(), w = s.w();
    const auto part = [](const T* from, int inner, int cols, int ld) { return rim::RIM_ISA::in_place(from, inner, cols, ld); };
    UnitWeights<T> unit;
    unit.query.add(0, 0, false, part(P.query + j * p * d_q, p, d_q, d_q));
    if (s.bias) unit.query.add(p, 0, true, part(P.query_bias + j * d_q, 1, d_q, d_q));
    unit.gates.add(0, 0, false, part(P.weight_hh + j * p * gates, p, gates, gates));
    if (s.bias) unit.gates.add(p, 0, true, part(P.bias_hh + j * gates, 1, gates, gates));
    Columns columns[2];
    const int groups = input_columns(s, columns);
    for (int g = 0; g < groups; ++g) {
      const Columns& c = columns[g];
      if (s.bias) unit.gates.add(p, c.to, g == 0, part(P.bias_ih + j * gates + c.from, 1, c.count, gates));
      unit.gates.add(s.p1(), c.to, g == 0 || s.bias, part(P.weight_ih + j * d_v * gates + c.from, d_v, c.count, gates));
    }
    if (s.projected) unit.project.add(0, 0, false, part(P.weight_hr + j * s.u * p, s.u, p, p));
    if (!s.comm_heads) return unit;
    unit.read.add(0, 0, false, part(P.comm_key + j * p * e, p, e, e));
    unit.read.add(0, e, false, part(P.comm_value + j * p * w, p, w, w));
    unit.ask.add(0, 0, false, part(P.comm_query + j * p * e, p, e, e));
    unit.output.add(0, 0, false, part(P.comm_output + j * w * p, w, p, p));
    return unit;
  }
  static UnitWeights<T> as_they_lie_transposed(const Problem<T>& problem, int64_t j) {
    const Sizes& s = problem.s;
    const Parameters<const T>& P = problem.weight;
    const int d_q = s.heads * s.key, d_v = s.heads * s.value, gates = s.weight_gates(), p = s.p, e = s.e(), w = s.w();
    UnitWeights<T> unit;
    unit.query.add(0, 0, false, transposed(P.query + j * p * d_q, d_q, p, d_q));
    unit.gates.add(0, 0, false, transposed(P.weight_hh + j * p * gates, gates, p, gates));
    Columns columns[2];
    const int groups = input_columns(s, columns);
    for (int g = 0; g < groups; ++g)
      unit.gates.add(columns[g].to, s.p1(), g > 0, transposed(P.weight_ih + j * d_v * gates + columns[g].from, columns[g].count, d_v, gates));
    if (s.projected) unit.project.add(0, 0, false, transposed(P.weight_hr + j * s.u * p, p, s.u, p));
    if (!s.comm_heads) return unit;
    unit.read.add(0, 0, false, transposed(P.comm_key + j * p * e, e, p, e));
    unit.read.add(e, 0, true, transposed(P.comm_value + j * p * w, w, p, w));
    unit.ask.add(0, 0, false, transposed(P.comm_query + j * p * e, e, p, e));
    unit.output.add(0, 0, false, transposed(P.comm_output + j * w * p, p, w, p));
    return unit;
  }
};

// Where a product of collected rows goes: columns of A from `row` times columns of B from `col`, summed in (rows, cols).
template <class T>
struct Sum {
  int row, rows, col, cols;
  T* to;
  int64_t ld;
};
template <class T>
struct Sums {
  int count = 0;
  Sum<T> sum[6];

  void add(int row, int rows, int col, int cols, T* to, int64_t ld) { sum[count++] = {row, rows, col, cols, to, ld}; }
};

// The gradients of the right operands over the rows and steps of one block of the batch.
template <class T>
struct UnitGradients {
  Sums<T> query, gates, project, talk, output;  // talk: (p, e + w + e), keys, values, queries
};
template <class T>
struct Gradients {
  Sums<T> key, value;  // (heads * size, in1), where they are not folded
  UnitGradients<T>* unit;
  T* row;              // one row of key or value

  Gradients(const Problem<T>& problem, Arena& arena) {
    const Sizes& s = problem.s;
    unit = arena.take<UnitGradients<T>>(s.n);
    row = arena.take<T>(s.in1());
    key = space(arena, s.fold_key ? 0 : s.heads * s.key, s.in1());
    value = space(arena, s.fold_value ? 0 : s.heads * s.value, s.in1());
    for (int j = 0; j < s.n; ++j) {
      if (s.in_place && !arena.base) break;  // nothing to count
      const UnitGradients<T> unit_ = s.in_place ? where_they_belong(problem, j) : apart(s, arena);
      if (arena.base) unit[j] = unit_;
    }
  }

 private:
  static Sums<T> space(Arena& arena, int rows, int cols) {
    Sums<T> sums_;
    sums_.add(0, rows, 0, cols, arena.take<T>(int64_t(rows) * pad<T>(cols)), pad<T>(cols));
    return sums_;
  }
  // For finish() to bring together.
  static UnitGradients<T> apart(const Sizes& s, Arena& arena) {
    UnitGradients<T> unit;
    unit.query = space(arena, s.p1(), s.heads * s.S());
    GateBlock blocks[3];
    const int count = gate_blocks(s, blocks);
    for (int b = 0; b < count; ++b) {
      const GateBlock& block = blocks[b];
      const Sum<T> sum = space(arena, block.rows, block.cols).sum[0];
      unit.gates.add(block.row, block.rows, block.col, block.cols, sum.to, sum.ld);
    }
    unit.project = space(arena, s.projected ? s.u : 0, s.p);
    unit.talk = space(arena, s.comm_heads ? s.p : 0, 2 * s.e() + s.w());
    unit.output = space(arena, s.w(), s.p);
    return unit;
  }
  // Few rows fit the panels, so units may be summed up after the last step, straight into the parameters' gradients.
  static UnitGradients<T> where_they_belong(const Problem<T>& problem, int64_t j) {
    const Sizes& s = problem.s;
    const Parameters<T>& G = problem.grad;
    const int d_q = s.heads * s.key, d_v = s.heads * s.value, gates = s.weight_gates(), p = s.p, e = s.e(), w = s.w();
    UnitGradients<T> unit;
    unit.query.add(0, p, 0, d_q, G.query + j * p * d_q, d_q);
    if (s.bias) unit.query.add(p, 1, 0, d_q, G.query_bias + j * d_q, d_q);
    unit.gates.add(0, p, 0, gates, G.weight_hh + j * p * gates, gates);
    if (s.bias) unit.gates.add(p, 1, 0, gates, G.bias_hh + j * gates, gates);
    Columns columns[2];
    const int groups = input_columns(s, columns);
    for (int g = 0; g < groups; ++g) {
      const Columns& c = columns[g];
      if (s.bias) unit.gates.add(p, 1, c.to, c.count, G.bias_ih + j * gates + c.from, gates);
      unit.gates.add(s.p1(), d_v, c.to, c.count, G.weight_ih + j * d_v * gates + c.from, gates);
    }
    if (s.projected) unit.project.add(0, s.u, 0, p, G.weight_hr + j * s.u * p, p);
    if (!s.comm_heads) return unit;
    unit.talk.add(0, p, 0, e, G.comm_key + j * p * e, e);
    unit.talk.add(0, p, e, w, G.comm_value + j * p * w, w);
    unit.talk.add(0, p, e + w, e, G.comm_query + j * p * e, e);
    unit.output.add(0, w, 0, p, G.comm_output + j * w * p, p);
    return unit;
  }
};

// What lies between parameters and right operands: a worker has one, for one unit after the other.
template <class T>
struct Dense {
  int ld_query, ld_gates;
  T *query, *gates;         // (p1, heads * S), (K, 4u)
  T *key, *value;           // [W^e | b^e] and [W^v | b^v], (heads * size, in1)
  T *packed, *result;       // temporaries
  T* talk;                  // (p, e + w + e): keys, values and queries beside each other

  Dense(const Sizes& s, Arena& arena) {
    const int in1 = s.in1(), gates_ = s.weight_gates();
    ld_query = pad<T>(s.heads * s.S()) + WIDTH<T>, ld_gates = pad<T>(s.gates()) + WIDTH<T>;
    query = arena.take<T>(int64_t(s.p1()) * ld_query);
    gates = arena.take<T>(int64_t(s.K()) * ld_gates);
    key = arena.take<T>(int64_t(s.heads) * s.key * in1 + WIDTH<T>);
    value = arena.take<T>(int64_t(s.heads) * s.value * in1 + WIDTH<T>);
    packed = arena.take<T>(most(packed_size<T>(s.value, gates_), packed_size<T>(in1, s.key), packed_size<T>(gates_, in1)) +
                           2 * int64_t(s.value) * WIDTH<T>);
    result = arena.take<T>(most(int64_t(s.p1()) * pad<T>(s.key), int64_t(s.value) * pad<T>(gates_),
                                int64_t(s.value > s.key ? s.value : s.key) * pad<T>(in1)));
    talk = arena.take<T>(int64_t(s.p) * (2 * s.e() + s.w()));
  }

 private:
  static int64_t most(int64_t a, int64_t b, int64_t c) { return a > b ? (a > c ? a : c) : (b > c ? b : c); }
};

// A unit's share of the gradients of [W^e | b^e] and [W^v | b^v], where they were multiplied out.
template <class T>
struct Share {
  T *key, *value;

  Share(const Sizes& s, Arena& arena)
      : key(arena.take<T>(s.fold_key ? int64_t(s.heads) * s.key * s.in1() : 0)),
        value(arena.take<T>(s.fold_value ? int64_t(s.heads) * s.value * s.in1() : 0)) {}
};

// [weight | bias], (rows, input) and (rows,) -> (rows, input + 1)
template <class T>
void append_bias(T* to, const T* weight, const T* bias, int rows, int input) {
  for (int r = 0; r < rows; ++r, to += input + !!bias) {
    copy(to, weight + int64_t(r) * input, input);
    if (bias) to[input] = bias[r];
  }
}

// The operands that all units share: key and value.
template <class T>
void prepare_shared(const Problem<T>& problem, Weights<T>& W, bool backward) {
  const Sizes& s = problem.s;
  const Parameters<const T>& P = problem.weight;
  const auto shared = [&](const Parts<T>& to, const Parts<T>& to_t, const T* weight, const T* bias, int rows) {
    pack(to[0], 0, s.input, weight, 1, s.input);
    if (s.bias) pack(to[0], s.input, 1, bias, 0, 1);
    if (backward) pack(to_t[0], 0, rows, weight, s.input, 1);
  };
  if (!s.fold_key) shared(W.key, W.key_t, P.key, P.key_bias, s.heads * s.key);
  if (!s.fold_value) shared(W.value, W.value_t, P.value, P.value_bias, s.heads * s.value);
}

// The operands of unit j.
template <class T>
void prepare(const Problem<T>& problem, Weights<T>& W, Dense<T>& dense, int64_t j, bool backward) {
  const Sizes& s = problem.s;
  const Parameters<const T>& P = problem.weight;
  const int d_q = s.heads * s.key, d_v = s.heads * s.value, in1 = s.in1();
  UnitWeights<T>& unit = W.unit[j];

  // Query: W^q and its bias, or both times [W^e | b^e].
  const T* query = P.query + j * s.p * d_q;
  const T* query_bias = s.bias ? P.query_bias + j * d_q : nullptr;
  if (s.fold_key) {
    append_bias(dense.key, P.key, P.key_bias, d_q, s.input);
    for (int head = 0; head < s.heads; ++head) {
      const Matrix<T> key = in_place(dense.key + int64_t(head) * s.key * in1, s.key, in1, in1);
      T* to = dense.query + head * in1;
      multiply(s.p, query + head * s.key, d_q, key, to, dense.ld_query);
      if (s.bias) multiply(1, query_bias + head * s.key, d_q, key, to + int64_t(s.p) * dense.ld_query, dense.ld_query);
    }
  } else {
    for (int r = 0; r < s.p; ++r) copy(dense.query + int64_t(r) * dense.ld_query, query + int64_t(r) * d_q, d_q);
    if (s.bias) copy(dense.query + int64_t(s.p) * dense.ld_query, query_bias, d_q);
  }
  pack(unit.query[0], 0, s.p1(), dense.query, dense.ld_query, 1);
  if (backward) pack(W.unit_t[j].query[0], 0, s.heads * s.S(), dense.query, 1, dense.ld_query);

  // Gates: W_hh, the biases, then W_ih, or W_ih times [W^v | b^v].
  const int gates = s.weight_gates();
  const int64_t ld = dense.ld_gates;
  for (int r = 0; r < s.p; ++r) copy(dense.gates + r * ld, P.weight_hh + (j * s.p + r) * gates, gates);
  Columns columns[2];
  const int groups = input_columns(s, columns);
  if (s.bias) {
    T* row = dense.gates + s.p * ld;
    copy(row, P.bias_hh + j * gates, gates);
    if (!s.lstm) zero(row + 3 * s.u, s.u);
    for (int g = 0; g < groups; ++g) add(row + columns[g].to, P.bias_ih + j * gates + columns[g].from, columns[g].count);
  }
  const T* weight_ih = P.weight_ih + j * d_v * gates;
  if (s.fold_value) append_bias(dense.value, P.value, P.value_bias, d_v, s.input);
  for (int head = 0; head < s.heads; ++head) {
    T* rows = dense.gates + (s.p1() + int64_t(head) * s.F()) * ld;
    for (int g = 0; g < groups; ++g) {
      const Columns& c = columns[g];
      const T* from = weight_ih + int64_t(head) * s.value * gates + c.from;
      if (s.fold_value) {
        const Matrix<T> part = panels(dense.packed, s.value, c.count);
        pack(part, 0, s.value, from, gates, 1);
        multiply<T, true>(in1, dense.value + int64_t(head) * s.value * in1, in1, part, rows + c.to, ld);
      } else {
        for (int r = 0; r < s.value; ++r) copy(rows + r * ld + c.to, from + int64_t(r) * gates, c.count);
      }
    }
  }
  GateBlock blocks[3];
  const int count = gate_blocks(s, blocks);
  for (int b = 0; b < count; ++b) {
    const T* from = dense.gates + blocks[b].row * ld + blocks[b].col;
    backward ? pack(W.unit_t[j].gates[b], 0, blocks[b].cols, from, 1, ld) : pack(unit.gates[b], 0, blocks[b].rows, from, ld, 1);
  }

  if (s.projected) {
    const T* from = P.weight_hr + j * s.u * s.p;
    backward ? pack(W.unit_t[j].project[0], 0, s.p, from, 1, s.p) : pack(unit.project[0], 0, s.u, from, s.p, 1);
  }
  if (s.comm_heads) {
    const int e = s.e(), w = s.w();
    const T *ask = P.comm_query + j * s.p * e, *key = P.comm_key + j * s.p * e;
    const T *value = P.comm_value + j * s.p * w, *output = P.comm_output + j * w * s.p;
    for (int r = 0; r < s.p; ++r) {  // [key | value] beside each other, in the temporary
      copy(dense.talk + int64_t(r) * (e + w), key + int64_t(r) * e, e);
      copy(dense.talk + int64_t(r) * (e + w) + e, value + int64_t(r) * w, w);
    }
    pack(unit.read[0], 0, s.p, dense.talk, e + w, 1);
    pack(unit.ask[0], 0, s.p, ask, e, 1);
    if (!backward) {
      pack(unit.output[0], 0, w, output, s.p, 1);
    } else {
      pack(W.unit_t[j].read[0], 0, e + w, dense.talk, 1, e + w);
      pack(W.unit_t[j].ask[0], 0, e, ask, 1, e);
      pack(W.unit_t[j].output[0], 0, s.p, output, 1, s.p);
    }
  }
}

// Gradients of the operands that all units share, once those of the units are there.
template <class T>
void finish_shared(const Problem<T>& problem, const Gradients<T>* blocks_of_batch, const Share<T>* of_units) {
  const Sizes& s = problem.s;
  const int in1 = s.in1();
  const auto shared = [&](T* weight, T* bias, bool folded, auto&& of_block, auto&& of_unit, int rows) {
    T* sum = blocks_of_batch[0].row;
    for (int64_t r = 0; r < rows; ++r) {
      zero(sum, in1);
      if (folded)
        for (int j = 0; j < s.n; ++j) add(sum, of_unit(of_units[j]) + r * in1, in1);
      else
        for (int b = 0; b < s.blocks; ++b) add(sum, of_block(blocks_of_batch[b]) + r * pad<T>(in1), in1);
      copy(weight + r * s.input, sum, s.input);
      if (bias) bias[r] = sum[s.input];
    }
  };
  const Parameters<T>& G = problem.grad;
  shared(G.key, G.key_bias, s.fold_key, [](const Gradients<T>& g) { return g.key.sum[0].to; }, [](const Share<T>& u) { return u.key; }, s.heads * s.key);
  shared(G.value, G.value_bias, s.fold_value, [](const Gradients<T>& g) { return g.value.sum[0].to; }, [](const Share<T>& u) { return u.value; }, s.heads * s.value);
}

// Gradients of all blocks, summed in the order of the blocks, to gradients of the parameters of unit j: prepare mirrored.
template <class T>
void finish(const Problem<T>& problem, const Gradients<T>* blocks_of_batch, Dense<T>& dense, const Share<T>& share, int64_t j) {
  const Sizes& s = problem.s;
  const Parameters<const T>& P = problem.weight;
  const Parameters<T>& G = problem.grad;
  const int d_q = s.heads * s.key, d_v = s.heads * s.value, in1 = s.in1();
  const auto total = [&](T* to, auto&& which, int rows, int cols, int64_t ld) {  // over the blocks of the batch
    for (int r = 0; r < rows; ++r) {
      copy(to + r * ld, which(blocks_of_batch[0]).to + int64_t(r) * pad<T>(cols), cols);
      for (int b = 1; b < s.blocks; ++b) add(to + r * ld, which(blocks_of_batch[b]).to + int64_t(r) * pad<T>(cols), cols);
    }
  };

  // Query.
  total(dense.query, [&](const Gradients<T>& g) { return g.unit[j].query.sum[0]; }, s.p1(), s.heads * s.S(), dense.ld_query);
  T* query = G.query + j * s.p * d_q;
  T* query_bias = s.bias ? G.query_bias + j * d_q : nullptr;
  if (s.fold_key) append_bias(dense.key, P.key, P.key_bias, d_q, s.input);
  for (int head = 0; head < s.heads; ++head) {
    const T* from = dense.query + head * s.S();
    int64_t ld = dense.ld_query;
    const Matrix<T> folded = in_place(from, s.p, in1, ld);
    if (s.fold_key) {
      const Matrix<T> key_t = panels(dense.packed, in1, s.key);
      pack(key_t, 0, in1, dense.key + int64_t(head) * s.key * in1, 1, in1);
      multiply(s.p1(), from, ld, key_t, dense.result, pad<T>(s.key));
      from = dense.result, ld = pad<T>(s.key);
    }
    for (int r = 0; r < s.p; ++r) copy(query + int64_t(r) * d_q + head * s.key, from + r * ld, s.key);
    if (s.bias) copy(query_bias + head * s.key, from + s.p * ld, s.key);
    if (s.fold_key) {
      T* key = share.key + int64_t(head) * s.key * in1;
      const int64_t ld_key = pad<T>(in1);
      multiply<T, true>(s.key, P.query + j * s.p * d_q + head * s.key, d_q, folded, dense.result, ld_key);
      for (int r = 0; r < s.key; ++r) {
        copy(key + int64_t(r) * in1, dense.result + r * ld_key, in1);
        if (s.bias) add(key + int64_t(r) * in1, folded.data + int64_t(s.p) * dense.ld_query, in1, P.query_bias[j * d_q + head * s.key + r]);
      }
    }
  }

  // Gates.
  const int gates = s.weight_gates();
  const int64_t ld = dense.ld_gates;
  GateBlock blocks[3];
  const int count = gate_blocks(s, blocks);
  for (int b = 0; b < count; ++b)
    total(dense.gates + blocks[b].row * ld + blocks[b].col, [&](const Gradients<T>& g) { return g.unit[j].gates.sum[b]; },
          blocks[b].rows, blocks[b].cols, ld);
  for (int r = 0; r < s.p; ++r) copy(G.weight_hh + (j * s.p + r) * gates, dense.gates + r * ld, gates);
  Columns columns[2];
  const int groups = input_columns(s, columns);
  if (s.bias) {
    copy(G.bias_hh + j * gates, dense.gates + s.p * ld, gates);
    for (int g = 0; g < groups; ++g)
      copy(G.bias_ih + j * gates + columns[g].from, dense.gates + s.p * ld + columns[g].to, columns[g].count);
  }
  const T* weight_ih = P.weight_ih + j * d_v * gates;
  T* grad_ih = G.weight_ih + j * d_v * gates;
  if (s.fold_value) append_bias(dense.value, P.value, P.value_bias, d_v, s.input);
  for (int head = 0; head < s.heads; ++head) {
    const T* rows = dense.gates + (s.p1() + int64_t(head) * s.F()) * ld;
    const int64_t first = int64_t(head) * s.value * gates;
    for (int g = 0; g < groups; ++g) {
      const Columns& c = columns[g];
      const T* from = rows + c.to;
      int64_t ld_from = ld;
      if (s.fold_value) {
        ld_from = pad<T>(c.count);
        multiply(s.value, dense.value + int64_t(head) * s.value * in1, in1, in_place(from, in1, c.count, ld), dense.result, ld_from);
        from = dense.result;
      }
      for (int r = 0; r < s.value; ++r) copy(grad_ih + first + int64_t(r) * gates + c.from, from + r * ld_from, c.count);
    }
    if (s.fold_value) {
      T* value = share.value + int64_t(head) * s.value * in1;
      const Matrix<T> folded_t = panels(dense.packed, gates, in1);
      for (int g = 0; g < groups; ++g) pack(folded_t, columns[g].from, columns[g].count, rows + columns[g].to, 1, ld);
      multiply(s.value, weight_ih + first, gates, folded_t, dense.result, pad<T>(in1));
      for (int r = 0; r < s.value; ++r) copy(value + int64_t(r) * in1, dense.result + int64_t(r) * pad<T>(in1), in1);
    }
  }

  if (s.projected)
    total(G.weight_hr + j * s.u * s.p, [&](const Gradients<T>& g) { return g.unit[j].project.sum[0]; }, s.u, s.p, s.p);
  if (s.comm_heads) {
    const int e = s.e(), w = s.w(), talk = 2 * e + w;
    total(dense.talk, [&](const Gradients<T>& g) { return g.unit[j].talk.sum[0]; }, s.p, talk, talk);
    for (int64_t r = 0; r < s.p; ++r) {
      const T* from = dense.talk + r * talk;
      copy(G.comm_key + (j * s.p + r) * e, from, e);
      copy(G.comm_value + (j * s.p + r) * w, from + e, w);
      copy(G.comm_query + (j * s.p + r) * e, from + e + w, e);
    }
    total(G.comm_output + j * w * s.p, [&](const Gradients<T>& g) { return g.unit[j].output.sum[0]; }, w, s.p, s.p);
  }
}

}  // namespace RIM_ISA
}  // namespace rim
