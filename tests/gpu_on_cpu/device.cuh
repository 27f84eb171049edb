// What src/rim_rnn/cusrc/device.cuh has for a GPU, for threads of a CPU: one for each of a GPU's, and real barriers.
#pragma once

extern "C" float expf(float), tanhf(float), fmaxf(float, float), fabsf(float);  // the headers take longer than the kernels

#define __device__
#define __global__
#define __grid_constant__
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
inline void add_release(unsigned* counter) { __atomic_fetch_add(counter, 1, __ATOMIC_RELEASE); }
inline unsigned load_acquire(const unsigned* counter) {
  yield_to_others();
  return __atomic_load_n(counter, __ATOMIC_ACQUIRE);
}
