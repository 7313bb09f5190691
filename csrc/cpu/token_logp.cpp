// Compiled once for each level; the build defines WRPO_LEVEL as its name and sets the instruction set.
#include "token_logp.h"

#include <cmath>
#include <type_traits>

#include "../rowmath.h"
#include "scores.h"

namespace wrpo::WRPO_LEVEL {
namespace {

constexpr int kBlock = 4096;  // elements; stays in L1 in case it is summed twice
constexpr int kPiece = 256;   // elements of the gradient between two prefetches; 1024 is 10 % slower, 4096 25 %
constexpr int kSample = 64;   // elements that give the first reference of a row

// A block is summed against a past reference, and again when it holds a score more than 2^kStale times above it.
// Rounding of z - top grows with the distance: up to 2^-22, base 2, at 8.
constexpr float kStale = 8.f;

constexpr LogSumExp<double> kTooFar{kInf, 0.0};

template <class S>
float sample_max(S row, int64_t begin, int count) {
  float m = -kInf;
  const int sample = count < kSample ? count : kSample;
#pragma omp simd reduction(max : m)
  for (int i = 0; i < sample; ++i) m = larger(row.relative(row.linear(begin + i), 0.f), m);
  return m > -kInf ? m : 0.f;
}

struct BlockSum {
  float sum;  // sum_v 2^(z2_v - top)
  float max;  // max_v (z2_v - top)
};

template <class S>
BlockSum block_sum(S row, int64_t begin, int count, float top) {
  float s0 = 0, s1 = 0, s2 = 0, s3 = 0, m0 = -kInf, m1 = -kInf, m2 = -kInf, m3 = -kInf;
  const int quarter = quarter_of(count);
#pragma omp simd reduction(+ : s0, s1, s2, s3) reduction(max : m0, m1, m2, m3)
  for (int i = 0; i < quarter; ++i) {
    const Four z = each(row.linear_four(begin, i, quarter), [&](float x) { return row.relative(x, top); });
    s0 += pow2(z.a), s1 += pow2(z.b), s2 += pow2(z.c), s3 += pow2(z.d);
    m0 = larger(z.a, m0), m1 = larger(z.b, m1), m2 = larger(z.c, m2), m3 = larger(z.d, m3);
  }
#pragma omp simd reduction(+ : s0) reduction(max : m0)
  for (int i = 4 * quarter; i < count; ++i) {
    const float z = row.relative(row.linear(begin + i), top);
    s0 += pow2(z);
    m0 = larger(z, m0);
  }
  return BlockSum{(s0 + s1) + (s2 + s3), larger(larger(m0, m1), larger(m2, m3))};
}

// The same without the label.
template <class S>
BlockSum block_sum_of_others(S row, int64_t begin, int count, float top, int64_t label) {
  const int64_t end = begin + count;
  if (label < begin || label >= end) return block_sum(row, begin, count, top);
  const BlockSum before = block_sum(row, begin, int(label - begin), top);
  const BlockSum after = block_sum(row, label + 1, int(end - label - 1), top);
  return BlockSum{before.sum + after.sum, larger(before.max, after.max)};
}

// The sum over all but the label, whose term would hide the others where it is nearly certain. One read of the row; a
// block whose scores are far from the reference is summed again, from L1. kTooFar where even the reference is out of
// reach.
template <class S>
LogSumExp<double> sum_of_others(S row, int64_t V, int64_t label) {
  LogSumExp<double> total{-kInf, 0.0};
  float max = -kInf;
  for (int64_t begin = 0; begin < V; begin += kBlock) {
    const int count = int(V - begin < kBlock ? V - begin : kBlock);
    const bool is_empty = total.sum == 0;  // nothing above -inf so far: the reference may still fall
    float top = is_empty ? sample_max(row, begin, count) : total.top;
    if (!(std::fabs(top) <= kFar)) return kTooFar;
    BlockSum block = block_sum_of_others(row, begin, count, top, label);
    while (block.max > kStale || (is_empty && block.max < -kStale && block.max > -kInf)) {
      top += block.max;
      if (!(std::fabs(top) <= kFar)) return kTooFar;
      block = block_sum_of_others(row, begin, count, top, label);
    }
    total = rebase(total, top);
    total.sum += block.sum;
    max = larger(top + block.max, max);
  }
  return rebase(total, max);
}

template <class T>
void prefetch_piece(const T* x, int64_t count) {
  constexpr int kLine = 64;  // bytes
  for (int64_t i = 0; i < count * int64_t(sizeof(T)); i += kLine)
    __builtin_prefetch(reinterpret_cast<const char*>(x) + i, 0, 2);
}

// out[v] = coef * d z/dx * (1[v = target] - 2^(z2_v - top) / sum), of the target by `missing`, its 1 - p; out may be
// the row itself. Meanwhile `next`, the row after this one or nullptr, comes into L2.
template <class T, bool has_bias, bool has_softcap>
void row_delta(Scores<T, has_bias, has_softcap> row, int64_t V, LogSumExp<double> total, double coef, int64_t target,
               double missing, T* out, const T* next) {
  const float top = total.top, factor = float(-coef / total.sum);
  const float of_target = float(coef * missing) * row.capped(row.linear(target)).slope;
  const auto softmax_part = [&](float linear) {
    const Tanh t = row.capped(linear);
    return factor * t.slope * pow2(fused_exactly(t.value, row.multiplier, -top));
  };
  for (int64_t begin = 0; begin < V; begin += kPiece) {
    const int64_t count = V - begin < kPiece ? V - begin : kPiece, quarter = quarter_of(count);
    if (next) prefetch_piece(next + begin, count);
#pragma omp simd
    for (int64_t i = 0; i < quarter; ++i)
      store_four(out + begin, i, quarter, each(row.linear_four(begin, i, quarter), softmax_part));
#pragma omp simd
    for (int64_t v = begin + 4 * quarter; v < begin + count; ++v) out[v] = store<T>(softmax_part(row.linear(v)));
  }
  out[target] = store<T>(of_target);
}

// The same in doubles.
template <class S, class T>
void wide_delta(S row, int64_t V, Wide total, double coef, int64_t target, T* out) {
  const double sum = total.mine + total.rest;
  for (int64_t v = 0; v < V; ++v) {
    const double delta = v == target ? total.rest / sum : -exp2(wide_score(row, v) - total.top) / sum;
    out[v] = store<T>(float(coef * row.capped(row.linear(v)).slope * delta));
  }
}

template <bool overwrite, class T, bool has_bias, bool has_softcap>
void forward(const TokenLogp& a, Scores<T, has_bias, has_softcap> row, int64_t n, float* logp, float* lse) {
  T* x = static_cast<T*>(a.logits) + n * a.row_stride;
  const int64_t y = a.target[n];
  if (y == a.ignore_index) {
    logp[n] = lse[n] = lse[a.n + n] = 0.f;
    if (overwrite) fill_zero(x, a.V);
    return;
  }
  row.x = x;
  const auto write = [&](OfLabel label, double total) {
    const Halves halves = halves_of(total);
    logp[n] = float(label.logp), lse[n] = halves.high, lse[a.n + n] = halves.low;
  };
  const LogSumExp<double> others = sum_of_others(row, a.V, y);
  const float linear = row.linear(y), score = row.relative(linear, 0.f);
  const float top = larger(score, others.top);
  if (others.top == kInf || !(score <= kFar) || top == -kInf) {  // -inf: scores that only doubles hold
    const Wide wide = wide_logsumexp(row, a.V, y);
    write(of_label(wide.relative, wide.mine, wide.rest), (wide.top + log2(wide.mine + wide.rest)) * kLn2);
    if (overwrite) wide_delta(row, a.V, wide, outer_slope(a), y, x);
    return;
  }
  // A masked label's score may be finite in nats and beyond float32 in the unit of log 2.
  const double relative = score > -kInf ? row.relative(linear, top) : wide_score(row, y) - double(top);
  const double mine = exp2(relative), rest = rebase(others, top).sum;
  const OfLabel label = of_label(relative, mine, rest);
  write(label, (double(top) + log2(mine + rest)) * kLn2);
  const T* next = n + 1 < a.n ? x + a.row_stride : nullptr;
  if (overwrite) row_delta(row, a.V, {top, mine + rest}, outer_slope(a), y, label.missing, x, next);
}

template <bool overwrite>
void all_rows(const TokenLogp& a, float* logp, float* lse) {
  dispatch(a, [&](auto row) {
#pragma omp parallel for schedule(static) num_threads(a.threads)
    for (int64_t n = 0; n < a.n; ++n) forward<overwrite>(a, row, n, logp, lse);
  });
}

template <class T, bool has_bias, bool has_softcap>
void backward(const TokenLogp& a, Scores<T, has_bias, has_softcap> row, int64_t n, float logp, double lse, float grad,
              T* out) {
  const int64_t y = a.target[n];
  if (y == a.ignore_index) return fill_zero(out, a.V);
  row.x = static_cast<const T*>(a.logits) + n * a.row_stride;
  const double lse2 = lse * kLog2E, coef = double(grad) * outer_slope(a);
  const float top = float(lse2);
  if (!(std::fabs(top) <= kFar)) return wide_delta(row, a.V, wide_logsumexp(row, a.V, y), coef, y, out);
  const T* nothing = nullptr;
  row_delta(row, a.V, {top, pow2(lse2 - double(top))}, coef, y, -expm1(double(logp)), out, nothing);
}

}  // namespace

void token_logp(const TokenLogp& a, float* logp, float* lse) { all_rows<false>(a, logp, lse); }

void token_logp_delta(const TokenLogp& a, float* logp, float* lse) { all_rows<true>(a, logp, lse); }

void token_logp_grad(const TokenLogp& a, const float* logp, const float* lse, const float* grad_logp, void* grad_logits,
                     int64_t grad_row_stride) {
  dispatch(a, [&](auto row) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(row.x)>>;
#pragma omp parallel for schedule(static) num_threads(a.threads)
    for (int64_t n = 0; n < a.n; ++n)
      backward(a, row, n, logp[n], double(lse[n]) + double(lse[a.n + n]), grad_logp[n],
               static_cast<T*>(grad_logits) + n * grad_row_stride);
  });
}

}  // namespace wrpo::WRPO_LEVEL
