// What is said of a row of scores besides its log-prob, and the gradient of a sum of it, for host and device.
#pragma once
#include "rowmath.h"

namespace wrpo {

// Columns of the values [n, 6]. The log-sum-exp is the sum of lse and lse_rest.
enum Statistic {
  kLogp = 0,
  kLse = 1,
  kEntropy = 2,
  kMeanLogits = 3,
  kLogSumSqProbs = 4,
  kLseRest = 5,
  kStatistics = 6
};

constexpr float kLeastLog2 = -200.f;  // log2 p below which p is 0 in float32, so that 0 log 0 is 0

WRPO_INLINE float not_below(float x, float least) { return x > least ? x : least; }

// The derivative of sum_k coef[k] values[k], k over the first five, by the logit of a token but the label:
// p (of_p + of_log log2 p + of_square p) + everywhere, times the slope of the score. Of the label of_label more.
template <class Real>
struct StatisticsGradient {
  Real of_p, of_log, of_square, everywhere, of_label, outer;

  // `slope`: d z / d x over that where the cap is not felt, which is `outer`.
  WRPO_INLINE Real operator()(Real p, Real log2, Real slope) const {
    const Real softmax_part = p * (of_p + of_log * log2 + of_square * p);
    return (softmax_part + everywhere) * outer * slope;
  }

  // Of the label, from its logp and 1 - p, which is exact where p is nearly 1.
  WRPO_INLINE Real at_label(Real logp, Real missing, Real slope) const {
    const Real log2 = logp * Real(kLog2E), p = pow2(log2);
    StatisticsGradient without_logp = *this;
    without_logp.of_p += of_label;
    return without_logp(p, log2 > Real(kLeastLog2) ? log2 : Real(kLeastLog2), slope) +
           of_label * missing * outer * slope;
  }

  template <class To>
  WRPO_INLINE StatisticsGradient<To> as() const {
    return {To(of_p), To(of_log), To(of_square), To(everywhere), To(of_label), To(outer)};
  }
};

// `values` and `coef` [6] of a row.
WRPO_INLINE StatisticsGradient<double> statistics_gradient(const float* values, const float* coef, int64_t V,
                                                           double outer) {
  const double of_logp = coef[kLogp], of_entropy = coef[kEntropy], of_square = coef[kLogSumSqProbs];
  return {coef[kLse] - of_logp - of_entropy * values[kEntropy] - 2 * of_square,
          -of_entropy * kLn2,
          2 * of_square * exp(-double(values[kLogSumSqProbs])),
          double(coef[kMeanLogits]) / double(V),
          of_logp,
          outer};
}

}  // namespace wrpo
