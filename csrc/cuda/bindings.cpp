// wrpo_kernels._cuda: pointers and streams come as integers (pointers: 0 means absent), sizes and strides in elements.
// Knows nothing of torch. Nothing here waits for the device, so values of targets and groups are not checked.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "device.h"
#include "preference_loss.h"
#include "sequence_sum.h"
#include "token_logp.h"
#include "token_statistics.h"

namespace py = pybind11;
using namespace py::literals;
using Pointer = uintptr_t;
using wrpo::cuda::Stream;

namespace {

template <class T>
T* as(Pointer p) {
  return reinterpret_cast<T*>(p);
}

void require(bool holds, const char* name, const char* expected, int64_t got) {
  if (!holds)
    throw std::invalid_argument(std::string(name) + ": expected " + expected + ", got " + std::to_string(got));
}

void require_present(std::initializer_list<std::pair<const char*, Pointer>> pointers) {
  for (const auto& [name, pointer] : pointers)
    if (!pointer) throw std::invalid_argument(std::string(name) + ": expected a pointer, got 0");
}

// ---- token_logp -----------------------------------------------------------------------------------------------

wrpo::cuda::TokenLogp token_logp_args(Pointer logits, int dtype, int64_t n, int64_t V, int64_t row_stride,
                                      Pointer target, int64_t ignore_index, Pointer bias, double scale, double softcap,
                                      double inv_temperature) {
  require(dtype >= 0 && dtype <= 2, "dtype", "0 (float32), 1 (bfloat16) or 2 (float16)", dtype);
  require(n > 0 && n <= wrpo::cuda::kMostRows, "n", "0 to 2^31 - 1 rows", n);
  require(V >= 1 && V <= wrpo::cuda::kMostElements, "V", "1 to 2^31 - 1", V);
  require_present({{"logits", logits}, {"target", target}});
  return {as<void>(logits), wrpo::cuda::Dtype(dtype), n,     V,       row_stride,     as<const int64_t>(target),
          ignore_index,     as<const float>(bias),    scale, softcap, inv_temperature};
}

template <void (*kernel)(const wrpo::cuda::TokenLogp&, float*, float*, int, Stream)>
void token_logp(Pointer logits, int dtype, int64_t n, int64_t V, int64_t row_stride, Pointer target,
                int64_t ignore_index, Pointer bias, double scale, double softcap, double inv_temperature, Pointer logp,
                Pointer lse, int device, Stream stream) {
  if (n == 0) return;
  require_present({{"logp", logp}, {"lse", lse}});
  const auto args =
      token_logp_args(logits, dtype, n, V, row_stride, target, ignore_index, bias, scale, softcap, inv_temperature);
  kernel(args, as<float>(logp), as<float>(lse), device, stream);
}

void token_logp_grad(Pointer logits, int dtype, int64_t n, int64_t V, int64_t row_stride, Pointer target,
                     int64_t ignore_index, Pointer bias, double scale, double softcap, double inv_temperature,
                     Pointer logp, Pointer lse, Pointer grad_logp, Pointer grad_logits, int64_t grad_row_stride,
                     int device, Stream stream) {
  if (n == 0) return;
  require_present({{"logp", logp}, {"lse", lse}, {"grad_logp", grad_logp}, {"grad_logits", grad_logits}});
  const auto args =
      token_logp_args(logits, dtype, n, V, row_stride, target, ignore_index, bias, scale, softcap, inv_temperature);
  wrpo::cuda::token_logp_grad(args, as<const float>(logp), as<const float>(lse), as<const float>(grad_logp),
                              as<void>(grad_logits), grad_row_stride, device, stream);
}

// ---- token_statistics -----------------------------------------------------------------------------------------

void token_statistics(Pointer logits, int dtype, int64_t n, int64_t V, int64_t row_stride, Pointer target,
                      int64_t ignore_index, Pointer bias, double scale, double softcap, double inv_temperature,
                      unsigned wanted, Pointer values, Pointer top1, int device, Stream stream) {
  if (n == 0) return;
  require_present({{"values", values}, {"top1", top1}});
  const auto args =
      token_logp_args(logits, dtype, n, V, row_stride, target, ignore_index, bias, scale, softcap, inv_temperature);
  wrpo::cuda::token_statistics(args, wanted, as<float>(values), as<int64_t>(top1), device, stream);
}

void token_statistics_grad(Pointer logits, int dtype, int64_t n, int64_t V, int64_t row_stride, Pointer target,
                           int64_t ignore_index, Pointer bias, double scale, double softcap, double inv_temperature,
                           Pointer values, Pointer coef, int device, Stream stream) {
  if (n == 0) return;
  require_present({{"values", values}, {"coef", coef}});
  const auto args =
      token_logp_args(logits, dtype, n, V, row_stride, target, ignore_index, bias, scale, softcap, inv_temperature);
  wrpo::cuda::token_statistics_grad(args, as<const float>(values), as<const float>(coef), device, stream);
}

// ---- preference_loss ------------------------------------------------------------------------------------------

void preference_loss(Pointer logp, Pointer ref_logp, Pointer seq_weight, Pointer group, Pointer length,
                     Pointer nll_weight, Pointer group_weight, Pointer group_beta, Pointer group_gamma, int64_t S,
                     int64_t G, double beta, double gamma, int loss_kind, double shape, bool length_normalize,
                     Pointer loss, Pointer reward, Pointer margin, Pointer coef, int device, Stream stream) {
  require(loss_kind >= 0 && loss_kind < wrpo::kMarginLosses, "loss_kind", "a MarginLoss", loss_kind);
  if (S == 0 && G == 0) return;
  if (S > 0)
    require_present({{"logp", logp}, {"seq_weight", seq_weight}, {"group", group}, {"reward", reward}, {"coef", coef}});
  if (G > 0) require_present({{"loss", loss}, {"margin", margin}});
  if (S > 0 && length_normalize) require_present({{"length", length}});
  const wrpo::PreferenceLoss args{as<const float>(logp),
                                  as<const float>(ref_logp),
                                  as<const float>(seq_weight),
                                  as<const int64_t>(group),
                                  as<const int64_t>(length),
                                  as<const float>(nll_weight),
                                  as<const float>(group_weight),
                                  as<const float>(group_beta),
                                  as<const float>(group_gamma),
                                  S,
                                  G,
                                  beta,
                                  gamma,
                                  wrpo::MarginLoss(loss_kind),
                                  shape,
                                  length_normalize,
                                  as<float>(loss),
                                  as<float>(reward),
                                  as<float>(margin),
                                  as<float>(coef)};
  wrpo::cuda::preference_loss(args, device, stream);
}

// ---- sequences and their rows ---------------------------------------------------------------------------------

template <void (*kernel)(const wrpo::cuda::RowsOfSequences&, const float*, float*, int, Stream)>
void between_rows_and_sequences(Pointer in, Pointer length, int64_t S, int64_t N, Pointer out, int device,
                                Stream stream) {
  if (S == 0) return;
  require(S > 0 && S <= wrpo::cuda::kMostRows, "S", "0 to 2^31 - 1 sequences", S);
  require_present({{"length", length}});
  kernel({as<const int64_t>(length), S, N}, as<const float>(in), as<float>(out), device, stream);
}

// ---- the build ------------------------------------------------------------------------------------------------

// The architectures of the machine code in this build, e.g. 80 and 90; the last of them is there as PTX as well.
std::vector<int> archs() {
  std::vector<int> list;
  std::istringstream text(WRPO_CUDA_ARCHS);
  for (std::string arch; std::getline(text, arch, ';');) list.push_back(std::stoi(arch));
  return list;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  m.doc() = "CUDA kernels over raw pointers; the functions of wrpo_kernels check and call them.";
  m.def("device_count", &wrpo::cuda::device_count, "Devices that the driver offers; RuntimeError without a driver.");
  m.def("runtime_version", &wrpo::cuda::runtime_version, "1000 * major + 10 * minor of the CUDA runtime inside.");
  m.def("capability", &wrpo::cuda::capability, "device"_a, "10 * major + minor of a device.");
  m.def("archs", &archs, "Architectures of the machine code inside; the last one is there as PTX as well.");
  m.def("token_logp", &token_logp<&wrpo::cuda::token_logp>, Unlocked(), "logits"_a, "dtype"_a, "n"_a, "V"_a,
        "row_stride"_a, "target"_a, "ignore_index"_a, "bias"_a, "scale"_a, "softcap"_a, "inv_temperature"_a, "logp"_a,
        "lse"_a, "device"_a, "stream"_a, "logp [n] and lse [2, n] of each row.");
  m.def("token_logp_delta_", &token_logp<&wrpo::cuda::token_logp_delta>, Unlocked(), "logits"_a, "dtype"_a, "n"_a,
        "V"_a, "row_stride"_a, "target"_a, "ignore_index"_a, "bias"_a, "scale"_a, "softcap"_a, "inv_temperature"_a,
        "logp"_a, "lse"_a, "device"_a, "stream"_a,
        "The same, and overwrites the logits with d logp[n] / d logits[n, v].");
  m.def("token_logp_grad", &token_logp_grad, Unlocked(), "logits"_a, "dtype"_a, "n"_a, "V"_a, "row_stride"_a,
        "target"_a, "ignore_index"_a, "bias"_a, "scale"_a, "softcap"_a, "inv_temperature"_a, "logp"_a, "lse"_a,
        "grad_logp"_a, "grad_logits"_a, "grad_row_stride"_a, "device"_a, "stream"_a,
        "grad_logits[n, v] = grad_logp[n] * d logp[n] / d logits[n, v].");
  m.def("token_statistics", &token_statistics, Unlocked(), "logits"_a, "dtype"_a, "n"_a, "V"_a, "row_stride"_a,
        "target"_a, "ignore_index"_a, "bias"_a, "scale"_a, "softcap"_a, "inv_temperature"_a, "wanted"_a, "values"_a,
        "top1"_a, "device"_a, "stream"_a, "values [n, 6] and top1 [n] of each row");
  m.def("token_statistics_grad_", &token_statistics_grad, Unlocked(), "logits"_a, "dtype"_a, "n"_a, "V"_a,
        "row_stride"_a, "target"_a, "ignore_index"_a, "bias"_a, "scale"_a, "softcap"_a, "inv_temperature"_a, "values"_a,
        "coef"_a, "device"_a, "stream"_a,
        "Overwrites the logits with the gradient of sum_k coef[n, k] values[n, k] over the first five columns.");
  m.def("preference_loss", &preference_loss, Unlocked(), "logp"_a, "ref_logp"_a, "seq_weight"_a, "group"_a, "length"_a,
        "nll_weight"_a, "group_weight"_a, "group_beta"_a, "group_gamma"_a, "S"_a, "G"_a, "beta"_a, "gamma"_a,
        "loss_kind"_a, "shape"_a, "length_normalize"_a, "loss"_a, "reward"_a, "margin"_a, "coef"_a, "device"_a,
        "stream"_a, "loss [G], reward [S], margin [G], coef [S]");
  m.def("sequence_sum", &between_rows_and_sequences<&wrpo::cuda::sequence_sum>, Unlocked(), "rows"_a, "length"_a, "S"_a,
        "N"_a, "sums"_a, "device"_a, "stream"_a,
        "sums [S] of rows [N] that stand sequence after sequence, length [S] of them each");
  m.def("over_rows", &between_rows_and_sequences<&wrpo::cuda::over_rows>, Unlocked(), "values"_a, "length"_a, "S"_a,
        "N"_a, "rows"_a, "device"_a, "stream"_a, "rows [N], each with the value [S] of its sequence");
}
