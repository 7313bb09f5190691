// One kernel body, two executors: a CUDA block, and a loop on the host that plays a block thread after thread.
//
// A body is written in phases. `each(f)` calls f(t) for every thread and then waits for all of them; `one(f)` calls f
// on one thread; a Local<X> holds a value of each thread from one phase to the next. Code between phases runs on every
// CUDA thread but only once when played, so it may compute values that all threads agree on, and read memory that no
// thread writes in a phase beside it. Played on the host, a body shows its arithmetic, its addresses and what it
// forgets to write; not its races, bank conflicts or misaligned accesses.
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
};

// op over shared[0 .. kThreads) in the order of a binary tree, the same on every run; `shared` is overwritten.
template <class Block, class X, class Op>
WRPO_BODY X tree(Block block, X* shared, Op op) {
  for (int half = Block::kThreads / 2; half > 0; half /= 2)
    block.each([&](int t) {
      if (t < half) shared[t] = op(shared[t], shared[t + half]);
    });
  return shared[0];
}

}  // namespace wrpo::cuda
