// The formulas of preference_terms.h on a CUDA device; sums run in double, in the order of the sequences. The host
// cannot look at the groups without waiting, so here they become NaN: the margin of a group without sequences, and
// where any sequence names a group outside [0, G), all margins and its own reward and coefficient.
#pragma once
#include "../preference_terms.h"

namespace wrpo::cuda {

using Stream = uintptr_t;  // cudaStream_t

void preference_loss(const PreferenceLoss&, int device, Stream);

}  // namespace wrpo::cuda
