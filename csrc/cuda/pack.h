// Sixteen bytes of a row, the widest access of a thread, and a row cut into such packs.
#pragma once
#include "../rowmath.h"
#include "block.h"

namespace wrpo::cuda {

// Two 16-bit elements and their word, the first in the low half; one instruction each way on the device.
template <class T>
WRPO_BODY Two unpack_word(uint32_t word) {
  return load_two<T>(word);
}

template <class T>
WRPO_BODY uint32_t pack_word(float lo, float hi) {
  return uint32_t(store<T>(lo).bits) | uint32_t(store<T>(hi).bits) << 16;
}

#if defined(__CUDA_ARCH__)
template <>
WRPO_BODY Two unpack_word<Float16>(uint32_t word) {
  Two two;
  asm("{.reg .f16 lo, hi; mov.b32 {lo, hi}, %2; cvt.f32.f16 %0, lo; cvt.f32.f16 %1, hi;}"
      : "=f"(two.lo), "=f"(two.hi)
      : "r"(word));
  return two;
}

template <>
WRPO_BODY uint32_t pack_word<BFloat16>(float lo, float hi) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(hi), "f"(lo));
  return word;
}

template <>
WRPO_BODY uint32_t pack_word<Float16>(float lo, float hi) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(hi), "f"(lo));
  return word;
}
#endif

template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  uint32_t words[4];
};

// A pack that no thread will want again: it leaves L2 before those that one will.
template <class T>
WRPO_BODY Pack<T> read_last(const Pack<T>* from) {
#if defined(__CUDA_ARCH__)
  const uint4 four = __ldcs(reinterpret_cast<const uint4*>(from));
  return {four.x, four.y, four.z, four.w};
#else
  return *from;
#endif
}

template <class T>
WRPO_BODY void write_last(Pack<T>* to, const Pack<T>& pack) {
#if defined(__CUDA_ARCH__)
  __stcs(reinterpret_cast<uint4*>(to), make_uint4(pack.words[0], pack.words[1], pack.words[2], pack.words[3]));
#else
  *to = pack;
#endif
}

template <int size>
struct Floats {
  float of[size];
};

template <class T>
WRPO_BODY Floats<Pack<T>::kSize> unpack(const Pack<T>& pack) {
  Floats<Pack<T>::kSize> x;
  WRPO_UNROLL
  for (int w = 0; w < 4; ++w) {
    if constexpr (sizeof(T) == 4) {
      x.of[w] = from_bits(pack.words[w]);
    } else {
      const Two two = unpack_word<T>(pack.words[w]);
      x.of[2 * w] = two.lo, x.of[2 * w + 1] = two.hi;
    }
  }
  return x;
}

template <class T>
WRPO_BODY Pack<T> packed(const Floats<Pack<T>::kSize>& x) {
  Pack<T> pack;
  WRPO_UNROLL
  for (int w = 0; w < 4; ++w) {
    if constexpr (sizeof(T) == 4)
      pack.words[w] = to_bits(x.of[w]);
    else
      pack.words[w] = pack_word<T>(x.of[2 * w], x.of[2 * w + 1]);
  }
  return pack;
}

// V elements from `x`: `head` of them before the first 16-byte boundary, whole packs, and a tail. Head and tail
// together are the edges, fewer than two packs.
template <class T>
struct Cut {
  int V, head, packs;

  WRPO_BODY Cut(const T* x, int size) : V(size) {
    const int odd = int(reinterpret_cast<uintptr_t>(x) % 16 / sizeof(T));
    head = odd == 0 ? 0 : Pack<T>::kSize - odd;
    if (head > V) head = V;
    packs = (V - head) / Pack<T>::kSize;
  }

  WRPO_BODY int edges() const { return V - packs * Pack<T>::kSize; }
  WRPO_BODY int edge(int k) const { return k < head ? k : k + packs * Pack<T>::kSize; }
  WRPO_BODY int first_of(int pack) const { return head + pack * Pack<T>::kSize; }
};

template <class T>
WRPO_BODY bool starts_pack(const T* x) {
  return reinterpret_cast<uintptr_t>(x) % 16 == 0;
}

}  // namespace wrpo::cuda
