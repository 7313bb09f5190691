// The losses of one margin and their slopes, shared by host and device code.
//
//   sigmoid:  -log sigma(m) + s m                                s = eps, or -eps / (1 - 2 eps) for "robust"
//   hinge:    max(0, 1 - m)                                      slope 0 at the kink
//   ipo:      ((m - 1/2) / beta)^2
//   exo_pair: q log(q / (1 - s)) + (1 - q) log((1 - q) / s)      q = sigma(m), s = eps
//   discopop: (1 - t) (-log sigma(m)) + t exp(-m)                t = sigma(m / s), s = tau
//   kto:      1 - sigma(m)
//
// `shape` is s. Of a margin that is NaN value and slope are NaN.
#pragma once
#include "rowmath.h"

namespace wrpo {

enum class MarginLoss { sigmoid = 0, hinge = 1, ipo = 2, exo_pair = 3, discopop = 4, kto = 5 };
constexpr int kMarginLosses = 6;

struct Phi {
  double value;  // phi(m)
  double slope;  // phi'(m)
};

// 0 times anything is 0 here, infinities and NaN included.
WRPO_INLINE double weighted(double weight, double value) { return weight == 0 ? 0.0 : weight * value; }

// log(1 + exp(x)) without overflow
WRPO_INLINE double softplus(double x) { return (x > 0 ? x : 0.0) + log1p(exp(x > 0 ? -x : x)); }

WRPO_INLINE double logistic(double x) {
  const double e = exp(x > 0 ? -x : x);
  return (x > 0 ? 1.0 : e) / (1.0 + e);
}

WRPO_INLINE Phi hinge(double m) {
  const double gap = 1.0 - m;
  return m >= 1.0 ? Phi{0.0, 0.0} : Phi{gap, gap > 0 ? -1.0 : gap};
}

WRPO_INLINE Phi ipo(double m, double beta) {
  const double d = (m - 0.5) / beta;
  return Phi{d * d, 2 * d / beta};
}

WRPO_INLINE Phi exo_pair(double m, double eps) {
  const double q = logistic(m), rest = logistic(-m), log_odds = log1p(-eps) - log(eps);
  const double value = weighted(q, -softplus(-m) - log1p(-eps)) + weighted(rest, -softplus(m) - log(eps));
  return Phi{value, weighted(q * rest, m - log_odds)};
}

WRPO_INLINE Phi discopop(double m, double tau) {
  const double t = logistic(m / tau), rest = logistic(-m / tau), log_loss = softplus(-m);
  // t exp(-m) in one exponential: apart, the one is infinite where the other is 0.
  const double power = m < 0 ? weighted(1 / tau - 1, m) : -m;
  const double exp_loss = exp(power - log1p(exp((m < 0 ? m : -m) / tau)));
  const double slope = exp_loss * (rest / tau - 1) - rest * logistic(-m) - weighted(t * rest / tau, log_loss);
  return Phi{weighted(rest, log_loss) + exp_loss, slope};
}

WRPO_INLINE Phi margin_loss(MarginLoss kind, double m, double beta, double shape) {
  switch (kind) {
    case MarginLoss::hinge:
      return hinge(m);
    case MarginLoss::ipo:
      return ipo(m, beta);
    case MarginLoss::exo_pair:
      return exo_pair(m, shape);
    case MarginLoss::discopop:
      return discopop(m, shape);
    case MarginLoss::kto:
      return Phi{logistic(-m), -logistic(m) * logistic(-m)};
    default:  // shape 0 must not meet an infinite margin
      return Phi{softplus(-m) + weighted(shape, m), shape - logistic(-m)};
  }
}

}  // namespace wrpo
