// The formulas of preference_terms.h on a CUDA device; sums run in double, in the order of the sequences. A sequence
// whose group is outside [0, G) belongs to none and gets a coefficient of NaN.
#pragma once
#include "../preference_terms.h"

namespace wrpo::cuda {

using Stream = uintptr_t;  // cudaStream_t

void preference_loss(const PreferenceLoss&, int device, Stream);

}  // namespace wrpo::cuda
