// The formulas of preference_terms.h; sums run in double, in the order of the sequences, on one thread.
#pragma once
#include "../preference_terms.h"

namespace wrpo {

void preference_loss(const PreferenceLoss&);

}  // namespace wrpo
