// Log-probability of the target token of each row of logits, and its gradient. The loops are compiled once for each
// instruction set (see simd.h); a row is worked on by one thread, so results do not depend on the number of threads.
#pragma once
#include <cstdint>

namespace wrpo {

enum class Dtype { float32 = 0, bfloat16 = 1, float16 = 2 };

//   z = scale * (x + bias);  z = softcap * tanh(z / softcap) if softcap;  z = z * inv_temperature
struct TokenLogp {
  void* logits;           // [n, V] dtype, strides (row_stride, 1) in elements
  Dtype dtype;
  int64_t n, V, row_stride;
  const int64_t* target;  // [n], in [0, V) or ignore_index
  int64_t ignore_index;
  const float* bias;      // [V], may be nullptr
  double scale;
  double softcap;         // 0: none
  double inv_temperature;
  int threads;
};

}  // namespace wrpo

#define WRPO_DECLARE_TOKEN_LOGP(level)                                                                            \
  namespace wrpo::level {                                                                                         \
  /* logp[n] = z[n, y] - log sum_v exp z[n, v];  lse [2, n]: that logarithm, nats, is the sum of both; all of  */ \
  /* them are 0 on ignored rows */                                                                                \
  void token_logp(const TokenLogp&, float* logp, float* lse);                                                     \
  /* the same, and overwrites the logits with d logp[n] / d logits[n, v]; 0 on ignored rows */                    \
  void token_logp_delta(const TokenLogp&, float* logp, float* lse);                                               \
  /* grad_logits[n, v] = grad_logp[n] * d logp[n] / d logits[n, v]; grad_logits may be the logits themselves */   \
  void token_logp_grad(const TokenLogp&, const float* logp, const float* lse, const float* grad_logp,             \
                       void* grad_logits, int64_t grad_row_stride);                                               \
  }

WRPO_DECLARE_TOKEN_LOGP(generic)
WRPO_DECLARE_TOKEN_LOGP(avx2)
WRPO_DECLARE_TOKEN_LOGP(avx512)
