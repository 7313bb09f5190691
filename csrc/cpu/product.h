// A product of matrices in float32, in blocks that stay in the caches. An element is summed by one thread, in an order
// that does not depend on their number.
#pragma once
#include <cstdint>

#include "token_logp.h"

namespace wrpo {

// Element (i, j) lies at start + i * row + j * col; one of both strides is 1.
struct Matrix {
  const void* start;
  Dtype dtype;
  int64_t row, col;
};

//   c = a b + beta c
struct Product {
  Matrix a;     // [m, k]
  Matrix b;     // [k, n]
  float* c;     // [m, n], strides (c_row, 1); overlaps neither
  int64_t m, n, k, c_row;
  float beta;   // 0: what c holds is not read
  int threads;  // at most
};

}  // namespace wrpo

#define WRPO_DECLARE_PRODUCT(level) \
  namespace wrpo::level {           \
  void product(const Product&);     \
  }

WRPO_DECLARE_PRODUCT(generic)
WRPO_DECLARE_PRODUCT(avx2)
WRPO_DECLARE_PRODUCT(avx512)
