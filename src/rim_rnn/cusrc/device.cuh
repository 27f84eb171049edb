// What the kernels ask of a GPU beyond plain C++. The tests have the same names for threads of a CPU.
#pragma once

__device__ __forceinline__ float* shared_memory() {
  extern __shared__ float4 pool[];
  return reinterpret_cast<float*>(pool);
}

// A load of what nobody writes while the kernel runs, and one of what another block has written.
__device__ __forceinline__ float4 load_constant(const float* from) { return __ldg(reinterpret_cast<const float4*>(from)); }
__device__ __forceinline__ float load_fresh(const float* from) { return __ldcg(from); }

// Of a cluster: all threads of its blocks meet, in two halves, and one's shared memory is seen by all.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
template <class T>
__device__ __forceinline__ const T* in_block(const T* own, int rank) {
  const T* theirs;
  asm("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(own), "r"(rank));
  return theirs;
}

// Of blocks that are no cluster: a counter in global memory. What a thread saw before it adds, one that reads it sees.
__device__ __forceinline__ void add_release(unsigned* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
__device__ __forceinline__ unsigned load_acquire(const unsigned* counter) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}
__device__ __forceinline__ void give_up() { __trap(); }
