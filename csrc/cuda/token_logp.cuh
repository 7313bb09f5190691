// The bodies of the row kernels: one block a row, 16 bytes a thread at a time.
//
// delta reads its row once from device memory: what fits stays in shared memory, the rest is read again, last pack
// first, from L2. Nothing else is left standing there: what is read or written for the last time says so.
#pragma once
#include "pack.h"
#include "token_logp.h"

namespace wrpo::cuda {

// The same for the forward and delta, so that both add up a row in one order: a policy has the bits of its reference.
// 256 threads make the forward 0.95 times a copy at V = 32000 too, where 512 take 1.14, and delta slower (H200,
// 2026-11-26).
constexpr int kRowThreads = 512;
constexpr int kRowBlocks = 2;  // on a multiprocessor: one reads while the other finishes its row
constexpr int kAhead = 4;  // packs of a thread under way at a time: 64 KB on an SM with 1024 threads

// A pack is summed against a past reference unless it holds a score more than 2^kStale times above it.
constexpr float kStale = 8.f;

// Beyond this log-sum-exp, base 2, its two floats have too few digits left for a difference to a score.
constexpr float kFar = 4194304.f;  // 2^22

// What a kernel knows of its problem; the factors are settled on the host, in double.
struct Rows {
  void* logits;
  int64_t n, row_stride;
  int V;
  const int64_t* target;
  int64_t ignore_index;
  const float* bias;
  float inner;       // scale / softcap, where there is one
  float multiplier;  // >= 0: log2 e * inv_temperature * (softcap or |scale|)
  float slope;       // scale * inv_temperature: d z / d x where the cap is not felt
};

inline Rows rows_of(const TokenLogp& a) {
  const double inner = a.softcap != 0 ? a.scale / a.softcap : 1.0;
  const double multiplier = kLog2E * a.inv_temperature *
                            (a.softcap != 0 ? a.softcap
                             : a.scale < 0  ? -a.scale
                                            : a.scale);
  return {a.logits,       a.n,    a.row_stride, int(a.V),          a.target,
          a.ignore_index, a.bias, float(inner), float(multiplier), float(a.scale * a.inv_temperature)};
}

WRPO_BODY float larger(float a, float b) {
#if defined(__CUDA_ARCH__)
  return fmaxf(a, b);
#else
  return a > b ? a : b;  // b where a is NaN
#endif
}

// Stands for log2(sum) + multiplier * top. `top` is a capped score: differences of those are right to their last digit
// however large the scores are.
using Sum = LogSumExp<float>;

// a.sum, relative to another reference.
WRPO_BODY float moved(Sum a, float top, float multiplier) {
  return a.top == top || a.sum == 0.f ? a.sum : a.sum * pow2((a.top - top) * multiplier);
}

WRPO_BODY Sum merged(Sum a, Sum b, float multiplier) {
  if (b.sum == 0.f) return a;
  if (a.sum == 0.f) return b;
  const float top = larger(a.top, b.top);
  return Sum{top, moved(a, top, multiplier) + moved(b, top, multiplier)};
}

// What happens to a linear score before the multiplier, settled when a kernel is chosen: most rows pay nothing.
enum class Cap { none, negated, tanh };

// The scores of one row: z log2 e = multiplier * capped(x + bias).
template <class Element, Cap cap>
struct Scores {
  using T = Element;
  static constexpr int kSize = Pack<T>::kSize;
  const T* x;
  const float* bias;  // or nullptr
  float inner, multiplier;

  WRPO_BODY Scores(const Rows& a, int64_t n)
      : x(static_cast<const T*>(a.logits) + n * a.row_stride), bias(a.bias), inner(a.inner), multiplier(a.multiplier) {}

  WRPO_BODY Floats<1> linear(int v) const { return {bias ? load(x[v]) + bias[v] : load(x[v])}; }

  WRPO_BODY Floats<kSize> linear(const Pack<T>& pack, int first) const {
    Floats<kSize> y = unpack<T>(pack);
    if (bias) {
      WRPO_UNROLL
      for (int j = 0; j < kSize; ++j) y.of[j] += bias[first + j];
    }
    return y;
  }

