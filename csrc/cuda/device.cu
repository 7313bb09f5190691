#include "device.h"
#include "launch.h"

namespace wrpo::cuda {

int device_count() {
  int count = 0;
  check(cudaGetDeviceCount(&count));
  return count;
}

int runtime_version() {
  int version = 0;
  check(cudaRuntimeGetVersion(&version));
  return version;
}

int capability(int device) {
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
         attribute(cudaDevAttrComputeCapabilityMinor, device);
}

}  // namespace wrpo::cuda
