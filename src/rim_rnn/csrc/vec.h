// Vectors as wide as the instruction set has them, and exp, sigmoid and tanh on them.
//
// Included by one translation unit per instruction set, inside a namespace of its own (RIM_ISA). Nothing here or in the
// headers built on it may call an inline function of the standard library: the linker keeps one copy of those, and it
// could be the copy that needs AVX-512.
//
// Error against float64, over every float32 (tests/test_native.py samples it): exp, sigmoid and tanh within 3 units in the
// last place, in float32 and in float64, as long as the result is a normal number.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "problem.h"

namespace rim {
namespace RIM_ISA {

template <class T>
struct Simd;
template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(RIM_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(RIM_VECTOR_BYTES)));
};
template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(RIM_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(RIM_VECTOR_BYTES)));
};
template <>
struct Simd<int32_t> {
  typedef int32_t V __attribute__((vector_size(RIM_VECTOR_BYTES)));
};
template <class T>
using Vec = typename Simd<T>::V;
template <class T>
using IVec = typename Simd<T>::I;
template <class T>
constexpr int WIDTH = RIM_VECTOR_BYTES / sizeof(T);

template <class T>
constexpr int pad(int size) {
  return (size + WIDTH<T> - 1) / WIDTH<T> * WIDTH<T>;
}

template <class T>
RIM_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
RIM_INLINE void store(T* p, Vec<T> v) {
  memcpy(p, &v, sizeof v);
}
template <class T>
RIM_INLINE Vec<T> fill(T x) {
  return x - Vec<T>{};
}

// The first `left` elements where fewer than a vector are left; the others are zero, and are not written.
#if RIM_VECTOR_BYTES == 64
RIM_INLINE __mmask16 mask(int left) { return left >= 16 ? 0xffff : (1u << left) - 1; }
#define RIM_WHOLE(T) (__builtin_constant_p(left) && left == WIDTH<T>)
RIM_INLINE Vec<float> load(const float* p, int left) { return RIM_WHOLE(float) ? load(p) : (Vec<float>)_mm512_maskz_loadu_ps(mask(left), p); }
RIM_INLINE void store(float* p, Vec<float> v, int left) { RIM_WHOLE(float) ? store(p, v) : _mm512_mask_storeu_ps(p, mask(left), (__m512)v); }
RIM_INLINE Vec<double> load(const double* p, int left) { return RIM_WHOLE(double) ? load(p) : (Vec<double>)_mm512_maskz_loadu_pd(mask(left), p); }
RIM_INLINE void store(double* p, Vec<double> v, int left) { RIM_WHOLE(double) ? store(p, v) : _mm512_mask_storeu_pd(p, mask(left), (__m512d)v); }
#undef RIM_WHOLE
#elif RIM_VECTOR_BYTES == 32
RIM_INLINE __m256i mask(const float*, int left) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(left), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
RIM_INLINE __m256i mask(const double*, int left) { return _mm256_cmpgt_epi64(_mm256_set1_epi64x(left), _mm256_setr_epi64x(0, 1, 2, 3)); }
RIM_INLINE Vec<float> load(const float* p, int left) { return left >= 8 ? load(p) : (Vec<float>)_mm256_maskload_ps(p, mask(p, left)); }
RIM_INLINE void store(float* p, Vec<float> v, int left) {  // half a vector, as most sizes leave it, without a mask, which takes AMD's processors long
  left >= 8 ? store(p, v) : left == 4 ? _mm_storeu_ps(p, _mm256_castps256_ps128((__m256)v)) : _mm256_maskstore_ps(p, mask(p, left), (__m256)v);
}
RIM_INLINE Vec<double> load(const double* p, int left) { return left >= 4 ? load(p) : (Vec<double>)_mm256_maskload_pd(p, mask(p, left)); }
RIM_INLINE void store(double* p, Vec<double> v, int left) {
  left >= 4 ? store(p, v) : left == 2 ? _mm_storeu_pd(p, _mm256_castpd256_pd128((__m256d)v)) : _mm256_maskstore_pd(p, mask(p, left), (__m256d)v);
}
#else
template <class T>
RIM_INLINE Vec<T> load(const T* p, int left) {
  if (left >= WIDTH<T>) return load(p);
  Vec<T> v{};
  for (int i = 0; i < left; ++i) v[i] = p[i];
  return v;
}
template <class T>
RIM_INLINE void store(T* p, Vec<T> v, int left) {
  if (left >= WIDTH<T>) return store(p, v);
  for (int i = 0; i < left; ++i) p[i] = v[i];
}
#endif

