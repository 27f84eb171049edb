// Matrix products for one thread: C = A B or C += A B, B packed into panels or taken as it lies.
//
// An element of C is one sum in the order of the inner index, whatever rows are computed beside it: a batch row gets the
// same bits alone and in company.
#pragma once

#include "vec.h"

namespace rim {
namespace RIM_ISA {

constexpr int MR = RIM_TILE_ROWS;  // a tile of C held in registers: MR rows of NV vectors
constexpr int NV = RIM_TILE_VECTORS;

// The right operand, (inner, cols). Panel q starts at data + q * panel and holds up to NV vectors of each row, `ld` apart
// (`last_ld` in the last panel). Columns run on to a multiple of the vector width.
template <class T>
struct Matrix {
  const T* data;
  int inner, cols;
  int64_t panel, ld, last_ld;
};

template <class T>
constexpr int64_t packed_size(int inner, int cols) {
  return int64_t(inner) * pad<T>(cols);
}

// As it lies in memory, rows `ld` apart; every row readable up to pad(cols).
template <class T>
Matrix<T> in_place(const T* data, int inner, int cols, int64_t ld) {
  return {data, inner, cols, NV * WIDTH<T>, ld, ld};
}

// A view of storage to be filled by pack().
template <class T>
Matrix<T> panels(const T* storage, int inner, int cols) {
  constexpr int full = NV * WIDTH<T>;
  const int rest = cols % full;
  return {storage, inner, cols, int64_t(inner) * full, full, rest ? pad<T>(rest) : full};
}

// Rows [row, row + rows) of packed B from `from`, whose element (r, c) lies at r * row_step + c * col_step; zeros beyond.
template <class T>
void pack(const Matrix<T>& B, int row, int rows, const T* from, int64_t row_step, int64_t col_step, int col = 0, int cols = -1,
          bool accumulate = false) {
  T* data = const_cast<T*>(B.data);
  const int full = NV * WIDTH<T>, end = cols < 0 ? B.cols : col + cols;
  for (int first = col / full * full; first < end; first += full) {
    const bool last = first + full >= B.cols;
    const int64_t ld = last ? B.last_ld : B.ld;
    T* panel = data + int64_t(first / full) * B.panel;
    const int begin = first < col ? col - first : 0, stop = end - first < full ? end - first : full;
    for (int r = 0; r < rows; ++r) {
      T* to = panel + (row + r) * ld;
      const T* source = from + r * row_step + (first - col) * col_step;
      for (int c = begin; c < stop; ++c) to[c] = source[c * col_step] + (accumulate ? to[c] : T(0));
      if (last && end == B.cols)
        for (int c = stop; c < ld; ++c) to[c] = 0;
    }
  }
}

template <class T, int R, int N, bool BY_COLUMN>
RIM_INLINE void tile(int inner, const T* A, int64_t a_step, const T* B, int64_t ld, T* C, int64_t c_step, bool accumulate) {
  Vec<T> c[R][N];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < N; ++v) c[r][v] = accumulate ? load(C + r * c_step + v * WIDTH<T>) : Vec<T>{};
  for (int i = 0; i < inner; ++i) {
    Vec<T> b[N];
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) b[v] = load(B + i * ld + v * WIDTH<T>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec<T> a = fill<T>(BY_COLUMN ? A[i * a_step + r] : A[r * a_step + i]);
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) c[r][v] += a * b[v];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < N; ++v) store(C + r * c_step + v * WIDTH<T>, c[r][v]);
}

template <class T, int N, bool BY_COLUMN>
void tiles(int rows, int inner, const T* A, int64_t a_step, const T* B, int64_t ld, T* C, int64_t c_step, bool accumulate) {
  const int64_t next = BY_COLUMN ? 1 : a_step;
  int r = 0;
  for (; r + MR <= rows; r += MR) tile<T, MR, N, BY_COLUMN>(inner, A + r * next, a_step, B, ld, C + r * c_step, c_step, accumulate);
  A += r * next;
  C += r * c_step;
  switch (rows - r) {
#define RIM_ROWS(R) \
  case R:           \
    if constexpr (R < MR) return tile<T, R, N, BY_COLUMN>(inner, A, a_step, B, ld, C, c_step, accumulate); \
    break;
    RIM_ROWS(1) RIM_ROWS(2) RIM_ROWS(3) RIM_ROWS(4) RIM_ROWS(5) RIM_ROWS(6) RIM_ROWS(7)
    RIM_ROWS(8) RIM_ROWS(9) RIM_ROWS(10) RIM_ROWS(11) RIM_ROWS(12) RIM_ROWS(13)
#undef RIM_ROWS
  }
}

// C (rows, cols) = or += A B. Element (r, i) of A lies at r * a_step + i, or by column at i * a_step + r. Rows of C are c_step
// apart and writable up to pad(cols).
template <class T, bool BY_COLUMN = false>
void multiply(int rows, const T* A, int64_t a_step, const Matrix<T>& B, T* C, int64_t c_step, bool accumulate = false) {
  if (rows == 0) return;
  constexpr int full = NV * WIDTH<T>;
  for (int first = 0; first < B.cols; first += full) {
    const T* panel = B.data + int64_t(first / full) * B.panel;
    const int left = B.cols - first, vectors = left >= full ? NV : (left + WIDTH<T> - 1) / WIDTH<T>;
    const int64_t ld = left > full ? B.ld : B.last_ld;
    switch (vectors) {
#define RIM_VECTORS(N) \
  case N:              \
    if constexpr (N <= NV) tiles<T, N, BY_COLUMN>(rows, B.inner, A, a_step, panel, ld, C + first, c_step, accumulate); \
    break;
      RIM_VECTORS(1) RIM_VECTORS(2) RIM_VECTORS(3) RIM_VECTORS(4)
#undef RIM_VECTORS
    }
  }
}

}  // namespace RIM_ISA
}  // namespace rim
