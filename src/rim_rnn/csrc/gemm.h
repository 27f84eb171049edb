// Matrix products for one thread: C = A B or C += A B, B packed into panels or taken as it lies.
//
// An element of C is one sum in an order of its own, whatever rows are computed beside it: a batch row gets the same bits
// alone and in company.
#pragma once

#include "vec.h"

namespace rim {
namespace RIM_ISA {

constexpr int MR = RIM_TILE_ROWS;  // a tile of C held in registers: MR rows of NV vectors
constexpr int NV = RIM_TILE_VECTORS;

// The right operand, (inner, cols). Panel q starts at data + q * panel and holds up to NV vectors of each row, `ld` apart
// (`last_ld` in the last panel). Packed, columns run on to a multiple of the vector width. Rounded, it is packed as words of two
// bfloat16, those of rows i and i + half(inner). Or, by columns, column c lies at data + c * ld.
enum Form { PACKED, ROUNDED, BY_ROWS, BY_COLUMNS };
template <class T>
struct Matrix {
  const T* data;
  int inner, cols;
  int64_t panel, ld, last_ld;
  Form form;
};

template <class T>
constexpr int64_t packed_size(int inner, int cols) {
  return int64_t(inner) * pad<T>(cols);
}
template <class T>
constexpr bool ROUNDS = RIM_VECTOR_BYTES == 64 && sizeof(T) == 4;
template <class F>
constexpr bool IN_WORDS = false;
template <>
constexpr bool IN_WORDS<int32_t> = true;
constexpr int half(int inner) { return (inner + 1) / 2; }

// As it lies in memory, rows `ld` apart. Nothing beyond `cols` is read, nor written to the product.
template <class T>
Matrix<T> in_place(const T* data, int inner, int cols, int64_t ld) {
  return {data, inner, cols, NV * WIDTH<T>, ld, ld, BY_ROWS};
}

// The transpose of what lies in memory, its rows `ld` apart.
template <class T>
Matrix<T> transposed(const T* data, int inner, int cols, int64_t ld) {
  return {data, inner, cols, 0, ld, ld, BY_COLUMNS};
}

// A view of storage to be filled by pack().
template <class T>
Matrix<T> panels(const T* storage, int inner, int cols, bool rounded = false) {
  constexpr int full = NV * WIDTH<T>;
  const int rest = cols % full;
  return {storage, inner, cols, int64_t(rounded ? half(inner) : inner) * full, full, rest ? pad<T>(rest) : full, rounded ? ROUNDED : PACKED};
}

// Rows [row, row + rows) of packed B from `from`, whose element (r, c) lies at r * row_step + c * col_step; zeros beyond.
template <class T>
void pack(const Matrix<T>& B, int row, int rows, const T* from, int64_t row_step, int64_t col_step) {
  if constexpr (ROUNDS<T>)
    if (B.form == ROUNDED) return pack_rounded(B, from, row_step, col_step);
  constexpr int full = NV * WIDTH<T>;
  for (int first = 0; first < B.cols; first += full) {
    const int left = B.cols - first, count = left < full ? left : full;
    const int64_t ld = left > full ? B.ld : B.last_ld;
    T* to = const_cast<T*>(B.data) + int64_t(first / full) * B.panel + row * ld;
    for (int r = 0; r < rows; ++r, to += ld) {
      const T* source = from + r * row_step + first * col_step;
      for (int c = 0; c < count; ++c) to[c] = source[c * col_step];
      for (int c = count; c < ld; ++c) to[c] = 0;
    }
  }
}

// A tile of C, N vectors wide; unless it is WHOLE, only `last` elements of the last vector are there. F: numbers, or
// words of two, always whole.
template <class F, class T, int R, int N, bool BY_COLUMN, bool WHOLE>
RIM_INLINE void tile(int inner, const F* A, int64_t a_step, const F* B, int64_t ld, T* C, int64_t c_step, bool accumulate, int last) {
  constexpr int full = WHOLE ? N : N - 1;
  Vec<T> c[R][N];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < N; ++v) {
      const T* from = C + r * c_step + v * WIDTH<T>;
      c[r][v] = !accumulate ? Vec<T>{} : v < full ? load(from) : load(from, last);
    }
  for (int i = 0; i < inner; ++i) {
    Vec<F> b[N];
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) b[v] = v < full ? load(B + i * ld + v * WIDTH<T>) : load(B + i * ld + v * WIDTH<T>, last);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec<F> a = fill<F>(BY_COLUMN ? A[i * a_step + r] : A[r * a_step + i]);
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) add_product(c[r][v], a, b[v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < N; ++v) {
      T* to = C + r * c_step + v * WIDTH<T>;
      v < full ? store(to, c[r][v]) : store(to, c[r][v], last);
    }
}

template <class F, class T, int N, bool BY_COLUMN, bool WHOLE>
void tiles(int rows, int inner, const F* A, int64_t a_step, const F* B, int64_t ld, T* C, int64_t c_step, bool accumulate, int last) {
  const int64_t next = BY_COLUMN ? 1 : a_step;
  int r = 0;
  for (; r + MR <= rows; r += MR)
    tile<F, T, MR, N, BY_COLUMN, WHOLE>(inner, A + r * next, a_step, B, ld, C + r * c_step, c_step, accumulate, last);
  A += r * next;
  C += r * c_step;
  switch (rows - r) {
#define RIM_ROWS(R) \
  case R:           \
    if constexpr (R < MR) return tile<F, T, R, N, BY_COLUMN, WHOLE>(inner, A, a_step, B, ld, C, c_step, accumulate, last); \
    break;
    RIM_ROWS(1) RIM_ROWS(2) RIM_ROWS(3) RIM_ROWS(4) RIM_ROWS(5) RIM_ROWS(6) RIM_ROWS(7)
    RIM_ROWS(8) RIM_ROWS(9) RIM_ROWS(10) RIM_ROWS(11) RIM_ROWS(12) RIM_ROWS(13)
#undef RIM_ROWS
  }
}

// R rows of C = or += A B with B by columns: dot products, a vector of columns at a time.
template <class T, int R>
void columns(const T* A, int64_t a_step, const Matrix<T>& B, T* C, int64_t c_step, bool accumulate) {
  constexpr int together = WIDTH<T> < 4 ? WIDTH<T> : 4;
  for (int first = 0; first < B.cols; first += WIDTH<T>) {
    const int left = B.cols - first;
    Vec<T> products[R][WIDTH<T>];
    for (int begin = 0; begin < WIDTH<T>; begin += together) {
      const T* column[together];
      for (int c = 0; c < together; ++c) column[c] = B.data + (begin + c < left ? first + begin + c : 0) * B.ld;
      Vec<T> total[R][together] = {};
      each_vector<T>(B.inner, [&](int i, int left_) {
        Vec<T> b[together];
#pragma GCC unroll 4
        for (int c = 0; c < together; ++c) b[c] = load(column[c] + i, left_);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const Vec<T> a = load(A + r * a_step + i, left_);
#pragma GCC unroll 4
          for (int c = 0; c < together; ++c) total[r][c] += a * b[c];
        }
      });
      for (int r = 0; r < R; ++r)
        for (int c = 0; c < together; ++c) products[r][begin + c] = total[r][c];
    }
    for (int r = 0; r < R; ++r) {
      T* to = C + r * c_step + first;
      const Vec<T> total = sums<T>(products[r]);
      store(to, accumulate ? load(to, left) + total : total, left);
    }
  }
}
template <class T>
void multiply_columns(int rows, const T* A, int64_t a_step, const Matrix<T>& B, T* C, int64_t c_step, bool accumulate) {
  for (; rows >= 4; rows -= 4, A += 4 * a_step, C += 4 * c_step) columns<T, 4>(A, a_step, B, C, c_step, accumulate);
  for (; rows > 0; --rows, A += a_step, C += c_step) columns<T, 1>(A, a_step, B, C, c_step, accumulate);
}

