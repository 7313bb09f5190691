// wrpo_kernels._cpu: pointers come as integers (0: absent), sizes and strides in elements. Knows nothing of torch.
#include "bindings.h"

#include <pybind11/stl.h>

#include <vector>

#include "huge_pages.h"
#include "preference_loss.h"
#include "sequence_sum.h"
#include "simd.h"

namespace {

// token_logp

wrpo::TokenLogp token_logp_args(Pointer logits, int dtype, int64_t n, int64_t V, int64_t row_stride, Pointer target,
                                int64_t ignore_index, Pointer bias, double scale, double softcap,
                                double inv_temperature, int threads) {
  require(dtype >= 0 && dtype <= 2, "dtype", "0 (float32), 1 (bfloat16) or 2 (float16)", dtype);
  require(n > 0, "n", "at least 0", n);
  require(V >= 1, "V", "at least 1", V);
  require_present({{"logits", logits}, {"target", target}});
  const int64_t* y = as<const int64_t>(target);
  for (int64_t i = 0; i < n; ++i)
    if (y[i] != ignore_index && (y[i] < 0 || y[i] >= V))
      throw std::invalid_argument("target[" + std::to_string(i) +
                                  "]: expected a value in [0, V = " + std::to_string(V) + ") or ignore_index " +
                                  std::to_string(ignore_index) + ", got " + std::to_string(y[i]));
  return {as<void>(logits), wrpo::Dtype(dtype),    n,     V,       row_stride,      y,
          ignore_index,     as<const float>(bias), scale, softcap, inv_temperature, usable_threads(threads, n)};
}

template <decltype(wrpo::Level::token_logp) wrpo::Level::* kernel>
void token_logp(Pointer logits, int dtype, int64_t n, int64_t V, int64_t row_stride, Pointer target,
                int64_t ignore_index, Pointer bias, double scale, double softcap, double inv_temperature, Pointer logp,
                Pointer lse, int threads) {
  if (n == 0) return;
  require_present({{"logp", logp}, {"lse", lse}});
  const auto args = token_logp_args(logits, dtype, n, V, row_stride, target, ignore_index, bias, scale, softcap,
                                    inv_temperature, threads);
  (wrpo::level_in_use().*kernel)(args, as<float>(logp), as<float>(lse));
}

void token_logp_grad(Pointer logits, int dtype, int64_t n, int64_t V, int64_t row_stride, Pointer target,
                     int64_t ignore_index, Pointer bias, double scale, double softcap, double inv_temperature,
                     Pointer logp, Pointer lse, Pointer grad_logp, Pointer grad_logits, int64_t grad_row_stride,
                     int threads) {
  if (n == 0) return;
  require_present({{"logp", logp}, {"lse", lse}, {"grad_logp", grad_logp}, {"grad_logits", grad_logits}});
  const auto args = token_logp_args(logits, dtype, n, V, row_stride, target, ignore_index, bias, scale, softcap,
                                    inv_temperature, threads);
  wrpo::level_in_use().token_logp_grad(args, as<const float>(logp), as<const float>(lse), as<const float>(grad_logp),
                                       as<void>(grad_logits), grad_row_stride);
}

// token_statistics

void token_statistics(Pointer logits, int dtype, int64_t n, int64_t V, int64_t row_stride, Pointer target,
                      int64_t ignore_index, Pointer bias, double scale, double softcap, double inv_temperature,
                      Pointer logp, Pointer lse, Pointer values, Pointer top1, int threads) {
  if (n == 0) return;
  require_present({{"logp", logp}, {"lse", lse}, {"values", values}, {"top1", top1}});
  const auto args = token_logp_args(logits, dtype, n, V, row_stride, target, ignore_index, bias, scale, softcap,
                                    inv_temperature, threads);
  wrpo::level_in_use().token_statistics(args, as<const float>(logp), as<const float>(lse), as<float>(values),
                                        as<int64_t>(top1));
}

void token_statistics_grad(Pointer logits, int dtype, int64_t n, int64_t V, int64_t row_stride, Pointer target,
                           int64_t ignore_index, Pointer bias, double scale, double softcap, double inv_temperature,
                           Pointer values, Pointer coef, int threads) {
  if (n == 0) return;
  require_present({{"values", values}, {"coef", coef}});
  const auto args = token_logp_args(logits, dtype, n, V, row_stride, target, ignore_index, bias, scale, softcap,
                                    inv_temperature, threads);
  wrpo::level_in_use().token_statistics_grad(args, as<const float>(values), as<const float>(coef));
}

// preference_loss

wrpo::PreferenceLoss preference_loss_args(Pointer logp, Pointer ref_logp, Pointer seq_weight, Pointer group,
                                          Pointer length, Pointer nll_weight, Pointer group_weight, Pointer group_beta,
                                          Pointer group_gamma, int64_t S, int64_t G, double beta, double gamma,
                                          int loss_kind, double shape, bool length_normalize, Pointer loss,
                                          Pointer reward, Pointer margin, Pointer coef) {
  require(loss_kind >= 0 && loss_kind < wrpo::kMarginLosses, "loss_kind", "a MarginLoss", loss_kind);
  if (S > 0)
    require_present({{"logp", logp}, {"seq_weight", seq_weight}, {"group", group}, {"reward", reward}, {"coef", coef}});
  if (G > 0) require_present({{"loss", loss}, {"margin", margin}});
  if (S > 0 && length_normalize) require_present({{"length", length}});
  for (int64_t s = 0; s < S; ++s) {
    const int64_t g = as<const int64_t>(group)[s];
    if (g < 0 || g >= G)
      throw std::invalid_argument("group[" + std::to_string(s) + "]: expected a value in [0, G = " + std::to_string(G) +
                                  "), got " + std::to_string(g));
  }
  return {as<const float>(logp),
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
}

void preference_loss(Pointer logp, Pointer ref_logp, Pointer seq_weight, Pointer group, Pointer length,
                     Pointer nll_weight, Pointer group_weight, Pointer group_beta, Pointer group_gamma, int64_t S,
                     int64_t G, double beta, double gamma, int loss_kind, double shape, bool length_normalize,
                     Pointer loss, Pointer reward, Pointer margin, Pointer coef) {
  wrpo::preference_loss(preference_loss_args(logp, ref_logp, seq_weight, group, length, nll_weight, group_weight,
                                             group_beta, group_gamma, S, G, beta, gamma, loss_kind, shape,
                                             length_normalize, loss, reward, margin, coef));
}

// sequences and their rows

void require_rows(Pointer length, int64_t S, int64_t N) {
  if (S > 0) require_present({{"length", length}});
  int64_t rows = 0;
  for (int64_t s = 0; s < S; ++s) {
    const int64_t n = as<const int64_t>(length)[s];
    require(n >= 0, "length", "counts >= 0", n);
    rows += n;
  }
  require(rows == N, "length", "as many rows as there are", rows);
}

void preference_loss_of_rows(Pointer row_logp, int64_t N, Pointer ref_logp, Pointer seq_weight, Pointer group,
                             Pointer length, Pointer nll_weight, Pointer group_weight, Pointer group_beta,
                             Pointer group_gamma, int64_t S, int64_t G, double beta, double gamma, int loss_kind,
                             double shape, bool length_normalize, double divisor, Pointer total, Pointer loss,
                             Pointer logp, Pointer reward, Pointer margin, Pointer row_coef) {
  require_rows(length, S, N);
  require_present({{"total", total}});
  if (N > 0) require_present({{"row_logp", row_logp}, {"row_coef", row_coef}});
  if (!(divisor > 0)) require(false, "divisor", "a number > 0", std::to_string(divisor));
  std::vector<float> coef(S > 0 ? size_t(S) : 0);
  const auto args = preference_loss_args(logp, ref_logp, seq_weight, group, length, nll_weight, group_weight,
                                         group_beta, group_gamma, S, G, beta, gamma, loss_kind, shape, length_normalize,
                                         loss, reward, margin, reinterpret_cast<Pointer>(coef.data()));
  wrpo::sequence_sum(as<const float>(row_logp), args.length, S, as<float>(logp));
  wrpo::preference_loss(args);
  wrpo::sequence_sum(args.loss, &G, 1, as<float>(total));
  *as<float>(total) /= divisor;
  for (float& c : coef) c /= divisor;
  wrpo::over_rows(args.coef, args.length, S, as<float>(row_coef));
}

// From logits, which become the gradient: all passes in one call, whose price a small problem feels.
void preference_loss_of_logits(Pointer logits, int dtype, int64_t N, int64_t V, int64_t row_stride, Pointer target,
                               int64_t ignore_index, double scale, double softcap, double inv_temperature, int threads,
                               Pointer ref_logp, Pointer seq_weight, Pointer group, Pointer length, Pointer nll_weight,
                               Pointer group_weight, Pointer group_beta, Pointer group_gamma, int64_t S, int64_t G,
                               double beta, double gamma, int loss_kind, double shape, bool length_normalize,
                               double divisor, Pointer total, Pointer logp, Pointer reward, Pointer margin,
                               Pointer row_coef) {
  require(N > 0, "N", "at least 1", N);
  require(G >= 0, "G", "at least 0", G);
  std::vector<float> rows(3 * size_t(N)), loss(static_cast<size_t>(G));
  const auto row_logp = reinterpret_cast<Pointer>(rows.data()), lse = reinterpret_cast<Pointer>(rows.data() + N);
  token_logp<&wrpo::Level::token_logp>(logits, dtype, N, V, row_stride, target, ignore_index, 0, scale, softcap,
                                       inv_temperature, row_logp, lse, threads);
  preference_loss_of_rows(row_logp, N, ref_logp, seq_weight, group, length, nll_weight, group_weight, group_beta,
                          group_gamma, S, G, beta, gamma, loss_kind, shape, length_normalize, divisor, total,
                          reinterpret_cast<Pointer>(loss.data()), logp, reward, margin, row_coef);
  token_logp_grad(logits, dtype, N, V, row_stride, target, ignore_index, 0, scale, softcap, inv_temperature, row_logp,
                  lse, row_coef, logits, row_stride, threads);
}

void count_labels(Pointer labels, int64_t S, int64_t T, int64_t stride_s, int64_t stride_t, int64_t ignore_index,
                  Pointer counts) {
  if (S <= 0) return;
  require_present({{"counts", counts}});
  if (T > 0) require_present({{"labels", labels}});
  wrpo::count_labels(as<const int64_t>(labels), S, T, stride_s, stride_t, ignore_index, as<int64_t>(counts));
}

// the machine

bool advise_huge_pages(Pointer start, int64_t bytes) { return wrpo::advise_huge_pages(as<void>(start), bytes); }

py::dict features() {
#if defined(_OPENMP)
  const char* threads = "openmp";
#else
  const char* threads = "none";
#endif
#if defined(__clang__)
  const char* compiler = "clang " __clang_version__;
#else
  const char* compiler = "gcc " __VERSION__;
#endif
  return py::dict("simd"_a = wrpo::level_in_use().name, "simd_available"_a = wrpo::available_levels(),
                  "amx_bf16"_a = wrpo::has_amx_bf16(), "is_intel"_a = wrpo::is_intel(), "threads_runtime"_a = threads,
                  "compiler"_a = compiler);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels over raw pointers; the functions of wrpo_kernels check and call them.";
  m.def("features", &features, "What this build and this machine offer.");
  m.def("advise_huge_pages", &advise_huge_pages, Unlocked(), "start"_a, "bytes"_a,
        "Ask for huge pages under this memory; False where the system has none to give.");
  m.def("set_simd", &wrpo::use_level, "level"_a, "Choose the instruction set: generic, avx2 or avx512.");
  m.def("token_logp", &token_logp<&wrpo::Level::token_logp>, Unlocked(), "logits"_a, "dtype"_a, "n"_a, "V"_a,
        "row_stride"_a, "target"_a, "ignore_index"_a, "bias"_a, "scale"_a, "softcap"_a, "inv_temperature"_a, "logp"_a,
        "lse"_a, "threads"_a, "logp [n] and lse [2, n] of each row.");
  m.def("token_logp_delta_", &token_logp<&wrpo::Level::token_logp_delta>, Unlocked(), "logits"_a, "dtype"_a, "n"_a,
        "V"_a, "row_stride"_a, "target"_a, "ignore_index"_a, "bias"_a, "scale"_a, "softcap"_a, "inv_temperature"_a,
        "logp"_a, "lse"_a, "threads"_a, "The same, and overwrites the logits with d logp[n] / d logits[n, v].");
  m.def("token_logp_grad", &token_logp_grad, Unlocked(), "logits"_a, "dtype"_a, "n"_a, "V"_a, "row_stride"_a,
        "target"_a, "ignore_index"_a, "bias"_a, "scale"_a, "softcap"_a, "inv_temperature"_a, "logp"_a, "lse"_a,
        "grad_logp"_a, "grad_logits"_a, "grad_row_stride"_a, "threads"_a,
        "grad_logits[n, v] = grad_logp[n] * d logp[n] / d logits[n, v].");
  m.def("token_statistics", &token_statistics, Unlocked(), "logits"_a, "dtype"_a, "n"_a, "V"_a, "row_stride"_a,
        "target"_a, "ignore_index"_a, "bias"_a, "scale"_a, "softcap"_a, "inv_temperature"_a, "logp"_a, "lse"_a,
        "values"_a, "top1"_a, "threads"_a,
        "values [n, 6] (logp, lse, entropy, mean logit, log sum p^2, rest of lse) and top1 [n] of each row.");
  m.def("token_statistics_grad_", &token_statistics_grad, Unlocked(), "logits"_a, "dtype"_a, "n"_a, "V"_a,
        "row_stride"_a, "target"_a, "ignore_index"_a, "bias"_a, "scale"_a, "softcap"_a, "inv_temperature"_a, "values"_a,
        "coef"_a, "threads"_a, "Overwrites the logits with the gradient of sum_k coef[n, k] values[n, k], k < 5.");
  add_matrix_functions(m);
  m.def("preference_loss", &preference_loss, Unlocked(), "logp"_a, "ref_logp"_a, "seq_weight"_a, "group"_a, "length"_a,
        "nll_weight"_a, "group_weight"_a, "group_beta"_a, "group_gamma"_a, "S"_a, "G"_a, "beta"_a, "gamma"_a,
        "loss_kind"_a, "shape"_a, "length_normalize"_a, "loss"_a, "reward"_a, "margin"_a, "coef"_a,
        "loss [G], reward [S], margin [G], coef [S]");
  m.def("preference_loss_of_rows", &preference_loss_of_rows, Unlocked(), "row_logp"_a, "N"_a, "ref_logp"_a,
        "seq_weight"_a, "group"_a, "length"_a, "nll_weight"_a, "group_weight"_a, "group_beta"_a, "group_gamma"_a, "S"_a,
        "G"_a, "beta"_a, "gamma"_a, "loss_kind"_a, "shape"_a, "length_normalize"_a, "divisor"_a, "total"_a, "loss"_a,
        "logp"_a, "reward"_a, "margin"_a, "row_coef"_a,
        "The same from row_logp [N], rows sequence after sequence, length [S] of them each; also the total "
        "of all losses, logp [S], and row_coef [N], each row with the coef of its sequence; total and coef over "
        "divisor.");
  m.def("preference_loss_of_logits_", &preference_loss_of_logits, Unlocked(), "logits"_a, "dtype"_a, "N"_a, "V"_a,
        "row_stride"_a, "target"_a, "ignore_index"_a, "scale"_a, "softcap"_a, "inv_temperature"_a, "threads"_a,
        "ref_logp"_a, "seq_weight"_a, "group"_a, "length"_a, "nll_weight"_a, "group_weight"_a, "group_beta"_a,
        "group_gamma"_a, "S"_a, "G"_a, "beta"_a, "gamma"_a, "loss_kind"_a, "shape"_a, "length_normalize"_a, "divisor"_a,
        "total"_a, "logp"_a, "reward"_a, "margin"_a, "row_coef"_a,
        "preference_loss_of_rows from logits [N, V], which it overwrites with d total / d logits.");
  m.def("count_labels", &count_labels, Unlocked(), "labels"_a, "S"_a, "T"_a, "stride_s"_a, "stride_t"_a,
        "ignore_index"_a, "counts"_a, "counts [S] of the labels [S, T] that are not ignore_index");
}
