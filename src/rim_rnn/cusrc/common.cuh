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
// large products: cuda.py. sizes.h is for one layer and GPU: driver.py.
#pragma once

#include "sizes.h"
#include "device.cuh"

// ---- Sizes, and what they make ----

constexpr int G = lstm ? 4 : 3;                              // gates: LSTM i f g o, GRU r z n
constexpr int C = comm_heads, dk = comm_key, dv = comm_value;
constexpr int w = C * dv, shown = C * (dk + dv), talk = C * (2 * dk + dv);  // of one head after the other: [query | key | value]
constexpr int STRIDE = threads / R;
static_assert(R % 4 == 0 && threads % R == 0, "a row for each thread, four rows in a load");

__device__ constexpr int pad4(int size) { return (size + 3) / 4 * 4; }
__device__ constexpr int some(int size) { return size ? size : 1; }     // C++ has no empty arrays
__device__ constexpr int share(int size) { return (size + STRIDE - 1) / STRIDE; }  // of one thread

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

// visit(d, x): this thread's features, and which of them it is. So many at a time: all where x is the index of an array in registers.
template <int SIZE, int AT_A_TIME = 2, class Visit>
__device__ __forceinline__ void each(Visit&& visit) {
#pragma unroll AT_A_TIME
  for (int x = 0; x < share(SIZE); ++x) {
    const int d = threadIdx.x / R + x * STRIDE;
    if (d < SIZE) visit(d, x);
  }
}
constexpr int ALL = 1 << 10;

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
