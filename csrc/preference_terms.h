// The preference losses, from sequence log-probabilities: S sequences belong to G groups.
//
//   r_s = beta_g * n_s * (l_s - ref_s)             n_s = 1, or 1 / length_s (0 for length 0)
//   m_g = sum_{s in g} w_s r_s - gamma_g
//   loss_g = a_g phi(m_g) + sum_{s in g} nll_s * (-n_s l_s)
//   coef_s = d loss_g / d l_s = n_s * (a_g phi'(m_g) beta_g w_s - nll_s)
//
// A weight of 0 takes its term out altogether, so a value that is not finite does no harm there: w_s = 0 leaves the
// margin, nll_s = 0 the log-likelihood term, n_s = 0 the sequence, and a_g = 0 switches the group's margin loss off.
#pragma once
#include <cstdint>

#include "margin_loss.h"

namespace wrpo {

struct PreferenceLoss {
  const float* logp;          // [S] l_s, nats
  const float* ref_logp;      // [S] or nullptr: reference-free
  const float* seq_weight;    // [S] w_s
  const int64_t* group;       // [S] in [0, G), any order
  const int64_t* length;      // [S] counted tokens; may be nullptr without length_normalize
  const float* nll_weight;    // [S] or nullptr: 0
  const float* group_weight;  // [G] a_g, or nullptr: 1
  const float* group_beta;    // [G] beta_g, or nullptr: beta
  const float* group_gamma;   // [G] gamma_g, or nullptr: gamma
  int64_t S, G;
  double beta, gamma;
  MarginLoss kind;
  double shape;               // of the margin loss
  bool length_normalize;
  float* loss;                // [G]
  float* reward;              // [S] r_s
  float* margin;              // [G] m_g
  float* coef;                // [S]
};

// Of a group that does not exist it is NaN: a device cannot refuse it.
WRPO_INLINE double beta_of(const PreferenceLoss& a, int64_t g) {
  if (!a.group_beta) return a.beta;
  return g >= 0 && g < a.G ? double(a.group_beta[g]) : double(from_bits(0x7fc00000u));
}

WRPO_INLINE double gamma_of(const PreferenceLoss& a, int64_t g) { return a.group_gamma ? a.group_gamma[g] : a.gamma; }

// What a sequence brings to its group, and what its coefficient needs of it.
struct SequenceTerms {
  double reward, margin, nll_loss;
  double beta, norm, seq_weight, nll_weight;
};

WRPO_INLINE SequenceTerms sequence_terms(const PreferenceLoss& a, int64_t s) {
  const double norm = !a.length_normalize ? 1.0 : a.length[s] > 0 ? 1.0 / double(a.length[s]) : 0.0;
  const double ratio = double(a.logp[s]) - (a.ref_logp ? double(a.ref_logp[s]) : 0.0);
  const double beta = beta_of(a, a.group[s]), reward = beta * weighted(norm, ratio);
  const double weight = a.seq_weight[s], nll = a.nll_weight ? double(a.nll_weight[s]) : 0.0;
  return {reward, weighted(weight, reward), -weighted(nll, weighted(norm, a.logp[s])), beta, norm, weight, nll};
}

// Writes loss and margin of a group from the sums over its sequences; returns a_g phi'(m_g).
WRPO_INLINE double finish_group(const PreferenceLoss& a, int64_t g, double margin, double nll_loss) {
  // A group of weight zero keeps no trace of its margin, even where that is not finite.
  const double weight = a.group_weight ? double(a.group_weight[g]) : 1.0;
  const Phi phi = margin_loss(a.kind, margin, beta_of(a, g), a.shape);
  a.margin[g] = float(margin);
  a.loss[g] = float(weighted(weight, phi.value) + nll_loss);
  return weighted(weight, phi.slope);
}

WRPO_INLINE float coefficient(const SequenceTerms& of, double slope) {
  return float(weighted(of.norm, weighted(of.seq_weight, of.beta * slope) - of.nll_weight));
}

}  // namespace wrpo
