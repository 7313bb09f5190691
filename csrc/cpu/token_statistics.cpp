// Compiled once for each level; the build defines WRPO_LEVEL as its name and sets the instruction set.
#include "token_statistics.h"

#include <cmath>

#include "../rowmath.h"
#include "scores.h"

namespace wrpo::WRPO_LEVEL {
namespace {

constexpr int kBlock = 4096;  // elements; sums of more lose digits in float32
constexpr float kShare = 1.f / kBlock;  // exact; a sum of scores that a mask made the lowest number would overflow

// log2 p_v = z2_v - high - rest; z2 in units of log 2.
template <class S>
struct LogShares {
  S row;
  float high, rest;

  WRPO_INLINE float operator()(float linear) const { return row.relative(linear, high) - rest; }
};

template <class S>
LogShares<S> log_shares(S row, double lse2) {
  const float high = float(lse2);
  return LogShares<S>{row, high, float(lse2 - double(high))};
}

struct Sums {
  double p_log2_p, p_squared, score, largest;  // of scores before the multiplier; the largest log2 p
  int64_t top1;
};

template <class S>
int64_t first_of(LogShares<S> log2_p, int64_t begin, int count, float largest) {
  int first = count;
#pragma omp simd reduction(min : first)
  for (int i = 0; i < count; ++i) {
    const int here = log2_p(log2_p.row.linear(begin + i)) == largest ? i : count;
    first = here < first ? here : first;
  }
  return begin + (first < count ? first : 0);
}

template <class S>
Sums sums_of(S row, int64_t V, double lse2) {
  const LogShares<S> log2_p = log_shares(row, lse2);
  Sums total{0, 0, 0, -double(kInf), 0};
  int64_t best = 0;
  for (int64_t begin = 0; begin < V; begin += kBlock) {
    const int count = int(V - begin < kBlock ? V - begin : kBlock);
    float entropy = 0, squares = 0, scores = 0, largest = -kInf;
#pragma omp simd reduction(+ : entropy, squares, scores) reduction(max : largest)
    for (int i = 0; i < count; ++i) {
      const float linear = row.linear(begin + i), log2 = log2_p(linear), p = pow2(log2);
      entropy += p * not_below(log2, kLeastLog2);
      squares += p * p;
      scores += kShare * row.capped(linear).value;
      largest = larger(log2, largest);
    }
    total.p_log2_p += entropy, total.p_squared += squares, total.score += double(scores) * kBlock;
    if (double(largest) > total.largest) total.largest = largest, best = begin;
  }
  const int count = int(V - best < kBlock ? V - best : kBlock);
  total.top1 = first_of(log2_p, best, count, float(total.largest));
  return total;
}

// The same in doubles, for scores that float32 cannot tell apart.
template <class S>
Sums wide_sums_of(S row, int64_t V, int64_t label) {
  const Wide whole = wide_logsumexp(row, V, label);
  Sums total{0, 0, 0, -double(kInf), 0};
  for (int64_t v = 0; v < V; ++v) {
    const double log2 = whole.log2_p(wide_score(row, v)), p = exp2(log2);
    if (p != 0) total.p_log2_p += p * log2;  // NaN too
    total.p_squared += p * p;
    total.score += row.capped(row.linear(v)).value;
    if (log2 > total.largest) total.largest = log2, total.top1 = v;
  }
  return total;
}

template <class T, bool has_bias, bool has_softcap>
void statistics(const TokenLogp& a, Scores<T, has_bias, has_softcap> row, int64_t n, float logp, float high, float low,
                float* values, int64_t* top1) {
  if (a.target[n] == a.ignore_index) {
    for (int k = 0; k < kStatistics; ++k) values[k] = 0.f;
    *top1 = -1;
    return;
  }
  row.x = static_cast<const T*>(a.logits) + n * a.row_stride;
  const double lse2 = (double(high) + double(low)) * kLog2E;
  const Sums sums = std::fabs(lse2) <= kFar ? sums_of(row, a.V, lse2) : wide_sums_of(row, a.V, a.target[n]);
  values[kLogp] = logp, values[kLse] = high, values[kLseRest] = low;
  values[kEntropy] = float(-sums.p_log2_p * kLn2);
  values[kMeanLogits] = float(sums.score * double(row.multiplier) * kLn2 / double(a.V));
  values[kLogSumSqProbs] = float(log(sums.p_squared));
  *top1 = sums.top1;
}

template <class T, bool has_bias, bool has_softcap>
void gradient(const TokenLogp& a, Scores<T, has_bias, has_softcap> row, int64_t n, const float* values,
              const float* coef) {
  T* x = static_cast<T*>(a.logits) + n * a.row_stride;
  const int64_t y = a.target[n];
  if (y == a.ignore_index) return fill_zero(x, a.V);
  row.x = x;
  const StatisticsGradient<double> wide = statistics_gradient(values, coef, a.V, outer_slope(a));
  const double lse2 = (double(values[kLse]) + double(values[kLseRest])) * kLog2E, logp = values[kLogp];
  const double of_label = wide.at_label(logp, -expm1(logp), row.capped(row.linear(y)).slope);
  if (std::fabs(lse2) <= kFar) {
    const auto log2_p = log_shares(row, lse2);
    const StatisticsGradient<float> terms = wide.as<float>();
#pragma omp simd
    for (int64_t v = 0; v < a.V; ++v) {
      const float linear = row.linear(v), l = log2_p(linear);
      x[v] = store<T>(terms(pow2(l), not_below(l, kLeastLog2), row.capped(linear).slope));
    }
  } else {
    const Wide whole = wide_logsumexp(row, a.V, y);
    for (int64_t v = 0; v < a.V; ++v) {
      const double l = whole.log2_p(wide_score(row, v));
      x[v] = store<T>(float(wide(exp2(l), l > kLeastLog2 ? l : kLeastLog2, row.capped(row.linear(v)).slope)));
    }
  }
  x[y] = store<T>(float(of_label));
}

}  // namespace

void token_statistics(const TokenLogp& a, const float* logp, const float* lse, float* values, int64_t* top1) {
  dispatch(a, [&](auto row) {
#pragma omp parallel for schedule(static) num_threads(a.threads)
    for (int64_t n = 0; n < a.n; ++n)
      statistics(a, row, n, logp[n], lse[n], lse[a.n + n], values + n * kStatistics, top1 + n);
  });
}

void token_statistics_grad(const TokenLogp& a, const float* values, const float* coef) {
  dispatch(a, [&](auto row) {
#pragma omp parallel for schedule(static) num_threads(a.threads)
    for (int64_t n = 0; n < a.n; ++n) gradient(a, row, n, values + n * kStatistics, coef + n * kStatistics);
  });
}

}  // namespace wrpo::WRPO_LEVEL
