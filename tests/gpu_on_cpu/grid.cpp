// A grid of blocks of threads, each a thread of the operating system: what a kernel compiled with the device.cuh beside it runs in.
#include <barrier>
#include <cstdlib>
#include <limits>
#include <memory>
#include <sched.h>
#include <thread>
#include <vector>

#include "device.cuh"

thread_local Index threadIdx, blockIdx, gridDim;

namespace {

struct Block {
  std::unique_ptr<float4[]> shared;
  std::barrier<> threads;
  Block(int count, int words) : shared(new float4[words]), threads(count) {
    const float none = std::numeric_limits<float>::quiet_NaN();  // nobody reads what was not written
    for (int i = 0; i < words; ++i) shared[i] = {none, none, none, none};
  }
};
struct Grid {
  int cluster;  // how many blocks have one
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::unique_ptr<std::barrier<>>> clusters;
};
thread_local Grid* grid;
thread_local std::unique_ptr<std::barrier<>::arrival_token> arrived;

std::barrier<>& own_cluster() { return *grid->clusters[blockIdx.x / grid->cluster]; }

}  // namespace

float* shared_memory() { return &grid->blocks[blockIdx.x]->shared[0].x; }
void __syncthreads() { grid->blocks[blockIdx.x]->threads.arrive_and_wait(); }
void cluster_arrive() { arrived.reset(new std::barrier<>::arrival_token(own_cluster().arrive())); }
void cluster_wait() { own_cluster().wait(std::move(*arrived)); }
const void* in_block(const void* own, int rank) {
  const auto at = static_cast<const char*>(own) - reinterpret_cast<const char*>(shared_memory());
  return reinterpret_cast<const char*>(&grid->blocks[blockIdx.x / grid->cluster * grid->cluster + rank]->shared[0].x) + at;
}
void yield_to_others() { sched_yield(); }
void give_up() { std::abort(); }

// `bytes` of shared memory for each block; of a cluster of one block where there are none.
extern "C" void launch(void (*kernel)(const void*), int blocks, int threads, int bytes, int cluster, const void* arguments) {
  Grid whole{cluster, {}, {}};
  for (int b = 0; b < blocks; ++b) whole.blocks.push_back(std::make_unique<Block>(threads, (bytes + 15) / 16));
  for (int c = 0; c < blocks / cluster; ++c) whole.clusters.push_back(std::make_unique<std::barrier<>>(threads * cluster));
  std::vector<std::thread> all;
  for (int b = 0; b < blocks; ++b)
    for (int t = 0; t < threads; ++t)
      all.emplace_back([&, b, t] {
        grid = &whole, blockIdx.x = b, threadIdx.x = t, gridDim.x = blocks;
        kernel(arguments);
      });
  for (std::thread& thread : all) thread.join();
}

#ifdef PROGRAM
// PROGRAM LIBRARY FILE: run the kernel of the library with the file's arguments, each of them two numbers: a value, or how many bytes
// of a tensor follow, and which of the two it is. Leaves the tensors in the file.
#include <dlfcn.h>

#include <cstdio>

int main(int, char** given) {
  void* library = dlopen(given[1], RTLD_NOW);
  if (!library) return std::fprintf(stderr, "%s\n", dlerror()), 2;
  std::FILE* file = std::fopen(given[2], "rb");
  std::vector<long long> words;
  std::vector<std::pair<std::unique_ptr<char[]>, size_t>> tensors;
  for (long long word[2]; std::fread(word, sizeof word, 1, file);) {
    if (word[1]) {
      tensors.emplace_back(new char[word[0]], word[0]);
      if (word[0] && !std::fread(tensors.back().first.get(), word[0], 1, file)) return 3;
    }
    words.push_back(word[1] ? reinterpret_cast<long long>(tensors.back().first.get()) : word[0]);
  }
  std::fclose(file);
  const auto kernel = reinterpret_cast<void (*)(const void*)>(dlsym(library, "run"));
  launch(kernel, int(words[0]), int(words[1]), int(words[2]), int(words[3]), &words[4]);
  file = std::fopen(given[2], "wb");
  for (const auto& [bytes, size] : tensors) std::fwrite(bytes.get(), 1, size, file);
  return std::fclose(file);
}
#endif
