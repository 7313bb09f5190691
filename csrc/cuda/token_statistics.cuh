// The bodies of the kernels of statistics, on the loops of those of token_logp: a row is read once, in the same order,
// so that its log-prob has the same bits.
#pragma once
#include "token_logp.cuh"
#include "token_statistics.h"

namespace wrpo::cuda {

constexpr int kNoColumn = 0x7fffffff;

// Of the scores that a thread has seen. With r the score relative to sum.top, base 2, and S = sum.sum the entropy is
// log2 S - first / S; `top` is at most 2^kStale below the largest, so little cancels.
struct Statistics {
  Sum sum;
  float first;    // sum_v r 2^r
  float squares;  // sum_v 4^r
  float scores;   // their sum, capped, before the multiplier
  float highest;  // capped
  int column;     // the first of the highest
  unsigned wanted;
};

WRPO_BODY Statistics no_statistics(unsigned wanted) { return {Sum{}, 0.f, 0.f, 0.f, -kInf, kNoColumn, wanted}; }

// Relative to another reference.
WRPO_BODY Statistics at_reference(Statistics a, float top, float multiplier) {
  if (a.sum.top != top && a.sum.sum != 0.f) {
    const float by = not_below((a.sum.top - top) * multiplier, kLeastLog2), share = pow2(by);
    a.first = share * (a.first + by * a.sum.sum);
    a.squares *= share * share;
  }
  a.sum = {top, moved(a.sum, top, multiplier)};
  return a;
}

WRPO_BODY void see_column(Statistics& a, float score, int column) {
  if (score == a.highest && column > a.column) return;
  a.highest = score, a.column = column;
}

WRPO_BODY Statistics merged(Statistics a, Statistics b, float multiplier) {
  const Sum sum = merged(a.sum, b.sum, multiplier);
  a = at_reference(a, sum.top, multiplier), b = at_reference(b, sum.top, multiplier);
  if (b.highest >= a.highest) see_column(a, b.highest, b.column);
  return {sum, a.first + b.first, a.squares + b.squares, a.scores + b.scores, a.highest, a.column, a.wanted};
}

// As `add` of a Sum. A flag is asked once for a pack, of all threads alike.
template <bool has_label, class S, int size>
WRPO_BODY void add(const S& row, Statistics& a, Floats<size> y, int first, int label = -1) {
  const float max = row.template cap_all<has_label>(y, label);
  a = at_reference(a, row.reference(a.sum, max), row.multiplier);
  Floats<size> r, e;
  WRPO_UNROLL
  for (int j = 0; j < size; ++j) {
    const bool counts = !has_label || j != label;
    r.of[j] = row.relative(y.of[j], a.sum.top);
    e.of[j] = counts ? pow2(r.of[j]) : 0.f;
    if (counts) a.sum.sum += e.of[j];
  }
  if (a.wanted & kWantsEntropy) {
    WRPO_UNROLL
    for (int j = 0; j < size; ++j) a.first = fused(e.of[j], not_below(r.of[j], kLeastLog2), a.first);
  }
  if (a.wanted & kWantsLogSumSqProbs) {
    WRPO_UNROLL
    for (int j = 0; j < size; ++j) a.squares = fused(e.of[j], e.of[j], a.squares);
  }
  if (a.wanted & kWantsMeanLogits) {
    WRPO_UNROLL
    for (int j = 0; j < size; ++j)
      if (!has_label || j != label) a.scores += y.of[j];
  }
  if ((a.wanted & kWantsTop1) && max >= a.highest) {  // of few packs: a row's maximum moves log V times
    int column = kNoColumn;
    WRPO_UNROLL
    for (int j = size - 1; j >= 0; --j)
      if ((!has_label || j != label) && y.of[j] == max) column = first + j;
    see_column(a, max, column);
  }
}

template <class S, class Block>
WRPO_BODY void token_statistics_body(Block block, int64_t n, const Rows& a, unsigned wanted, float* values,
                                     int64_t* top1, Statistics* partial) {
  values += n * kStatistics;
  const int64_t y = a.target[n];
  if (y == a.ignore_index) {
    block.one([&] {
      for (int k = 0; k < kStatistics; ++k) values[k] = 0.f;
      top1[n] = -1;
    });
    return;
  }
  const S row(a, n);
  const Cut<typename S::T> cut(row.x, a.V);
  Pack<typename S::T>* nothing = nullptr;
  Statistics others = sum_of_others(block, row, cut, y, no_statistics(wanted), partial, nothing, 0);
  const float linear_target = linear_or_nan(row, y, a.V);
  const Parts parts = with_label(row, others.sum, linear_target);
  others = at_reference(others, parts.top, row.multiplier);
  block.one([&] {
    const Halves lse = lse_of(parts, row.multiplier);
    const double mine = parts.mine, sum = parts.mine + parts.rest, log2_sum = log2(sum);
    const double first = others.first + mine * not_below(parts.relative, kLeastLog2);
    const float score = row.capped(linear_target).value;
    const double mean = (double(others.scores) + score) * double(row.multiplier) * kLn2 / a.V;
    values[kLogp] = logp_of(parts), values[kLse] = lse.high, values[kLseRest] = lse.low;
    values[kEntropy] = wanted & kWantsEntropy ? float((log2_sum - first / sum) * kLn2) : 0.f;
    values[kMeanLogits] = wanted & kWantsMeanLogits ? float(mean) : 0.f;
    values[kLogSumSqProbs] =
        wanted & kWantsLogSumSqProbs ? float((log2(others.squares + mine * mine) - 2 * log2_sum) * kLn2) : 0.f;
    if (score >= others.highest) see_column(others, score, int(y));
    const bool has_top1 = (wanted & kWantsTop1) && y >= 0 && y < a.V;
    top1[n] = !has_top1 ? -1 : others.column < a.V ? others.column : a.V - 1;  // the last where all are NaN
  });
}

template <class S, class Block>
WRPO_BODY void token_statistics_grad_body(Block block, int64_t n, const Rows& a, const float* values, const float* coef,
                                          Sum* partial) {
  using T = typename S::T;
  T* x = static_cast<T*>(a.logits) + n * a.row_stride;
  const int64_t y = a.target[n];
  if (y == a.ignore_index) return fill(block, x, a.V, 0.f);
  values += n * kStatistics, coef += n * kStatistics;
  const S row(a, n);
  const Cut<T> cut(row.x, a.V);
  const float linear_target = linear_or_nan(row, y, a.V);
  block.each([](int) {});  // every thread has read the target's logit before any overwrites it
  const Halves lse{values[kLse], values[kLseRest]};
  const Total total = total_of(block, row, cut, y, linear_target, values[kLogp], lse, partial);
  const auto terms = statistics_gradient(values, coef, a.V, double(a.slope)).template as<float>();
  const float of_label = terms.at_label(values[kLogp], total.missing, row.capped(linear_target).slope);
  const float top = total.sum.top, scale = 1.f / total.sum.sum, log2_sum = float(log2(double(total.sum.sum)));
  const Pack<T>* nothing = nullptr;
  each_score(block, row, cut, y, of_label, x, nothing, 0, [&](auto z) {
    WRPO_UNROLL
    for (float& score : z.of) {
      const Tanh t = row.capped(score);
      const float r = row.relative(t.value, top);
      score = terms(scale * pow2(r), not_below(r - log2_sum, kLeastLog2), t.slope);
    }
    return z;
  });
}

}  // namespace wrpo::cuda
