#include "launch.h"
#include "preference_loss.cuh"

namespace wrpo::cuda {
namespace {

// One block is enough a multiprocessor: told so, no generation keeps anything on the stack for more of them.
__global__ void __launch_bounds__(kGroupThreads, 1) preference_loss_kernel(const __grid_constant__ PreferenceLoss a) {
  __shared__ Tile tile;
  preference_loss_body(CudaBlock<kGroupThreads>{}, blockIdx.x, a, tile);
}

}  // namespace

void preference_loss(const PreferenceLoss& a, int device, Stream stream) {
  const OnDevice guard(device);
  preference_loss_kernel<<<blocks_for_groups(a.G), kGroupThreads, 0, cudaStream_t(stream)>>>(a);
  check(cudaGetLastError());
}

}  // namespace wrpo::cuda
