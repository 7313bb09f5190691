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

}  // namespace wrpo
