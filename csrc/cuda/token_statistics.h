// Statistics of the distribution that each row of logits stands for, and their gradient, on a CUDA device.
//
// Values [n, 6] are those of ../token_statistics.h and top1 [n] is the first of the largest scores; of ignored rows 0
// and -1. A target outside [0, V) makes NaN of all values and of the gradient of its row, and its top1 -1.
#pragma once
#include "../token_statistics.h"
#include "token_logp.h"

namespace wrpo::cuda {

// What is made beside logp and the log-sum-exp; the others of these are 0, and -1 for top1.
enum Wanted : unsigned { kWantsEntropy = 1, kWantsMeanLogits = 2, kWantsLogSumSqProbs = 4, kWantsTop1 = 8 };

void token_statistics(const TokenLogp&, unsigned wanted, float* values, int64_t* top1, int device, Stream);

// Overwrites the logits with the gradient of sum_k coef[n, k] values[n, k] over the first five columns.
void token_statistics_grad(const TokenLogp&, const float* values, const float* coef, int device, Stream);

}  // namespace wrpo::cuda
