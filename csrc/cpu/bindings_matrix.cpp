// Of wrpo_kernels._cpu: what multiplies and moves matrices.
#include <algorithm>

#include "bindings.h"
#include "simd.h"

namespace {

// transpose

void transpose(Pointer src, int itemsize, int64_t rows, int64_t cols, int64_t src_row_stride, Pointer dst,
               int64_t dst_row_stride, int threads) {
  require(itemsize == 2 || itemsize == 4, "itemsize", "2 or 4", itemsize);
  if (rows <= 0 || cols <= 0) return;
  require_present({{"src", src}, {"dst", dst}});
  wrpo::level_in_use().transpose({as<const void>(src), as<void>(dst), itemsize, rows, cols, src_row_stride,
                                  dst_row_stride, usable_threads(threads, rows * cols)});
}

// product

wrpo::Matrix matrix_args(const char* name, Pointer start, int dtype, int64_t row, int64_t col) {
  require_present({{name, start}});
  require(dtype >= 0 && dtype <= 2, "dtype", "0 (float32), 1 (bfloat16) or 2 (float16)", dtype);
  require(row == 1 || col == 1, name, "a stride that is 1", std::min(row, col));
  return {as<const void>(start), wrpo::Dtype(dtype), row, col};
}

void product(Pointer a, int a_dtype, int64_t a_row, int64_t a_col, Pointer b, int b_dtype, int64_t b_row, int64_t b_col,
             Pointer c, int64_t c_row, int64_t m, int64_t n, int64_t k, double beta, int threads) {
  if (m <= 0 || n <= 0) return;
  require(k >= 1, "k", "at least 1", k);
  require_present({{"c", c}});
  wrpo::level_in_use().product({matrix_args("a", a, a_dtype, a_row, a_col), matrix_args("b", b, b_dtype, b_row, b_col),
                                as<float>(c), m, n, k, c_row, float(beta), usable_threads(threads, m * n)});
}

}  // namespace

void add_matrix_functions(py::module_& m) {
  m.def("transpose", &transpose, Unlocked(), "src"_a, "itemsize"_a, "rows"_a, "cols"_a, "src_row_stride"_a, "dst"_a,
        "dst_row_stride"_a, "threads"_a, "dst[c, r] = src[r, c]");
  m.def("product", &product, Unlocked(), "a"_a, "a_dtype"_a, "a_row"_a, "a_col"_a, "b"_a, "b_dtype"_a, "b_row"_a,
        "b_col"_a, "c"_a, "c_row"_a, "m"_a, "n"_a, "k"_a, "beta"_a, "threads"_a,
        "c [m, n] = a [m, k] b [k, n] + beta c, in float32; one stride of a and one of b is 1");
}
