// The arithmetic of one row, shared by host and device code: 2^x, tanh, half-precision storage and the running
// log-sum-exp. No intrinsics and no branches in the element functions, so a loop over them vectorises under "omp simd"
// for any instruction set.
//
// Scores are handled in base 2 (z * log2 e): the scale, the temperature and log2 e are then one multiplier.
//
// Compile with -fno-trapping-math -fno-math-errno -ffp-contract=off, never -ffast-math: infinities, NaN and the
// rounding tricks need IEEE rules, and products are fused only where `fused` says so.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define WRPO_INLINE __host__ __device__ __forceinline__
#else
// Always inlined: units built for different instruction sets must not share one out-of-line copy.
#define WRPO_INLINE inline __attribute__((always_inline))
#endif

namespace wrpo {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;
constexpr float kInf = __builtin_inff();

WRPO_INLINE float from_bits(uint32_t u) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(u);
#else
  float f;
  std::memcpy(&f, &u, 4);
  return f;
#endif
}

WRPO_INLINE uint32_t to_bits(float f) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(f);
#else
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
#endif
}

WRPO_INLINE float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;  // without an FMA unit the exact form is a slow library call
#endif
}

// a * b + c with the product as it is, for a difference of large scores: in doubles where there is no FMA unit.
WRPO_INLINE float fused_exactly(float a, float b, float c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return float(double(a) * double(b) + double(c));
#endif
}

// elementary functions

// 2^x for x < 127, relative error < 2e-7. Below 2^-126 (also -inf) exactly 0; NaN stays NaN; pow2(0) == 1.
WRPO_INLINE float pow2(float x) {
#if defined(__CUDA_ARCH__)
  float y;  // the same limits; relative error < 2^-22
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float shifted = x + 12583039.f;        // 1.5 * 2^23 + 127: the low bits hold the nearest integer + 127
  const float r = x - (shifted - 12583039.f);  // in [-1/2, 1/2], exact
  float p = 0.00132647273f;                    // minimax of (2^r - 1) / r, error 9.1e-8
  p = fused(p, r, 0.00967151299f);
  p = fused(p, r, 0.0555073358f);
  p = fused(p, r, 0.240222424f);
  p = fused(p, r, 0.693147004f);
  p = fused(p, r, 1.f);
  const float y = p * from_bits(to_bits(shifted) << 23);
  return x < -126.f ? 0.f : y;
#endif
}

WRPO_INLINE double pow2(double x) { return exp2(x); }

struct Tanh {
  float value;  // tanh(u)
  float slope;  // 1 - tanh(u)^2, to full relative accuracy: no cancellation where tanh is near 1
};

WRPO_INLINE Tanh tanh_with_slope(float u) {
  const float a = u < 0.f ? -u : u;
  const float e = pow2(a * float(-2 * kLog2E));  // exp(-2|u|)
  const float q = 1.f / (1.f + e);
  const float u2 = u * u;
  float p = 0.0172414910f;  // minimax of (tanh(u) / u - 1) / u^2 on |u| < 1/2, error 1.5e-8
  p = fused(p, u2, -0.0530454926f);
  p = fused(p, u2, 0.133258790f);
  p = fused(p, u2, -0.333331436f);
  const float near_zero = fused(u * u2, p, u);
  const float far = (1.f - e) * q;
  const float value = a < 0.5f ? near_zero : (u < 0.f ? -far : far);
  return Tanh{value, 4.f * e * q * q};
}

// storage types

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

WRPO_INLINE float load(float x) { return x; }

WRPO_INLINE float load(BFloat16 x) { return from_bits(uint32_t(x.bits) << 16); }

WRPO_INLINE float load(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  const uint32_t normal = (magnitude << 13) + (magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u);
  // 1/2 has unit 2^-24, the unit of fp16 subnormals: right even where the CPU flushes float32 subnormals to zero.
  const uint32_t subnormal = to_bits(from_bits(0x3f000000u | magnitude) - 0.5f);
  return from_bits(sign | (magnitude < 0x400u ? subnormal : normal));
}

template <class T>
WRPO_INLINE T store(float x);  // rounds to nearest even

template <>
WRPO_INLINE float store<float>(float x) {
  return x;
}

template <>
WRPO_INLINE BFloat16 store<BFloat16>(float x) {
  const uint32_t u = to_bits(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return BFloat16{uint16_t((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
}

template <>
WRPO_INLINE Float16 store<Float16>(float x) {
  const uint32_t u = to_bits(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;  // the addition rounds
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;           // 0x38800000 = 2^-14
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return Float16{uint16_t(sign | (magnitude >= 0x477ff000u ? special : finite))};  // 0x477ff000 = 65520
}

// Two neighbours of a 16-bit row in one 32-bit word, the first in the low half: cheaper than widening each alone.
struct Two {
  float lo, hi;
};

template <class T>
WRPO_INLINE Two load_two(uint32_t word) {
  return Two{load(T{uint16_t(word)}), load(T{uint16_t(word >> 16)})};
}

template <>
WRPO_INLINE Two load_two<BFloat16>(uint32_t word) {
  return Two{from_bits(word << 16), from_bits(word & 0xffff0000u)};
}

template <class T>
WRPO_INLINE uint32_t store_two(float lo, float hi) {
  return uint32_t(store<T>(lo).bits) | uint32_t(store<T>(hi).bits) << 16;
}

// Veltkamp's splitting, x * 65537 - (x * 65537 - x): x rounded to 8 bits, in three operations and without a test for
// NaN. Beyond 2^111, where the product overflows, the result is NaN; below 2^-126 low bits are left over.
WRPO_INLINE float round_to_bfloat16(float x) {
  const float t = x * 65537.f;
  return t - (t - x);
}

template <>
WRPO_INLINE uint32_t store_two<BFloat16>(float lo, float hi) {
  return to_bits(round_to_bfloat16(lo)) >> 16 | (to_bits(round_to_bfloat16(hi)) & 0xffff0000u);
}

// running log-sum-exp, base 2

// Stands for log2(sum) + top. `top` is a reference near the maximum, not the maximum itself.
template <class Real>
struct LogSumExp {
  float top;
  Real sum;
};

template <class Real>
WRPO_INLINE LogSumExp<Real> rebase(LogSumExp<Real> a, float top) {
  if (a.top == top || a.sum == Real(0)) return LogSumExp<Real>{top, a.sum};
  return LogSumExp<Real>{top, a.sum * pow2(Real(a.top) - Real(top))};
}

// What the label has of a row, from sums relative to one reference: its own term `mine` = 2^relative and the `rest`.
// Where the label is nearly certain 1 - p is the small number, so it is never computed as a difference.
struct OfLabel {
  double logp;     // nats
  double missing;  // 1 - p
};

WRPO_INLINE OfLabel of_label(double relative, double mine, double rest) {
  const double logp = mine > rest ? -log1p(rest / mine) : relative * kLn2 - log(mine + rest);
  return OfLabel{logp >= 0 ? 0.0 : logp, rest / (mine + rest)};
}

// A log-sum-exp as two floats: one alone has fewer digits after the point the larger the scores are.
struct Halves {
  float high, low;
};

WRPO_INLINE Halves halves_of(double value) {
  const float high = float(value);
  return Halves{high, float(value - double(high))};
}

}  // namespace wrpo
