// Between rows and sequences: the N rows that count stand sequence after sequence, `length` [S] of them each.
#pragma once
#include <cstdint>

namespace wrpo {

// sums[s] = sum of the rows of sequence s, in double, in order.
void sequence_sum(const float* rows, const int64_t* length, int64_t S, float* sums);

// rows[n] = values[s] for every row n of sequence s.
void over_rows(const float* values, const int64_t* length, int64_t S, float* rows);

// counts[s] = how many of the labels [S, T], strides in elements, are not `ignore_index`.
void count_labels(const int64_t* labels, int64_t S, int64_t T, int64_t stride_s, int64_t stride_t, int64_t ignore_index,
                  int64_t* counts);

}  // namespace wrpo
