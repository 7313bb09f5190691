// Compiled once for each level; the build defines WRPO_LEVEL as its name and sets the instruction set.
//
// A block of rows is first copied side by side into L2, in long runs; its tiles are then turned in registers and
// written in runs of half a kilobyte. Reading tiles straight from the matrix is twice as slow: where the row stride is
// a multiple of the cache's span, as in a [n, 65536] matrix, the rows of a block evict each other before a line is
// used up ([1024, 8192] bfloat16 of [1024, 65536], one core: 2.7 ms against 4.9; a copy takes 1.6; 2026-11-23).
#include "transpose.h"

#include <cstring>

#include "tiles.h"

namespace wrpo::WRPO_LEVEL {
namespace {

constexpr int kBlockBytes = 512;  // a side of a block

template <class T>
void turn_block(const T* src, int64_t src_stride, T* dst, int64_t dst_stride, int64_t rows, int64_t cols) {
  constexpr int n = kTile<T>, side = kBlockBytes / sizeof(T), stride = side + 64 / sizeof(T);  // an odd number of lines
  alignas(64) T block[side * stride];
  for (int64_t r = 0; r < rows; ++r) std::memcpy(block + r * stride, src + r * src_stride, size_t(cols) * sizeof(T));
  for (int64_t c = 0; c < cols; c += n)
    for (int64_t r = 0; r < rows; r += n) {
      const T* from = block + r * stride + c;
      T* to = dst + c * dst_stride + r;
      if (rows - r >= n && cols - c >= n)
        turn_tile(from, stride, to, dst_stride);
      else
        turn_part_of_tile(from, stride, to, dst_stride, lesser(rows - r, n), lesser(cols - c, n));
    }
}

template <class T>
void turn(const Transpose& a) {
  constexpr int64_t side = kBlockBytes / sizeof(T);
  const T* src = static_cast<const T*>(a.src);
  T* dst = static_cast<T*>(a.dst);
  const int64_t down = (a.rows + side - 1) / side, across = (a.cols + side - 1) / side;
#pragma omp parallel for schedule(static) num_threads(a.threads)
  for (int64_t b = 0; b < down * across; ++b) {
    const int64_t r = b % down * side, c = b / down * side;
    turn_block(src + r * a.src_row_stride + c, a.src_row_stride, dst + c * a.dst_row_stride + r, a.dst_row_stride,
               lesser(a.rows - r, side), lesser(a.cols - c, side));
  }
}

}  // namespace

void transpose(const Transpose& a) { a.itemsize == 2 ? turn<uint16_t>(a) : turn<uint32_t>(a); }

}  // namespace wrpo::WRPO_LEVEL