// each(d, left) for every vector of `size` elements from 0: `left` is known to the compiler for all but a last, shorter one.
template <class T, class F>
RIM_INLINE void each_vector(int size, const F& each) {
  int d = 0;
  for (; d + WIDTH<T> <= size; d += WIDTH<T>) each(d, WIDTH<T>);
  if (d < size) each(d, size - d);
}

// The sum of the elements, always in the same order.
template <class T>
RIM_INLINE T sum(Vec<T> v) {
  typedef T Quarter __attribute__((vector_size(16)));
  constexpr int quarters = RIM_VECTOR_BYTES / 16;
  Quarter q[quarters];
  memcpy(q, &v, sizeof v);
  for (int half = quarters / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) q[i] += q[i + half];
  if constexpr (sizeof(T) == 8)
    return q[0][0] + q[0][1];
  else
    return (q[0][0] + q[0][2]) + (q[0][1] + q[0][3]);
}

// The sums of WIDTH parts of vectors, as one vector; each of the vectors has PARTS of them, one behind the other.
#if defined(__clang__)
template <class T, int PARTS = 1>
RIM_INLINE Vec<T> sums(Vec<T>* v) {
  constexpr int size = WIDTH<T> / PARTS;
  Vec<T> all{};
  for (int i = 0; i < WIDTH<T>; ++i)
    for (int lane = 0; lane < size; ++lane) all[i] += v[i / PARTS][i % PARTS * size + lane];
  return all;
}
#else
// Pairs of vectors are folded into halves, quarters, and so on.
template <class T, int PARTS = 1, int HALF = WIDTH<T> / PARTS / 2>
RIM_INLINE Vec<T> sums(Vec<T>* v) {
  IVec<T> first{}, other{}, order{};
  for (int i = 0; i < WIDTH<T>; ++i) {
    first[i] = i % (2 * HALF) < HALF ? -1 : 0;
    other[i] = first[i] ? i + HALF : i - HALF + WIDTH<T>;
    order[i] = i % PARTS * (WIDTH<T> / PARTS) + i / PARTS;
  }
  for (int i = 0; i < HALF; ++i) v[i] = (first ? v[i] : v[i + HALF]) + __builtin_shuffle(v[i], v[i + HALF], other);
  if constexpr (HALF > 1)
    return sums<T, PARTS, HALF / 2>(v);
  else
    return PARTS > 1 ? __builtin_shuffle(v[0], order) : v[0];
}
#endif

// The fewest heads of a size that fill whole vectors, where the size is a multiple of 4; else 1.
template <class T>
constexpr int TOGETHER(int size) {
  int heads = 1;
  while (size % 4 == 0 && heads * size % WIDTH<T>) heads *= 2;
  return heads;
}
// What the lanes of vector v are multiplied with where heads of SIZE lie one behind the other from the first vector on: the
// coefficient of each lane's head. SIZE 0: of one head.
template <class T, int SIZE>
RIM_INLINE Vec<T> spread(const T* coefficients, int v) {
  if constexpr (SIZE == 0 || SIZE % WIDTH<T> == 0) {
    return fill<T>(coefficients[0]);
  } else {
    IVec<T> head{};
    for (int i = 0; i < WIDTH<T>; ++i) head[i] = (v * WIDTH<T> + i) / SIZE;
    const Vec<T> of_heads = load(coefficients);
#if defined(__clang__)
    Vec<T> all{};
    for (int i = 0; i < WIDTH<T>; ++i) all[i] = of_heads[head[i]];
    return all;
#else
    return __builtin_shuffle(of_heads, head);
#endif
  }
}

