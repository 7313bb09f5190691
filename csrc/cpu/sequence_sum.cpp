#include "sequence_sum.h"

#include <algorithm>

namespace wrpo {

void sequence_sum(const float* rows, const int64_t* length, int64_t S, float* sums) {
  for (int64_t s = 0; s < S; rows += length[s++]) {
    double sum = 0;
    for (int64_t n = 0; n < length[s]; ++n) sum += double(rows[n]);
    sums[s] = float(sum);
  }
}

void over_rows(const float* values, const int64_t* length, int64_t S, float* rows) {
  for (int64_t s = 0; s < S; ++s) rows = std::fill_n(rows, length[s], values[s]);
}

void count_labels(const int64_t* labels, int64_t S, int64_t T, int64_t stride_s, int64_t stride_t, int64_t ignore_index,
                  int64_t* counts) {
  for (int64_t s = 0; s < S; ++s) {
    counts[s] = 0;
    for (int64_t t = 0; t < T; ++t) counts[s] += labels[s * stride_s + t * stride_t] != ignore_index;
  }
}

}  // namespace wrpo
