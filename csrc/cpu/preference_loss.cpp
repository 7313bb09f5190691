#include "preference_loss.h"

#include <vector>

namespace wrpo {

void preference_loss(const PreferenceLoss& a) {
  std::vector<double> margin(size_t(a.G), 0.0), nll_loss(size_t(a.G), 0.0), slope(size_t(a.G), 0.0);
  for (int64_t g = 0; g < a.G; ++g) margin[g] = -gamma_of(a, g);
  for (int64_t s = 0; s < a.S; ++s) {
    const SequenceTerms of = sequence_terms(a, s);
    a.reward[s] = float(of.reward);
    margin[a.group[s]] += of.margin;
    nll_loss[a.group[s]] += of.nll_loss;
  }
  for (int64_t g = 0; g < a.G; ++g) slope[g] = finish_group(a, g, margin[g], nll_loss[g]);
  for (int64_t s = 0; s < a.S; ++s) a.coef[s] = coefficient(sequence_terms(a, s), slope[a.group[s]]);
}

}  // namespace wrpo
