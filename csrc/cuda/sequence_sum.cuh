// One block a sequence; it first adds up the lengths before its own.
#pragma once
#include "block.h"
#include "sequence_sum.h"

namespace wrpo::cuda {

constexpr int kSequenceThreads = 128;

struct Range {
  int64_t first, last;
};

template <class X>
struct Add {
  WRPO_BODY X operator()(X a, X b) const { return a + b; }
};

template <class Block>
WRPO_BODY Range rows_of_sequence(Block block, int64_t s, const RowsOfSequences& a, int64_t* counts) {
  const int64_t first = block.reduced(counts, Add<int64_t>{}, [&](int t) {
    int64_t count = 0;
    for (int64_t i = t; i < s; i += Block::kThreads) count += a.length[i] > 0 ? a.length[i] : 0;
    return count;
  });
  const int64_t length = a.length[s] > 0 ? a.length[s] : 0;
  return {first < a.N ? first : a.N, length < a.N - first ? first + length : a.N};
}

template <class Block>
WRPO_BODY void sequence_sum_body(Block block, int64_t s, const RowsOfSequences& a, const float* rows, float* sums,
                                 int64_t* counts, double* partial) {
  const Range of = rows_of_sequence(block, s, a, counts);
  const double sum = block.reduced(partial, Add<double>{}, [&](int t) {
    double part = 0;
    for (int64_t n = of.first + t; n < of.last; n += Block::kThreads) part += double(rows[n]);
    return part;
  });
  block.one([&] { sums[s] = float(sum); });
}

template <class Block>
WRPO_BODY void over_rows_body(Block block, int64_t s, const RowsOfSequences& a, const float* values, float* rows,
                              int64_t* counts) {
  const Range of = rows_of_sequence(block, s, a, counts);
  const float value = values[s];
  block.each([&](int t) {
    for (int64_t n = of.first + t; n < of.last; n += Block::kThreads) rows[n] = value;
  });
}

}  // namespace wrpo::cuda
