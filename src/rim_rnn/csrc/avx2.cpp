// x86-64 with AVX2: 32-byte vectors. Chosen at run time (rim.cpp).
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define RIM_ISA avx2
#define RIM_VECTOR_BYTES 32
#define RIM_TILE_ROWS 6
#define RIM_TILE_VECTORS 2
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
