// The launches of csrc/cuda with every block played on the host, one after another: the same kernel bodies behind the
// same bindings, over memory of the host.
#include <type_traits>
#include <vector>

#include "../../csrc/cuda/device.h"
#include "../../csrc/cuda/preference_loss.cuh"
#include "../../csrc/cuda/sequence_sum.cuh"
#include "../../csrc/cuda/token_logp.cuh"
#include "../../csrc/cuda/token_statistics.cuh"

namespace wrpo::cuda {
namespace {

constexpr int kKeptBytes = 16 << 10;  // as if shared memory were small: long rows are kept in part

using RowBlock = PlayedBlock<kRowThreads>;
using SequenceBlock = PlayedBlock<kSequenceThreads>;

template <bool overwrite>
void play_token_logp(const TokenLogp& a, float* logp, float* lse) {
  dispatch(a, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    std::vector<Pack<typename S::T>> kept(overwrite ? kKeptBytes / 16 : 0);
    for (int64_t n = 0; n < a.n; ++n)
      token_logp_body<overwrite, S>(RowBlock{}, n, rows_of(a), logp, lse, nullptr, kept.data(), int(kept.size()));
  });
}

}  // namespace

void token_logp(const TokenLogp& a, float* logp, float* lse, int, Stream) { play_token_logp<false>(a, logp, lse); }

void token_logp_delta(const TokenLogp& a, float* logp, float* lse, int, Stream) { play_token_logp<true>(a, logp, lse); }

void token_logp_grad(const TokenLogp& a, const float* logp, const float* lse, const float* grad_logp, void* grad_logits,
                     int64_t grad_row_stride, int, Stream) {
  dispatch(a, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    auto* out = static_cast<typename S::T*>(grad_logits);
    for (int64_t n = 0; n < a.n; ++n)
      token_logp_grad_body<S>(RowBlock{}, n, rows_of(a), logp, lse, grad_logp, out + n * grad_row_stride, nullptr);
  });
}

void token_statistics(const TokenLogp& a, unsigned wanted, float* values, int64_t* top1, int, Stream) {
  dispatch(a, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    for (int64_t n = 0; n < a.n; ++n)
      token_statistics_body<S>(RowBlock{}, n, rows_of(a), wanted, values, top1, nullptr);
  });
}

void token_statistics_grad(const TokenLogp& a, const float* values, const float* coef, int, Stream) {
  dispatch(a, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    for (int64_t n = 0; n < a.n; ++n) token_statistics_grad_body<S>(RowBlock{}, n, rows_of(a), values, coef, nullptr);
  });
}

void preference_loss(const PreferenceLoss& a, int, Stream) {
  Tile tile;
  for (unsigned b = 0; b < blocks_for_groups(a.G); ++b) preference_loss_body(PlayedBlock<kGroupThreads>{}, b, a, tile);
}

void sequence_sum(const RowsOfSequences& a, const float* rows, float* sums, int, Stream) {
  for (int64_t s = 0; s < a.S; ++s) sequence_sum_body(SequenceBlock{}, s, a, rows, sums, nullptr, nullptr);
}

void over_rows(const RowsOfSequences& a, const float* values, float* rows, int, Stream) {
  for (int64_t s = 0; s < a.S; ++s) over_rows_body(SequenceBlock{}, s, a, values, rows, nullptr);
}

int device_count() { return 1; }

int runtime_version() { return 0; }

int capability(int) { return 80; }

}  // namespace wrpo::cuda
