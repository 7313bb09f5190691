// One kernel body, two executors: a CUDA block, and a loop on the host that plays a block thread after thread.
//
// A body is written in phases. `each(f)` calls f(t) for every thread and then waits for all of them; `one(f)` calls f
// on one thread; a Local<X> holds a value of each thread from one phase to the next; `reduced(shared, op, f)` is op
// over the f(t) of all threads, in the order of a binary tree, the same on every run. op(a, b) and op(b, a) are the
// same bits. Code between phases runs on every CUDA thread but only once when played, so it may compute values that all
// threads agree on, and read memory that no thread writes in a phase beside it. Played on the host, a body shows its
// arithmetic, its addresses and what it forgets to write; not its races, bank conflicts or misaligned accesses.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define WRPO_BODY __device__ __forceinline__
#define WRPO_UNROLL _Pragma("unroll")
#else
#define WRPO_BODY inline
#define WRPO_UNROLL
#endif

namespace wrpo::cuda {

#if defined(__CUDACC__)
template <int threads>
struct CudaBlock {
  static constexpr int kThreads = threads;

  template <class X>
  struct Local {
    X value;
    WRPO_BODY X& operator()(int) { return value; }
  };

  template <class F>
  WRPO_BODY void each(F f) const {
    f(int(threadIdx.x));
    __syncthreads();
  }

  template <class F>
  WRPO_BODY void one(F f) const {
    if (threadIdx.x == 0) f();
  }

  // Lanes trade by shuffles and warps through `shared` [kThreads / 32], with one barrier in all: at most one call a
  // kernel may use the same `shared`.
  template <class X, class Op, class F>
  WRPO_BODY X reduced(X* shared, Op op, F f) const {
    X value = f(int(threadIdx.x));
    WRPO_UNROLL
    for (int apart = 16; apart > 0; apart /= 2) value = op(value, of_lane(value, apart));
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
    __syncthreads();
    value = shared[threadIdx.x % kWarps];
    WRPO_UNROLL
    for (int apart = kWarps / 2; apart > 0; apart /= 2) value = op(value, of_lane(value, apart));
    return value;
  }

 private:
  static constexpr int kWarps = threads / 32;

  // The value of the lane whose number differs in the bit `apart`.
  template <class X>
  WRPO_BODY static X of_lane(X value, int apart) {
    static_assert(sizeof(X) % 4 == 0, "a shuffle moves words of 32 bits");
    uint32_t words[sizeof(X) / 4];
    memcpy(words, &value, sizeof(X));
    WRPO_UNROLL
    for (uint32_t& word : words) word = __shfl_xor_sync(0xffffffffu, word, apart);
    memcpy(&value, words, sizeof(X));
    return value;
  }
};
#endif

template <int threads>
struct PlayedBlock {
  static constexpr int kThreads = threads;

  template <class X>
  struct Local {
    X values[threads];
    X& operator()(int t) { return values[t]; }
  };

  template <class F>
  void each(F f) const {
    for (int t = 0; t < threads; ++t) f(t);
  }

  template <class F>
  void one(F f) const {
    f();
  }

  template <class X, class Op, class F>
  X reduced(X*, Op op, F f) const {
    X values[threads];
    for (int t = 0; t < threads; ++t) values[t] = f(t);
    for (int apart = 16; apart > 0; apart /= 2)  // within a warp
      for (int t = 0; t < threads; ++t)
        if (t % 32 < apart) values[t] = op(values[t], values[t + apart]);
    for (int apart = threads / 64; apart > 0; apart /= 2)
      for (int warp = 0; warp < apart; ++warp) values[32 * warp] = op(values[32 * warp], values[32 * (warp + apart)]);
    return values[0];
  }
};

}  // namespace wrpo::cuda
