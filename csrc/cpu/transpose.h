// Transpose of a matrix of 2-byte or 4-byte elements, at about the speed of a copy.
#pragma once
#include <cstdint>

namespace wrpo {

struct Transpose {
  const void* src;  // [rows, cols], row stride src_row_stride elements
  void* dst;        // [cols, rows], row stride dst_row_stride elements; does not overlap src
  int itemsize;     // 2 or 4 bytes
  int64_t rows, cols, src_row_stride, dst_row_stride;
  int threads;
};

}  // namespace wrpo

#define WRPO_DECLARE_TRANSPOSE(level) \
  namespace wrpo::level {             \
  void transpose(const Transpose&);   \
  }

WRPO_DECLARE_TRANSPOSE(generic)
WRPO_DECLARE_TRANSPOSE(avx2)
WRPO_DECLARE_TRANSPOSE(avx512)
