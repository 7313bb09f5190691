#include "launch.h"
#include "token_statistics.cuh"

namespace wrpo::cuda {
namespace {

template <class S>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    token_statistics_kernel(const __grid_constant__ Rows a, unsigned wanted, float* values, int64_t* top1) {
  __shared__ Statistics partial[kRowThreads / 32];
  token_statistics_body<S>(CudaBlock<kRowThreads>{}, blockIdx.x, a, wanted, values, top1, partial);
}

template <class S>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    token_statistics_grad_kernel(const __grid_constant__ Rows a, const float* values, const float* coef) {
  __shared__ Sum partial[kRowThreads / 32];
  token_statistics_grad_body<S>(CudaBlock<kRowThreads>{}, blockIdx.x, a, values, coef, partial);
}

}  // namespace

void token_statistics(const TokenLogp& a, unsigned wanted, float* values, int64_t* top1, int device, Stream stream) {
  const OnDevice guard(device);
  dispatch(a, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    token_statistics_kernel<S>
        <<<unsigned(a.n), kRowThreads, 0, cudaStream_t(stream)>>>(rows_of(a), wanted, values, top1);
  });
  check(cudaGetLastError());
}

void token_statistics_grad(const TokenLogp& a, const float* values, const float* coef, int device, Stream stream) {
  const OnDevice guard(device);
  dispatch(a, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    token_statistics_grad_kernel<S><<<unsigned(a.n), kRowThreads, 0, cudaStream_t(stream)>>>(rows_of(a), values, coef);
  });
  check(cudaGetLastError());
}

}  // namespace wrpo::cuda
