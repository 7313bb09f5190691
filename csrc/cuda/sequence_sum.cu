#include "launch.h"
#include "sequence_sum.cuh"

namespace wrpo::cuda {
namespace {

__global__ void __launch_bounds__(kSequenceThreads)
    sequence_sum_kernel(const RowsOfSequences a, const float* rows, float* sums) {
  __shared__ int64_t counts[kSequenceThreads / 32];
  __shared__ double partial[kSequenceThreads / 32];
  sequence_sum_body(CudaBlock<kSequenceThreads>{}, blockIdx.x, a, rows, sums, counts, partial);
}

__global__ void __launch_bounds__(kSequenceThreads)
    over_rows_kernel(const RowsOfSequences a, const float* values, float* rows) {
  __shared__ int64_t counts[kSequenceThreads / 32];
  over_rows_body(CudaBlock<kSequenceThreads>{}, blockIdx.x, a, values, rows, counts);
}

}  // namespace

void sequence_sum(const RowsOfSequences& a, const float* rows, float* sums, int device, Stream stream) {
  const OnDevice guard(device);
  sequence_sum_kernel<<<unsigned(a.S), kSequenceThreads, 0, cudaStream_t(stream)>>>(a, rows, sums);
  check(cudaGetLastError());
}

void over_rows(const RowsOfSequences& a, const float* values, float* rows, int device, Stream stream) {
  const OnDevice guard(device);
  over_rows_kernel<<<unsigned(a.S), kSequenceThreads, 0, cudaStream_t(stream)>>>(a, values, rows);
  check(cudaGetLastError());
}

}  // namespace wrpo::cuda
