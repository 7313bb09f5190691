// Log-probability of the target token of each row of logits, and its gradient, on a CUDA device.
//
//   z = scale * (x + bias);  z = softcap * tanh(z / softcap) if softcap;  z = z * inv_temperature
//   logp[n] = z[n, y] - log sum_v exp z[n, v];  lse [2, n]: that logarithm, nats, is the sum of both
//
// Ignored rows: logp, lse, delta and gradient are 0. A target outside [0, V) makes all of them NaN in its row: the host
// cannot know of it without waiting for the device.
#pragma once
#include <cstdint>

namespace wrpo::cuda {

enum class Dtype { float32 = 0, bfloat16 = 1, float16 = 2 };

struct TokenLogp {
  void* logits;  // [n, V] dtype, strides (row_stride, 1) in elements
  Dtype dtype;
  int64_t n, V, row_stride;
  const int64_t* target;  // [n], in [0, V) or ignore_index
  int64_t ignore_index;
  const float* bias;  // [V], may be nullptr
  double scale;
  double softcap;  // 0: none
  double inv_temperature;
};

// Rows of a launch, and elements of a row: more would need 64-bit indices inside a row.
constexpr int64_t kMostRows = 0x7fffffff, kMostElements = 0x7fffffff;

using Stream = uintptr_t;  // cudaStream_t

void token_logp(const TokenLogp&, float* logp, float* lse, int device, Stream);

// The same, and overwrites the logits with delta[n, v] = d logp[n] / d logits[n, v].
void token_logp_delta(const TokenLogp&, float* logp, float* lse, int device, Stream);

// grad_logits[n, v] = grad_logp[n] * delta[n, v]; grad_logits may be the logits themselves.
void token_logp_grad(const TokenLogp&, const float* logp, const float* lse, const float* grad_logp, void* grad_logits,
                     int64_t grad_row_stride, int device, Stream);

}  // namespace wrpo::cuda
