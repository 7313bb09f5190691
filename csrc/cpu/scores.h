// The scores of a row of logits, in the unit of log 2. For units that are compiled once for each level.
#pragma once
#include <cstring>

#include "../rowmath.h"
#include "token_logp.h"

namespace wrpo::WRPO_LEVEL {
namespace {

constexpr int kVector = 16;  // elements, of the widest vector

// Beyond this score, base 2, float32 has no digits left for z - top: such a row, of a run that diverges, takes doubles.
constexpr float kFar = 4194304.f;  // 2^22

// Four elements at a time: independent chains hide the latency of the sums, and 16-bit rows are read as 32-bit words.
// Elements i, i + q, i + 2q, i + 3q of float32; the two words i and i + q of 16-bit types.
struct Four {
  float a, b, c, d;
};

// What each of the four takes of `count` elements: whole vectors. The rest, a loop of its own, has one tail and not
// four: 28 us instead of 34 for 64 rows of 1000 (AVX-512, 2026-11-26).
WRPO_INLINE int64_t quarter_of(int64_t count) { return count / (4 * kVector) * kVector; }

template <class F>
WRPO_INLINE Four each(Four x, F f) {
  return Four{f(x.a), f(x.b), f(x.c), f(x.d)};
}

using Word = uint32_t __attribute__((aligned(2), may_alias));

template <class T>
WRPO_INLINE Four load_four(const T* x, int64_t i, int64_t q) {
  if constexpr (sizeof(T) == 4) {
    return Four{x[i], x[i + q], x[i + 2 * q], x[i + 3 * q]};
  } else {
    const Word* words = reinterpret_cast<const Word*>(x);
    const Two first = load_two<T>(words[i]), second = load_two<T>(words[i + q]);
    return Four{first.lo, first.hi, second.lo, second.hi};
  }
}

template <class T>
WRPO_INLINE Four load_four_bias(const float* b, int64_t i, int64_t q) {
  if constexpr (sizeof(T) == 4) return load_four(b, i, q);
  return Four{b[2 * i], b[2 * i + 1], b[2 * (i + q)], b[2 * (i + q) + 1]};
}

template <class T>
WRPO_INLINE void store_four(T* x, int64_t i, int64_t q, Four y) {
  if constexpr (sizeof(T) == 4) {
    x[i] = y.a, x[i + q] = y.b, x[i + 2 * q] = y.c, x[i + 3 * q] = y.d;
  } else {
    Word* words = reinterpret_cast<Word*>(x);
    words[i] = store_two<T>(y.a, y.b), words[i + q] = store_two<T>(y.c, y.d);
  }
}

// The base-2 scores of one row, z2 = capped(x + bias) * multiplier, and d z2 / d x = slope(x + bias) * multiplier.
template <class T, bool has_bias, bool has_softcap>
struct Scores {
  const T* x;
  const float* bias;
  float inner;  // scale / softcap
  float multiplier;  // log2 e * inv_temperature * (softcap or scale)

  explicit Scores(const TokenLogp& a)
      : x(nullptr),
        bias(a.bias),
        inner(has_softcap ? float(a.scale / a.softcap) : 1.f),
        multiplier(float(kLog2E * a.inv_temperature * (has_softcap ? a.softcap : a.scale))) {}

  WRPO_INLINE float linear(int64_t v) const { return has_bias ? load(x[v]) + bias[v] : load(x[v]); }

  WRPO_INLINE Four linear_four(int64_t begin, int64_t i, int64_t q) const {
    const Four y = load_four(x + begin, i, q);
    if constexpr (!has_bias) return y;
    const Four b = load_four_bias<T>(bias + begin, i, q);
    return Four{y.a + b.a, y.b + b.b, y.c + b.c, y.d + b.d};
  }

  WRPO_INLINE Tanh capped(float linear) const {
    if constexpr (has_softcap) return tanh_with_slope(linear * inner);
    return Tanh{linear, 1.f};
  }

  WRPO_INLINE float relative(float linear, float top) const {
    return fused_exactly(capped(linear).value, multiplier, -top);
  }
};

WRPO_INLINE float larger(float a, float b) { return a > b ? a : b; }  // b where a is NaN

template <class T>
void fill_zero(T* x, int64_t V) {
  std::memset(static_cast<void*>(x), 0, size_t(V) * sizeof(T));
}

template <class S>
double wide_score(S row, int64_t v) {
  return double(row.capped(row.linear(v)).value) * double(row.multiplier);
}

// A log-sum-exp in doubles, an element at a time: slow, and right for every score that is finite.
struct Wide {
  double top, relative, mine, rest;  // base 2: top + log2(mine + rest), of the label relative = log2(mine)

  // log2 p of a score. One number for the log-sum-exp would leave nothing of log2(mine + rest) beside a large top.
  double log2_p(double score) const { return score - top - log2(mine + rest); }
};

template <class S>
Wide wide_logsumexp(S row, int64_t V, int64_t label) {
  double top = -double(kInf), rest = 0;
  for (int64_t v = 0; v < V; ++v) top = wide_score(row, v) > top ? wide_score(row, v) : top;
  for (int64_t v = 0; v < V; ++v)
    if (v != label) rest += exp2(wide_score(row, v) - top);
  const double relative = wide_score(row, label) - top;
  return Wide{top, relative, exp2(relative), rest};
}

// Calls f with the Scores of the right type.
template <class F>
void dispatch(const TokenLogp& a, F f) {
  auto with_options = [&](auto zero) {
    using T = decltype(zero);
    if (a.bias && a.softcap != 0) return f(Scores<T, true, true>(a));
    if (a.bias) return f(Scores<T, true, false>(a));
    if (a.softcap != 0) return f(Scores<T, false, true>(a));
    return f(Scores<T, false, false>(a));
  };
  if (a.dtype == Dtype::float32) return with_options(float{});
  if (a.dtype == Dtype::bfloat16) return with_options(BFloat16{});
  return with_options(Float16{});
}

// d z / d x where the cap is not felt
double outer_slope(const TokenLogp& a) { return a.scale * a.inv_temperature; }

}  // namespace
}  // namespace wrpo::WRPO_LEVEL
