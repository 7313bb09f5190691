// The operands of a product as its tiles read them: a block of b in panels, some rows of a in tiles, both in float32
// and the latter where they are if that will do. For units that are compiled once for each level.
#pragma once
#include <new>

#include "../rowmath.h"
#include "product.h"
#include "tiles.h"

namespace wrpo::WRPO_LEVEL {
namespace {

constexpr int kWidth = kVectorBytes / int(sizeof(float));
constexpr int kVectors = 3;  // of a row of a tile of c
constexpr int kColumns = kVectors * kWidth;
#if defined(__AVX512F__)
constexpr int kRows = 8;  // 24 accumulators, 3 vectors of b and an element of a: 28 of 32 registers
#else
constexpr int kRows = 4;  // 12, 3 and 1: 16 of 16
#endif
constexpr int64_t kTall = 96;  // rows of a that are copied at a time
constexpr int64_t kDeepest = 448;  // of a tile of a: 14 KiB

int64_t pieces_of(int64_t total, int64_t piece) { return (total + piece - 1) / piece; }

// Memory of one thread, kept from call to call, since new pages take longer than what is done in them.
class Room {
 public:
  Room() = default;
  Room(const Room&) = delete;
  ~Room() { ::operator delete(block_, kPage); }

  float* floats(int64_t count) {
    if (count > size_) {
      ::operator delete(block_, kPage);
      block_ = nullptr, size_ = 0;
      block_ = static_cast<float*>(::operator new(size_t(count) * sizeof(float), kPage));
      size_ = count;
    }
    return block_;
  }

 private:
  static constexpr std::align_val_t kPage{4096};
  float* block_ = nullptr;
  int64_t size_ = 0;
};

thread_local Room block_of_b, block_of_a, wide_columns;

// Calls f with the matrix's elements from (i, j) on, as what they are.
template <class F>
void with_elements(const Matrix& x, int64_t i, int64_t j, F f) {
  const int64_t first = i * x.row + j * x.col;
  if (x.dtype == Dtype::float32) return f(static_cast<const float*>(x.start) + first);
  if (x.dtype == Dtype::bfloat16) return f(static_cast<const BFloat16*>(x.start) + first);
  return f(static_cast<const Float16*>(x.start) + first);
}

template <class T>
WRPO_INLINE void widen(const T* from, int64_t count, float* to) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] = load(from[i]);
}

// panel[k * kColumns + j] = b[k, j], 0 for j >= columns

template <class T>
void pack_rows(const T* b, int64_t b_row, int64_t depth, int columns, float* panel) {
  for (int64_t k = 0; k < depth; ++k, b += b_row, panel += kColumns)
    if (columns == kColumns)
      widen(b, kColumns, panel);
    else
      for (int j = 0; j < kColumns; ++j) panel[j] = j < columns ? load(b[j]) : 0.f;
}

void pack_columns(const float* b, int64_t b_col, int64_t depth, int columns, float* panel) {
  const int64_t whole = depth / kWidth * kWidth;
  for (int j = 0; j < kColumns; j += kWidth) {
    const int width = int(lesser(columns - j, kWidth));
    const float* some = b + j * b_col;
    for (int64_t k = 0; k < whole && width == kWidth; k += kWidth)
      turn_tile(some + k, b_col, panel + k * kColumns + j, kColumns);
    for (int64_t k = width == kWidth ? whole : 0; k < depth; ++k)
      for (int i = 0; i < kWidth; ++i) panel[k * kColumns + j + i] = i < width ? some[i * b_col + k] : 0.f;
  }
}

template <class T>
void pack_columns(const T* b, int64_t b_col, int64_t depth, int columns, float* panel) {
  float* wide = wide_columns.floats(kColumns * kDeepest);
  for (int j = 0; j < columns; ++j) widen(b + j * b_col, depth, wide + j * depth);
  pack_columns(wide, depth, depth, columns, panel);
}

void pack_panel(const Matrix& b, int64_t k, int64_t j, int64_t depth, int columns, float* panel) {
  with_elements(b, k, j, [&](auto* some) {
    if (b.col == 1)
      pack_rows(some, b.row, depth, columns, panel);
    else
      pack_columns(some, b.col, depth, columns, panel);
  });
}

// Rows of a whose columns lie side by side, in tiles. A column after the other: where a_col is a multiple of the
// caches' span, as in a [n, 49152] matrix, the lines of a tile would evict each other before they are used up.
template <class T>
void pack_tiles(const T* a, int64_t a_col, int64_t rows, int64_t depth, float* packed) {
  const int64_t whole = rows / kRows * kRows;
  for (int64_t k = 0; k < depth; ++k, a += a_col, packed += kRows) {
    for (int64_t i = 0; i < whole; i += kRows) widen(a + i, kRows, packed + i * depth);
    for (int64_t i = whole; i < rows; ++i) packed[whole * depth + i - whole] = load(a[i]);
  }
}

// Rows of a: `row` apart and the elements of a row side by side; or packed, in tiles of kRows elements of a column
// after the other.
struct RowsOfA {
  const float* start;
  int64_t row;
  bool is_packed;

  RowsOfA from(int64_t m, int64_t depth) const { return {start + m * (is_packed ? depth : row), row, is_packed}; }
};

bool is_read_in_place(const Matrix& a) { return a.col == 1 && a.dtype == Dtype::float32; }

// Rows [i, i + rows) of a, columns [k, k + depth)
RowsOfA rows_of(const Matrix& a, int64_t i, int64_t k, int64_t rows, int64_t depth) {
  if (is_read_in_place(a)) return {static_cast<const float*>(a.start) + i * a.row + k, a.row, false};
  float* copy = block_of_a.floats(kTall * kDeepest);
  with_elements(a, i, k, [&](auto* some) {
    if (a.col != 1) return pack_tiles(some, a.col, rows, depth, copy);
    for (int64_t m = 0; m < rows; ++m) widen(some + m * a.row, depth, copy + m * depth);
  });
  return {copy, depth, a.col != 1};
}

}  // namespace
}  // namespace wrpo::WRPO_LEVEL
