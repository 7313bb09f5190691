// One thread a group. A block reads the sequences a tile at a time into shared memory and each thread picks those of
// its group, in order: any order of groups gives the same bits as the CPU kernel's sums, without atomics.
#pragma once
#include "block.h"
#include "preference_loss.h"

namespace wrpo::cuda {

constexpr int kGroupThreads = 128;
constexpr int64_t kStray = -1;  // instead of a group outside [0, G)
constexpr uint32_t kNaN = 0x7fc00000u;

// Block 0 also serves sequences without a group, so there is one even without groups.
inline unsigned blocks_for_groups(int64_t G) { return G > 0 ? unsigned((G - 1) / kGroupThreads + 1) : 1; }

struct Tile {
  SequenceTerms terms[kGroupThreads];
  int64_t group[kGroupThreads];
};

WRPO_BODY bool is_group(const PreferenceLoss& a, int64_t g) { return g >= 0 && g < a.G; }

// Calls f(s, k, t) in every thread t for each sequence s of its group, and of none; tile.terms[k] belongs to s.
template <class Block, class F>
WRPO_BODY void each_sequence_of_group(Block block, const PreferenceLoss& a, int64_t first_group, Tile& tile, F f) {
  for (int64_t begin = 0; begin < a.S; begin += kGroupThreads) {
    const int count = int(a.S - begin < kGroupThreads ? a.S - begin : kGroupThreads);
    block.each([&](int t) {
      if (t >= count) return;
      tile.terms[t] = sequence_terms(a, begin + t);
      tile.group[t] = a.group[begin + t];
      if (is_group(a, tile.group[t])) return;
      tile.group[t] = kStray;
      tile.terms[t].margin = from_bits(kNaN);
    });
    block.each([&](int t) {
      for (int k = 0; k < count; ++k)
        if (tile.group[k] == first_group + t || tile.group[k] == kStray) f(begin + k, k, t);
    });
  }
}

template <class Block>
WRPO_BODY void write_rewards(Block block, const PreferenceLoss& a) {
  block.each([&](int t) {
    for (int64_t s = t; s < a.S; s += kGroupThreads) {
      a.reward[s] = float(sequence_terms(a, s).reward);
      if (!is_group(a, a.group[s])) a.reward[s] = a.coef[s] = from_bits(kNaN);
    }
  });
}

template <class Block>
WRPO_BODY void preference_loss_body(Block block, int64_t block_index, const PreferenceLoss& a, Tile& tile) {
  const int64_t first_group = block_index * kGroupThreads;
  if (block_index == 0) write_rewards(block, a);
  typename Block::template Local<double> margin, nll_loss, slope;
  typename Block::template Local<bool> is_empty;
  block.each([&](int t) {
    margin(t) = first_group + t < a.G ? -gamma_of(a, first_group + t) : 0.0;
    nll_loss(t) = 0.0, is_empty(t) = true;
  });
  each_sequence_of_group(block, a, first_group, tile, [&](int64_t, int k, int t) {
    margin(t) += tile.terms[k].margin;
    nll_loss(t) += tile.terms[k].nll_loss;
    is_empty(t) = false;
  });
  block.each([&](int t) {
    if (is_empty(t)) margin(t) = from_bits(kNaN);
    if (first_group + t < a.G) slope(t) = finish_group(a, first_group + t, margin(t), nll_loss(t));
  });
  each_sequence_of_group(block, a, first_group, tile, [&](int64_t s, int k, int t) {
    if (tile.group[k] == first_group + t) a.coef[s] = coefficient(tile.terms[k], slope(t));
  });
}

}  // namespace wrpo::cuda
