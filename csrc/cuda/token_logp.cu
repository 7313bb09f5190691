#include "launch.h"
#include "token_logp.cuh"

namespace wrpo::cuda {
namespace {

template <bool overwrite, class S>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    token_logp_kernel(const __grid_constant__ Rows a, float* logp, float* lse, int num_kept) {
  __shared__ Sum partial[kRowThreads / 32];
  extern __shared__ Pack<float> dynamic[];
  Pack<typename S::T>* kept = reinterpret_cast<Pack<typename S::T>*>(dynamic);
  token_logp_body<overwrite, S>(
      CudaBlock<kRowThreads>{}, blockIdx.x, a, logp, lse, partial, kept,
      overwrite ? num_kept : 0);  // a constant for the forward: its loop has no choice to make
}

template <class S>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    token_logp_grad_kernel(const __grid_constant__ Rows a, const float* logp, const float* lse, const float* grad_logp,
                           void* grad_logits, int64_t grad_row_stride) {
  typename S::T* out = static_cast<typename S::T*>(grad_logits) + int64_t(blockIdx.x) * grad_row_stride;
  __shared__ Sum partial[kRowThreads / 32];
  token_logp_grad_body<S>(CudaBlock<kRowThreads>{}, blockIdx.x, a, logp, lse, grad_logp, out, partial);
}

// Bytes of a row that a block of `kernel` keeps in shared memory: two blocks share an SM, so that one reads while the
// other writes, and few enough rows are under way for the rest of them to stay in L2.
template <class Kernel>
int bytes_to_keep(Kernel* kernel, int64_t row_bytes, int device) {
  const int on_sm = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  const int of_system = attribute(cudaDevAttrReservedSharedMemoryPerBlock, device);
  const int most = on_sm / kRowBlocks - of_system - int(sizeof(Sum)) * kRowThreads / 32;
  // The same for every row, so that threads of the host which launch side by side do not undo each other's setting.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
  return int(row_bytes < most ? row_bytes : most) / 16 * 16;
}

}  // namespace

void token_logp(const TokenLogp& a, float* logp, float* lse, int device, Stream stream) {
  const OnDevice guard(device);
  dispatch(a, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    token_logp_kernel<false, S><<<unsigned(a.n), kRowThreads, 0, cudaStream_t(stream)>>>(rows_of(a), logp, lse, 0);
  });
  check(cudaGetLastError());
}

void token_logp_delta(const TokenLogp& a, float* logp, float* lse, int device, Stream stream) {
  const OnDevice guard(device);
  dispatch(a, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    auto* kernel = token_logp_kernel<true, S>;
    const int bytes = bytes_to_keep(kernel, a.V * int64_t(sizeof(typename S::T)), device);
    kernel<<<unsigned(a.n), kRowThreads, bytes, cudaStream_t(stream)>>>(rows_of(a), logp, lse, bytes / 16);
  });
  check(cudaGetLastError());
}

void token_logp_grad(const TokenLogp& a, const float* logp, const float* lse, const float* grad_logp, void* grad_logits,
                     int64_t grad_row_stride, int device, Stream stream) {
  const OnDevice guard(device);
  dispatch(a, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    token_logp_grad_kernel<S><<<unsigned(a.n), kRowThreads, 0, cudaStream_t(stream)>>>(rows_of(a), logp, lse, grad_logp,
                                                                                       grad_logits, grad_row_stride);
  });
  check(cudaGetLastError());
}

}  // namespace wrpo::cuda
