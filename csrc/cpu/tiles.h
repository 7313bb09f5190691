// Square tiles of a matrix, turned in registers. For units that are compiled once for each level.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

#include "../rowmath.h"

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define WRPO_SHUFFLES
#endif
#endif

namespace wrpo::WRPO_LEVEL {
namespace {

#if defined(__AVX512BW__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLaneBytes = 16;  // shuffles inside lanes of this size are the cheap ones

int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
constexpr int kTile = kVectorBytes / sizeof(T);  // a side of a tile

template <class T>
void turn_part_of_tile(const T* src, int64_t src_stride, T* dst, int64_t dst_stride, int64_t rows, int64_t cols) {
  for (int64_t c = 0; c < cols; ++c)
    for (int64_t r = 0; r < rows; ++r) dst[c * dst_stride + r] = src[r * src_stride + c];
}

#if defined(WRPO_SHUFFLES)

// A tile is turned by perfect shuffles: log2(n) equal rounds in which vectors i and i + n/2 are interleaved into
// vectors 2i and 2i + 1. One set of rounds interleaves the elements of each lane, another whole lanes.

// Where element p comes from when the halves of each `span` of two vectors of `size` are interleaved by `unit`s
constexpr int interleaved(int p, int size, int span, int unit, bool is_upper) {
  const int inside = p % span / unit;
  return p / span * span + is_upper * span / 2 + inside / 2 * unit + p % unit + inside % 2 * size;
}

template <int span, int unit, bool is_upper, class V, int... p>
WRPO_INLINE V interleave(V a, V b, std::integer_sequence<int, p...>) {
  return __builtin_shufflevector(a, b, interleaved(p, sizeof...(p), span, unit, is_upper)...);
}

// The rounds over n vectors, `step` apart
template <int n, int span, int unit, int size, class V>
WRPO_INLINE void shuffle(V* v, int step) {
  constexpr auto elements = std::make_integer_sequence<int, size>();
#pragma GCC unroll 4
  for (int round = 1; round < n; round *= 2) {
    V w[n];
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i) {
      w[2 * i] = interleave<span, unit, false>(v[i * step], v[(i + n / 2) * step], elements);
      w[2 * i + 1] = interleave<span, unit, true>(v[i * step], v[(i + n / 2) * step], elements);
    }
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) v[i * step] = w[i];
  }
}

template <class T>
void turn_tile(const T* src, int64_t src_stride, T* dst, int64_t dst_stride) {
  typedef T V __attribute__((vector_size(kVectorBytes)));
  constexpr int n = kTile<T>, lane = kLaneBytes / sizeof(T), lanes = n / lane;
  V v[n];
#pragma GCC unroll 4
  for (int r = 0; r < n; r += lane) {
#pragma GCC unroll 8
    for (int i = 0; i < lane; ++i) std::memcpy(&v[r + i], src + (r + i) * src_stride, sizeof(V));
    shuffle<lane, lane, 1, n>(v + r, 1);
  }
#pragma GCC unroll 8
  for (int i = 0; i < lane; ++i) {
    shuffle<lanes, n, lane, n>(v + i, lane);
#pragma GCC unroll 4
    for (int c = 0; c < n; c += lane) std::memcpy(dst + (c + i) * dst_stride, &v[c + i], sizeof(V));
  }
}

#else

template <class T>
void turn_tile(const T* src, int64_t src_stride, T* dst, int64_t dst_stride) {
  turn_part_of_tile(src, src_stride, dst, dst_stride, kTile<T>, kTile<T>);
}

#endif

}  // namespace
}  // namespace wrpo::WRPO_LEVEL