template <class T>
RIM_INLINE T dot(const T* a, const T* b, int size) {
  Vec<T> total{};
  each_vector<T>(size, [&](int d, int left) { total += load(a + d, left) * load(b + d, left); });
  return sum<T>(total);
}
template <class T>
RIM_INLINE void copy(T* to, const T* from, int size) {
  each_vector<T>(size, [&](int d, int left) { store(to + d, load(from + d, left), left); });
}
// Soon to be read: nothing has been read from there for a long time, and it takes as long to come from memory.
template <class T>
RIM_INLINE void fetch(const T* from, int64_t size) {
  for (int64_t d = 0; d < size; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(from + d);
}
template <class T>
RIM_INLINE void zero(T* to, int64_t size) {
  memset(to, 0, size * sizeof(T));
}
// to += scale * from
template <class T>
RIM_INLINE void add(T* to, const T* from, int size, T scale = 1) {
  each_vector<T>(size, [&](int d, int left) { store(to + d, load(to + d, left) + scale * load(from + d, left), left); });
}

// c += a b
template <class V>
RIM_INLINE void add_product(V& c, V a, V b) {
  c += a * b;
}
#if RIM_VECTOR_BYTES == 64
// Words of two bfloat16: two products for each, summed in float32. In assembly, for only a processor that says it has this (rim.cpp)
// is given such words, and the compiler may not use it anywhere else.
RIM_INLINE void add_product(Vec<float>& c, Vec<int32_t> a, Vec<int32_t> b) { __asm__("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b)); }
RIM_INLINE Vec<int32_t> load(const int32_t* p, int) { return load(p); }  // packed, and so always whole vectors
// To the nearest bfloat16, ties to even.
RIM_INLINE Vec<int32_t> in_upper_half(Vec<float> x) {
  Vec<int32_t> bits;
  memcpy(&bits, &x, sizeof bits);
  return (x == x ? bits + 0x7fff + ((bits >> 16) & 1) : bits | 0x400000) & ~0xffff;
}
RIM_INLINE Vec<int32_t> in_lower_half(Vec<float> x) { return (in_upper_half(x) >> 16) & 0xffff; }
#endif

// exp(x) - 1 = 2^m (exp(r) - 1) + (2^m - 1) with x = m ln 2 + r and |r| <= ln(2)/2; exp(r) - 1 by its Taylor series.
// `rest` and `power` are the two factors: exp(x) = power + power * rest.
template <class T>
struct Exponent;
template <>
struct Exponent<float> {
  static constexpr float least = -87.0f, most = 88.0f, tanh_most = 10.0f, round = 12582912.0f;  // 1.5 * 2^23
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float series[] = {1.f / 5040, 1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2};
};
template <>
struct Exponent<double> {
  static constexpr double least = -708, most = 709, tanh_most = 20, round = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double series[] = {1. / 6227020800, 1. / 479001600, 1. / 39916800, 1. / 3628800, 1. / 362880, 1. / 40320,
                                      1. / 5040,       1. / 720,       1. / 120,      1. / 24,      1. / 6,      1. / 2};
};
template <class T>
RIM_INLINE void exponent(Vec<T> x, Vec<T>& rest, Vec<T>& power) {
  using E = Exponent<T>;
  const Vec<T> shifted = x * T(1.4426950408889634) + E::round, m = shifted - E::round;
  const Vec<T> r = x - m * E::ln2_high - m * E::ln2_low;
  Vec<T> series = fill<T>(E::series[0]);
  for (unsigned i = 1; i < sizeof E::series / sizeof(T); ++i) series = series * r + E::series[i];
  rest = series * r * r + r;
  IVec<T> bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + E::bias) << E::mantissa;  // the low bits of `shifted` hold m in two's complement
  memcpy(&power, &bits, sizeof power);
}
template <class T>
RIM_INLINE Vec<T> clamp(Vec<T> x, T least, T most) {  // NaN stays NaN
  x = x < least ? fill<T>(least) : x;
  return x > most ? fill<T>(most) : x;
}
// Exactly 0 and infinity beyond the range, so that a closed gate is closed, whatever it is multiplied with.
template <class T>
RIM_INLINE Vec<T> exp(Vec<T> x) {
  Vec<T> rest, power;
  exponent<T>(clamp<T>(x, Exponent<T>::least, Exponent<T>::most), rest, power);
  const Vec<T> result = x < Exponent<T>::least ? Vec<T>{} : power + power * rest;
  return x > Exponent<T>::most ? fill<T>(T(1) / T(0)) : result;
}
template <class T>
RIM_INLINE Vec<T> sigmoid(Vec<T> x) {
  return T(1) / (T(1) + exp<T>(-x));
}
// tanh(x) = (e^2x - 1) / (e^2x + 1), which keeps its relative precision near 0.
template <class T>
RIM_INLINE Vec<T> tanh(Vec<T> x) {
  Vec<T> rest, power;
  exponent<T>(clamp<T>(x, -Exponent<T>::tanh_most, Exponent<T>::tanh_most) * T(2), rest, power);
  const Vec<T> minus_one = power * rest + (power - T(1));
  return minus_one / (minus_one + T(2));
}

}  // namespace RIM_ISA
}  // namespace rim
