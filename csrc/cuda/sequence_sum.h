// Between rows and sequences, on a CUDA device: the N rows stand sequence after sequence, `length` [S] of them each.
#pragma once
#include <cstdint>

namespace wrpo::cuda {

using Stream = uintptr_t;  // cudaStream_t

struct RowsOfSequences {
  const int64_t* length;  // [S]
  int64_t S, N;           // rows from N on are not touched, whatever the lengths say
};

// sums[s] = sum of the rows of sequence s, in double, in a fixed order.
void sequence_sum(const RowsOfSequences&, const float* rows, float* sums, int device, Stream);

// rows[n] = values[s] for every row n of sequence s.
void over_rows(const RowsOfSequences&, const float* values, float* rows, int device, Stream);

}  // namespace wrpo::cuda
