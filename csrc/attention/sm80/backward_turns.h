// How the blocks of a KV head add up dQ, in one order and without atomics on sums.
//
// Blocks of keys that see a tile of query rows take turns at its float32 sums, the last keys first:
// the first block stores, the others add, the last one writes dQ. So nothing starts as zeros and
// nothing is converted after. A block's step waits for that of the block before it in the order:
// blocks take their keys by a ticket, the last keys of a head first, so what a block waits for is
// the work of one that has started.
#pragma once

#include "attention/sm80/gradient.h"
#include "ptx/global.h"

namespace flashkern::attention::sm80 {

// A tile of packed query rows and the blocks of keys that see some of it.
template <int kKeys, int kRows>
struct QueryTile {
  Place start;
  int rows;                // of kRows, those that are there
  int last_block, blocks;  // contributors: last_block first
  bool whole;              // every row is there and sees every key of the block that asks

  FK_DEVICE QueryTile(const KeyBand& band, const Group& group, Place start, int rows, int key)
      : start(start), rows(min(rows, kRows)) {
    const int last = start.after(this->rows - 1, group).query;
    last_block = (band.end(last) - 1) / kKeys;
    blocks = last_block - band.first(start.query) / kKeys + 1;
    whole = rows >= kRows && band.first(last) <= key && band.end(start.query) >= key + kKeys;
  }
};

// A block's turn at the sums of a tile: one thread waits and one passes it on, behind a barrier
// that follows the block's own sums; a barrier hands on what the wait was handed. Turns are
// counted, and a waiter asks for so many or more: where cu_seqlens of a GPU, which nobody has
// checked, say that sequences overlap, they share a tile's count, and still nobody waits for ever.
struct Turn {
  int* turns;  // of every tile: a constant, which takes no register
  int tile = 0, mine = 0, blocks = 0;

  FK_DEVICE bool first() const { return mine == 0; }
  FK_DEVICE bool last() const { return mine + 1 == blocks; }
  FK_DEVICE void wait() const {
    if (first()) return;
    while (ptx::load_relaxed(turns + tile) < mine) __nanosleep(32);
    ptx::load_acquire(turns + tile);
  }
  FK_DEVICE void pass() const {
    if (mine + 1 < blocks) ptx::add_release(turns + tile, 1);
  }
};

// Sums in the registers' own order: a lane's four to its neighbour's. Past L1, where other
// multiprocessors' sums do not arrive.
template <int M, int N>
FK_DEVICE void load_sums(float (&d)[M][N][4], const float* sums) {
  const auto* from = reinterpret_cast<const float4*>(sums) + ptx::lane_id();
#pragma unroll
  for (int i = 0; i < M * N; ++i) {
    const float4 four = __ldcg(from + 32 * i);
    float (&to)[4] = d[i / N][i % N];
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
  }
}
template <int M, int N>
FK_DEVICE void store_sums(const float (&d)[M][N][4], float* sums) {
  auto* to = reinterpret_cast<float4*>(sums) + ptx::lane_id();
#pragma unroll
  for (int i = 0; i < M * N; ++i) {
    const float (&from)[4] = d[i / N][i % N];
    __stcg(to + 32 * i, make_float4(from[0], from[1], from[2], from[3]));
  }
}

}  // namespace flashkern::attention::sm80