// Rows [from, from + inner) of B, which lies in panels, with A.
template <class F, bool BY_COLUMN, class T>
void multiply_panels(int rows, int inner, const F* A, int64_t a_step, const Matrix<T>& B, int from, T* C, int64_t c_step, bool accumulate) {
  constexpr int full = NV * WIDTH<T>;
  for (int first = 0; first < B.cols; first += full) {
    const int left = B.cols - first, vectors = left >= full ? NV : (left + WIDTH<T> - 1) / WIDTH<T>;
    const int64_t ld = left > full ? B.ld : B.last_ld;
    const int last = left - (vectors - 1) * WIDTH<T>;  // WIDTH or more: the last vector is whole
    const F* panel = reinterpret_cast<const F*>(B.data + int64_t(first / full) * B.panel + from * ld);
    const bool whole = B.form != BY_ROWS || last >= WIDTH<T>;
    switch (vectors) {
#define RIM_VECTORS(N)                                                                                                          \
  case N:                                                                                                                       \
    if constexpr (N <= NV)                                                                                                      \
      (whole ? tiles<F, T, N, BY_COLUMN, true> : tiles<F, T, N, BY_COLUMN, IN_WORDS<F>>)(rows, inner, A, a_step, panel, ld, C + first, c_step, accumulate, last); \
    break;
      RIM_VECTORS(1) RIM_VECTORS(2) RIM_VECTORS(3) RIM_VECTORS(4)
#undef RIM_VECTORS
    }
  }
}

