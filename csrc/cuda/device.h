// What this build and this machine offer; each throws std::runtime_error with the words of the CUDA runtime.
#pragma once

namespace wrpo::cuda {

int device_count();     // throws where no driver, or one too old for the runtime, is installed
int runtime_version();  // 1000 * major + 10 * minor, of the runtime linked into this build
int capability(int device);  // 10 * major + minor

}  // namespace wrpo::cuda
