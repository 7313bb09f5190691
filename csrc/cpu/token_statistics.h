// Statistics of the distribution that each row of logits stands for, and their gradient.
#pragma once
#include "../token_statistics.h"
#include "token_logp.h"

#define WRPO_DECLARE_TOKEN_STATISTICS(level)                                                                     \
  namespace wrpo::level {                                                                                        \
  /* values [n, 6] and top1 [n], the first of the largest scores, from logp [n] and lse [2, n] of token_logp; */ \
  /* of ignored rows 0 and -1 */                                                                                 \
  void token_statistics(const TokenLogp&, const float* logp, const float* lse, float* values, int64_t* top1);    \
  /* overwrites the logits with the gradient of sum_k coef[n, k] values[n, k] over the first five columns */     \
  void token_statistics_grad(const TokenLogp&, const float* values, const float* coef);                          \
  }

WRPO_DECLARE_TOKEN_STATISTICS(generic)
WRPO_DECLARE_TOKEN_STATISTICS(avx2)
WRPO_DECLARE_TOKEN_STATISTICS(avx512)