#if RIM_VECTOR_BYTES == 64
// pack() of all rows where B is rounded: row r and, if there is one, row r + half(inner).
inline void pack_rounded(const Matrix<float>& B, const float* from, int64_t row_step, int64_t col_step) {
  constexpr int full = NV * WIDTH<float>;
  const int apart = half(B.inner);
  const auto part = [&](int r, int c) {
    Vec<float> values{};
    for (int lane = 0; lane < WIDTH<float> && c + lane < B.cols && r < B.inner; ++lane) values[lane] = from[r * row_step + (c + lane) * col_step];
    return values;
  };
  for (int first = 0; first < B.cols; first += full) {
    const int64_t ld = B.cols - first > full ? B.ld : B.last_ld;
    int32_t* to = reinterpret_cast<int32_t*>(const_cast<float*>(B.data)) + int64_t(first / full) * B.panel;
    for (int r = 0; r < apart; ++r, to += ld)
      for (int c = 0; c < ld; c += WIDTH<float>) store(to + c, in_lower_half(part(r, first + c)) | in_upper_half(part(r + apart, first + c)));
  }
}
// A with rounded B: A is rounded piece by piece.
inline void multiply_rounded(int rows, const float* A, int64_t a_step, const Matrix<float>& B, float* C, int64_t c_step, bool accumulate) {
  constexpr int together = 4 * MR, most = 128;  // rows and words of a piece: 16 KB
  int32_t piece[together][most];
  const int apart = half(B.inner), above = B.inner - apart;
  for (int r = 0; r < rows; r += together) {
    const int count = rows - r < together ? rows - r : together;
    for (int from = 0; from < apart; from += most) {
      const int inner = apart - from < most ? apart - from : most;
      for (int i = 0; i < count; ++i)
        for (int w = 0; w < inner; w += WIDTH<float>) {
          const float* a = A + (r + i) * a_step + from + w;
          const int left = above - from - w;
          store(&piece[i][w], in_lower_half(load(a, inner - w)) | in_upper_half(load(a + apart, left > 0 ? left : 0)));
        }
      multiply_panels<int32_t, false>(count, inner, &piece[0][0], most, B, from, C + r * c_step, c_step, accumulate || from > 0);
    }
  }
}
#endif

// C (rows, cols) = or += A B. Element (r, i) of A lies at r * a_step + i, or by column at i * a_step + r. Rows of C are c_step
// apart and, where B is packed, writable up to pad(cols).
template <class T, bool BY_COLUMN = false>
void multiply(int rows, const T* A, int64_t a_step, const Matrix<T>& B, T* C, int64_t c_step, bool accumulate = false) {
  if (rows == 0) return;
  if (B.form == BY_COLUMNS) return multiply_columns(rows, A, a_step, B, C, c_step, accumulate);
  if constexpr (ROUNDS<T> && !BY_COLUMN)
    if (B.form == ROUNDED) return multiply_rounded(rows, A, a_step, B, C, c_step, accumulate);
  multiply_panels<T, BY_COLUMN>(rows, B.inner, A, a_step, B, 0, C, c_step, accumulate);
}

// A right operand in parts: A's columns from `from` meet B and make C's columns from `to`.
template <class T>
struct Part {
  int from, to;
  bool accumulate;
  Matrix<T> B;
};
template <class T>
struct Parts {
  int count = 0;
  Part<T> part[6];

  void add(int from, int to, bool accumulate, const Matrix<T>& B) { part[count++] = {from, to, accumulate, B}; }
  const Matrix<T>& operator[](int i) const { return part[i].B; }
};
template <class T>
void multiply(int rows, const T* A, int64_t a_step, const Parts<T>& parts, T* C, int64_t c_step, bool accumulate = false) {
  for (int i = 0; i < parts.count; ++i) {
    const Part<T>& part = parts.part[i];
    multiply(rows, A + part.from, a_step, part.B, C + part.to, c_step, accumulate || part.accumulate);
  }
}

}  // namespace RIM_ISA
}  // namespace rim
