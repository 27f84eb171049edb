// What src/rim_rnn/cusrc/device.cuh has for a GPU, for threads of a CPU: one for each of a GPU's, and real barriers.
#pragma once

#include <atomic>
#include <cmath>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(threads)

struct alignas(16) float4 {
  float x, y, z, w;
};
struct Index {
  int x;
};
extern thread_local Index threadIdx, blockIdx, gridDim;

float* shared_memory();
void __syncthreads();
void cluster_arrive();
void cluster_wait();
const void* in_block(const void* own, int rank);
void yield_to_others();
[[noreturn]] void give_up();

inline float4 load_constant(const float* from) { return *reinterpret_cast<const float4*>(from); }
inline float load_fresh(const float* from) { return *from; }
template <class T>
const T* in_block(const T* own, int rank) {
  return static_cast<const T*>(in_block(static_cast<const void*>(own), rank));
}
inline void add_release(unsigned* counter) { reinterpret_cast<std::atomic<unsigned>*>(counter)->fetch_add(1, std::memory_order_release); }
inline unsigned load_acquire(const unsigned* counter) {
  yield_to_others();
  return reinterpret_cast<const std::atomic<unsigned>*>(counter)->load(std::memory_order_acquire);
}
