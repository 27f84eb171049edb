// One call of the operator in plain pointers and sizes: what the boundary (rim.cpp) hands to the kernels (step.h).
#pragma once

#include <cstdint>

// Compiled once per instruction set, so never left to the linker to merge.
#define RIM_INLINE inline __attribute__((always_inline))

namespace rim {

// Sizes carry the symbols of the equations: n units of which k win, u and p the cell and output state of one unit.
struct Sizes {
  int n, k, u, p;
  int input, heads, key, value;                // input attention: `key` and `value` are sizes of one head
  int comm_heads, comm_key, comm_value;        // communication, likewise
  bool lstm, bias, projected, reverse;
  bool bounded;                                // communication adds room * tanh(message), not the message
  bool fold_key, fold_value;                   // multiply W^q W^e, or W^v W_ih, out first
  bool rounded;                                // gates, projection and communication multiply in bfloat16, their weight gradients do not
  bool in_place;                               // few rows: weights as they lie, none multiplied out or packed
  int blocks;                                  // batch row r belongs to block r % blocks
  int hands;                                   // threads that share a block; one in backward
  int workers;                                 // threads that prepare the weights, or bring their gradients together
  int64_t batch, steps, total;                 // total = sum of batch_sizes
  const int64_t *batch_sizes, *offsets;        // of each step: rows present, and where they start in packed order
  double input_scale, comm_scale;              // 1 / sqrt(key size)

  RIM_INLINE int p1() const { return p + bias; }          // a unit's state, and a 1 that multiplies the bias
  RIM_INLINE int in1() const { return input + bias; }
  RIM_INLINE int S() const { return fold_key ? in1() : key; }      // what a query is multiplied with, per head
  RIM_INLINE int F() const { return fold_value ? in1() : value; }  // what a_input is multiplied with, per head
  RIM_INLINE int K() const { return p1() + heads * F(); }          // a winner's operand: [h | 1 | a_input * feature]
  RIM_INLINE int gates() const { return 4 * u; }                   // LSTM: i f g o; GRU: r z, and n's part from h and from the input
  RIM_INLINE int e() const { return comm_heads * comm_key; }
  RIM_INLINE int w() const { return comm_heads * comm_value; }
  RIM_INLINE int weight_gates() const { return (lstm ? 4 : 3) * u; }
};

// The parameters of a cell, or their gradients. Null where the cell has none.
template <class P>
struct Parameters {
  P *query, *query_bias, *key, *key_bias, *value, *value_bias;
  P *weight_ih, *weight_hh, *bias_ih, *bias_hh, *weight_hr;
  P *comm_query, *comm_key, *comm_value, *comm_output;
};

// What backward needs of each winner of each step, laid out [position in packed order][winner][...]. Keys, values and
// queries of the communication are computed again, not kept.
template <class T>
struct Saved {
  int32_t* winners;  // the unit
  T* attention;      // a_input, (heads)
  T* gates;          // after their activation, (4u); for GRU r, z, n and W_hn h + b_hn
  T* cell;           // c before the step, (u); LSTM only
  T* state;          // h~, (p)
  T* squashed;       // tanh(message), (p); bounded only
  T* probabilities;  // of the communication; per step and row (n, k * comm_heads)

  RIM_INLINE static int64_t size(const Sizes& s) {
    return s.total * s.k * (s.heads + s.gates() + (s.lstm ? s.u : 0) + (s.bounded ? 2 : 1) * int64_t(s.p) + int64_t(s.comm_heads) * s.n);
  }
  RIM_INLINE static Saved in(T* storage, int32_t* winners, const Sizes& s) {
    const int64_t count = s.total * s.k;
    Saved saved{winners, storage, nullptr, nullptr, nullptr, nullptr, nullptr};
    saved.gates = saved.attention + count * s.heads;
    saved.cell = saved.gates + count * s.gates();
    saved.state = saved.cell + (s.lstm ? count * s.u : 0);
    saved.squashed = saved.state + count * s.p;
    saved.probabilities = saved.squashed + (s.bounded ? count * s.p : 0);
    return saved;
  }
};

template <class T>
struct Problem {
  Sizes s;
  const T *input, *h, *c;
  Parameters<const T> weight;
  const T *keep_input, *keep_comm;  // dropout: what to scale probabilities with, (total, n, heads), (total, comm_heads, n, n); or null
  T *output, *last_h, *last_c;  // read by backward
  bool save;
  Saved<T> saved;
  // Backward only. Null gradients of results count as zero; a null grad_input is not wanted.
  const T *grad_output, *grad_last_h, *grad_last_c;
  T *grad_input, *grad_h, *grad_c;
  Parameters<T> grad;
};

constexpr int MOST_IN_PLACE = 255;  // rows of all steps: panels hold them, so that weight gradients are summed up once, at the end
constexpr int PHASES = 5;  // of a step of forward: step.h

// The kernels of one instruction set. Tasks may run on several threads; those of one call end before those of the next begin.
template <class T>
struct Kernels {
  int64_t (*setup)(const Problem<T>&, void* storage, bool backward);  // bytes of storage; lays it out where it is not null
  void (*prepare)(void* storage, int worker);                         // workers 0 to workers - 1
  void (*forward)(void* storage, int task, int64_t from, int64_t to);  // tasks 0 to blocks * hands - 1; phases of all steps
  void (*backward)(void* storage, int block);                         // blocks 0 to blocks - 1
  void (*finish)(void* storage, int worker);                          // workers 0 to workers - 1, then `workers`
};

namespace baseline {
template <class T>
Kernels<T> kernels();
}
#if defined(__x86_64__)
namespace avx2 {
template <class T>
Kernels<T> kernels();
}
namespace avx512 {
template <class T>
Kernels<T> kernels();
}
#endif

}  // namespace rim
