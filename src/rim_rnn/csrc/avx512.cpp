// x86-64 with AVX-512: 64-byte vectors. Chosen at run time (rim.cpp).
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512vl,avx512dq,avx512bw"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512vl,avx512dq,avx512bw,prefer-vector-width=512")
#endif
#define RIM_ISA avx512
#define RIM_VECTOR_BYTES 64
#define RIM_TILE_ROWS 8
#define RIM_TILE_VECTORS 3
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