  WRPO_BODY Tanh capped(float linear) const {
    if constexpr (cap == Cap::tanh) return tanh_with_slope(linear * inner);
    return Tanh{cap == Cap::negated ? -linear : linear, 1.f};
  }

  WRPO_BODY float relative(float capped, float top) const { return (capped - top) * multiplier; }

  // Caps `y`; the largest of it but for the element `label` if that is one of them.
  template <bool has_label, int size>
  WRPO_BODY float cap_all(Floats<size>& y, int label) const {
    float max = -kInf;
    WRPO_UNROLL
    for (int j = 0; j < size; ++j) {
      y.of[j] = capped(y.of[j]).value;
      if (!has_label || j != label) max = larger(y.of[j], max);
    }
    return max;
  }

  // The reference of a sum that takes in capped scores up to `max`: it moves only where it must.
  WRPO_BODY float reference(Sum total, float max) const {
    if (total.sum == 0.f) return max > -kInf ? max : 0.f;  // nothing above -inf so far: it may still fall
    return relative(max, total.top) > kStale ? max : total.top;
  }

  // factor * d z/dx * 2^(relative to top)
  template <int size>
  WRPO_BODY Floats<size> softmax_part(Floats<size> y, float factor, float top) const {
    WRPO_UNROLL
    for (int j = 0; j < size; ++j) {
      const Tanh t = capped(y.of[j]);
      y.of[j] = factor * t.slope * pow2(relative(t.value, top));
    }
    return y;
  }
};

// Takes `y`, the linear scores from column `first` on, into the sum, but for the element `label` if that is one of
// them.
template <bool has_label, class S, int size>
WRPO_BODY void add(const S& row, Sum& total, Floats<size> y, int /*first*/, int label = -1) {
  const float max = row.template cap_all<has_label>(y, label), top = row.reference(total, max);
  total = Sum{top, moved(total, top, row.multiplier)};
  WRPO_UNROLL
  for (int j = 0; j < size; ++j)
    if (!has_label || j != label) total.sum += pow2(row.relative(y.of[j], top));
}

// Calls f(pack, i) for the packs of thread t, i = t, t + threads, ..., reading kAhead of them at a time by `read(i)`;
// backwards, the last of these come first.
template <class T, bool backwards, class Read, class F>
WRPO_BODY void each_pack(int t, int threads, int packs, Read read, F f) {
  const int step = kAhead * threads, steps = packs > t ? (packs - t - 1) / step + 1 : 0;
  for (int k = 0; k < steps; ++k) {
    const int first = t + (backwards ? steps - 1 - k : k) * step;
    Pack<T> ahead[kAhead];
    WRPO_UNROLL
    for (int j = 0; j < kAhead; ++j)
      if (first + j * threads < packs) ahead[j] = read(first + j * threads);
    WRPO_UNROLL
    for (int j = 0; j < kAhead; ++j)
      if (first + j * threads < packs) f(ahead[j], first + j * threads);
  }
}

template <class T>
WRPO_BODY void write(T* out, const Pack<T>& pack, bool aligned) {
  if (aligned) return write_last(reinterpret_cast<Pack<T>*>(out), pack);
  const Floats<Pack<T>::kSize> x = unpack<T>(pack);
  for (int j = 0; j < Pack<T>::kSize; ++j) out[j] = store<T>(x.of[j]);
}

template <class T, class Block>
WRPO_BODY void fill(Block block, T* out, int V, float value) {
  const Cut<T> cut(out, V);
  Floats<Pack<T>::kSize> values;
  for (float& x : values.of) x = value;
  block.each([&](int t) {
    if (t < cut.edges()) out[cut.edge(t)] = store<T>(value);
    for (int i = t; i < cut.packs; i += Block::kThreads) write(out + cut.first_of(i), packed<T>(values), true);
  });
}

// The sum over a row but for its label, whose term would hide the others where it is nearly certain; `none` is that of
// nothing. The first `num_kept` packs are left in `kept`, each by the thread that will want it again.
template <class Block, class S, class Sums>
WRPO_BODY Sums sum_of_others(Block block, S row, Cut<typename S::T> cut, int64_t label, Sums none, Sums* partial,
                             Pack<typename S::T>* kept, int num_kept) {
  using T = typename S::T;
  const Pack<T>* packs = reinterpret_cast<const Pack<T>*>(row.x + cut.head);
  const auto merge = [multiplier = row.multiplier](Sums a, Sums b) { return merged(a, b, multiplier); };
  return block.reduced(partial, merge, [&](int t) {
    Sums total = none;
    if (t < cut.edges() && cut.edge(t) != label) add<false>(row, total, row.linear(cut.edge(t)), cut.edge(t));
    each_pack<T, false>(
        t, Block::kThreads, cut.packs, [&](int i) { return i < num_kept ? read_last(packs + i) : packs[i]; },
        [&](const Pack<T>& pack, int i) {
          if (i < num_kept) kept[i] = pack;
          const int first = cut.first_of(i);
          if (label >= first && label < first + S::kSize)
            add<true>(row, total, row.linear(pack, first), first, int(label - first));
          else
            add<false>(row, total, row.linear(pack, first), first);
        });
    return total;
  });
}

// A row's sum in its two parts, relative to `top`, and the score of the label, relative to it too, base 2.
struct Parts {
  float top, relative, mine, rest;
};

// `linear_target` NaN makes NaN of all.
template <class S>
WRPO_BODY Parts with_label(const S& row, Sum others, float linear_target) {
  const float label = row.capped(linear_target).value, top = others.sum == 0.f ? label : larger(label, others.top);
  const float relative = row.relative(label, top);
  return {top, relative, pow2(relative), moved(others, top, row.multiplier)};
}

// out[v] = f(linear scores), of the target `of_target`; out may be the row itself.
template <class Block, class S, class F>
WRPO_BODY void each_score(Block block, S row, Cut<typename S::T> cut, int64_t target, float of_target,
                          typename S::T* out, const Pack<typename S::T>* kept, int num_kept, F f) {
  using T = typename S::T;
  const Pack<T>* packs = reinterpret_cast<const Pack<T>*>(row.x + cut.head);
  const bool aligned = starts_pack(out + cut.head);
  block.each([&](int t) {
    if (t < cut.edges()) out[cut.edge(t)] = store<T>(f(row.linear(cut.edge(t))).of[0]);
    each_pack<T, true>(
        t, Block::kThreads, cut.packs, [&](int i) { return i < num_kept ? kept[i] : read_last(packs + i); },
        [&](const Pack<T>& pack, int i) {
          const int first = cut.first_of(i);
          write(out + first, packed<T>(f(row.linear(pack, first))), aligned);
        });
  });
  block.one([&] {
    if (target < 0 || target >= cut.V) return;  // the row is NaN
    out[target] = store<T>(of_target);
  });
}

// out[v] = coef * d z/dx * (1[v = target] - 2^(relative to top) / sum), of the target by `missing`, its 1 - p.
// `linear_target` was read before any thread came here.
template <class Block, class S>
WRPO_BODY void row_delta(Block block, S row, Cut<typename S::T> cut, Sum total, float coef, int64_t target,
                         float missing, float linear_target, typename S::T* out, const Pack<typename S::T>* kept,
                         int num_kept) {
  const float factor = -coef / total.sum, of_target = coef * missing * row.capped(linear_target).slope;
  each_score(block, row, cut, target, of_target, out, kept, num_kept,
             [&](auto y) { return row.softmax_part(y, factor, total.top); });
}

template <class S>
WRPO_BODY float linear_or_nan(const S& row, int64_t target, int V) {
  return target >= 0 && target < V ? row.linear(int(target)).of[0] : from_bits(0x7fc00000u);
}

WRPO_BODY float logp_of(Parts a) { return float(of_label(a.relative, a.mine, a.rest).logp); }

WRPO_BODY Halves lse_of(Parts a, float multiplier) {
  return halves_of((double(a.top) * double(multiplier) + log2(double(a.mine + a.rest))) * kLn2);
}

template <bool overwrite, class S, class Block>
WRPO_BODY void token_logp_body(Block block, int64_t n, const Rows& a, float* logp, float* lse, Sum* partial,
                               Pack<typename S::T>* kept, int num_kept) {
  using T = typename S::T;
  T* x = static_cast<T*>(a.logits) + n * a.row_stride;
  const int64_t y = a.target[n];
  if (y == a.ignore_index) {
    block.one([&] { logp[n] = lse[n] = lse[a.n + n] = 0.f; });
    if constexpr (overwrite) fill(block, x, a.V, 0.f);
    return;
  }
  const S row(a, n);
  const Cut<T> cut(row.x, a.V);
  const float linear_target = linear_or_nan(row, y, a.V);
  const Sum others = sum_of_others(block, row, cut, y, Sum{}, partial, kept, num_kept);
  const Parts parts = with_label(row, others, linear_target);
  const float sum = parts.mine + parts.rest;
  block.one([&] {
    logp[n] = logp_of(parts);
    const Halves halves = lse_of(parts, row.multiplier);
    lse[n] = halves.high, lse[a.n + n] = halves.low;
  });
  if constexpr (overwrite)
    row_delta(block, row, cut, {parts.top, sum}, a.slope, y, parts.rest / sum, linear_target, x, kept, num_kept);
}

// The sum over a row from its log-sum-exp in nats.
template <class S>
WRPO_BODY Sum sum_from(const S& row, double lse) {
  const float top = row.multiplier > 0.f ? float(lse * (kLog2E / double(row.multiplier))) : 0.f;
  return {top, pow2(float(lse * kLog2E - double(top) * double(row.multiplier)))};
}

// A row's sum and the 1 - p of its label, from its logp and its log-sum-exp, nats, where that has the digits.
struct Total {
  Sum sum;
  float missing;
};

template <class S, class Block>
WRPO_BODY Total total_of(Block block, const S& row, Cut<typename S::T> cut, int64_t label, float linear_target,
                         float logp, Halves lse, Sum* partial) {
  const float size = lse.high < 0.f ? -lse.high : lse.high;
  if (!(size * float(kLog2E) > kFar))  // NaN too: it makes NaN of the row
    return {sum_from(row, double(lse.high) + double(lse.low)), -expm1f(logp)};
  Pack<typename S::T>* nothing = nullptr;
  const Parts parts = with_label(row, sum_of_others(block, row, cut, label, Sum{}, partial, nothing, 0), linear_target);
  return {{parts.top, parts.mine + parts.rest}, parts.rest / (parts.mine + parts.rest)};
}

template <class S, class Block>
WRPO_BODY void token_logp_grad_body(Block block, int64_t n, const Rows& a, const float* logp, const float* lse,
                                    const float* grad_logp, typename S::T* out, Sum* partial) {
  using T = typename S::T;
  const int64_t y = a.target[n];
  if (y == a.ignore_index) return fill(block, out, a.V, 0.f);
  const S row(a, n);
  const Cut<T> cut(row.x, a.V);
  const float linear_target = linear_or_nan(row, y, a.V);
  block.each([](int) {});  // every thread has read the target's logit before any overwrites it
  const Total total = total_of(block, row, cut, y, linear_target, logp[n], {lse[n], lse[a.n + n]}, partial);
  const Pack<T>* nothing = nullptr;
  row_delta(block, row, cut, total.sum, grad_logp[n] * a.slope, y, total.missing, linear_target, out, nothing, 0);
}

// Calls f with a null pointer to the Scores of the right type.
template <class F>
void dispatch(const TokenLogp& a, F f) {
  auto of_type = [&](auto zero) {
    using T = decltype(zero);
    if (a.softcap != 0) return f(static_cast<Scores<T, Cap::tanh>*>(nullptr));
    if (a.scale < 0) return f(static_cast<Scores<T, Cap::negated>*>(nullptr));
    return f(static_cast<Scores<T, Cap::none>*>(nullptr));
  };
  if (a.dtype == Dtype::float32) return of_type(float{});
  if (a.dtype == Dtype::bfloat16) return of_type(BFloat16{});
  return of_type(Float16{});
}

}  // namespace wrpo::cuda
