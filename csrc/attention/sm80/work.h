// Which rows and keys a block of the forward pass has.
//
// The blocks of one KV head come one after another, so that those that run together read the same
// keys. A dense batch has as many for each sequence, numbered from the last rows to the first:
// under a causal mask the longest come first. In a ragged batch the sequences share the blocks of a
// KV head: those that are last in their sequence by rank come first, the short sequences' beside
// the middle ones of the long. The host knows no lengths, so each block finds its own place, and
// those beyond the last return at once:
//
//   sequences of 3, 1, 2 tiles     block   0      1      2      3      4      5      6, 7
//                                          a2     a1     c1     a0     b0     c0     none
#pragma once

#include "attention/mask.h"
#include "attention/sm80/plan.h"
#include "ptx/core.h"

namespace flashkern::attention::sm80 {

// Lives in shared memory; row_end == 0: nothing is the block's own.
struct Work {
  Sequence sequence;
  int kv_head, split;  // the number of its part, where it is not the whole output
  int row_begin, row_end;
  int key_begin, key_end;
  bool whole_output;  // not a part
};
static_assert(sizeof(Work) <= kWorkBytes);

// A block's place among those of its KV head.
struct Place {
  int batch, item;
};

FK_DEVICE SequenceCut cut_of(const Problem& p, const Sequence& s, int tile_rows,
                             const SplitKeys& split) {
  return SequenceCut(p.group() * s.q_length, p.row_beams, s.k_length, tile_rows, split);
}

// By a whole warp, a sequence for each lane, whose blocks it counts once where the batch is no more
// than kKept of them. Blocks are in descending order of their item, those of one item in that of
// their sequences.
class RaggedOrder {
 public:
  FK_DEVICE RaggedOrder(const Problem& p, int tile_rows, const SplitKeys& split)
      : p_(p), tile_rows_(tile_rows), split_(split) {
#pragma unroll
    for (int i = 0; i < kKept; ++i) kept_[i] = 32 * i < p.batch ? items_of(32 * i) : 0;
  }

  FK_DEVICE Place find(int block, int most_items) const {
    int item = 0, above = most_items;  // blocks_from(above) <= block < blocks_from(item)
    if (block >= blocks_from(0)) return {-1, 0};
    while (above - item > 1) {
      const int middle = (item + above) / 2;
      (blocks_from(middle) > block ? item : above) = middle;
    }
    int rank = block - blocks_from(above);
    for (int first = 0;; first += 32) {
      const unsigned has = __ballot_sync(ptx::kAllLanes, items_of(first) > item);
      if (rank < __popc(has)) return {first + nth_bit(has, rank), item};
      rank -= __popc(has);
    }
  }

 private:
  static constexpr int kKept = 8;  // of a lane

  // Of sequence first + lane.
  FK_DEVICE int items_of(int first) const {
    const int b = first + static_cast<int>(ptx::lane_id());
    return b < p_.batch ? cut_of(p_, sequence_of(p_, b), tile_rows_, split_).blocks() : 0;
  }

  // Blocks whose item is at least `item`.
  FK_DEVICE int blocks_from(int item) const {
    int blocks = 0;
#pragma unroll
    for (int kept : kept_) blocks += max(kept - item, 0);
    for (int first = 32 * kKept; first < p_.batch; first += 32) {
      blocks += max(items_of(first) - item, 0);
    }
    return __reduce_add_sync(ptx::kAllLanes, blocks);
  }

  FK_DEVICE static int nth_bit(unsigned bits, int n) {
    for (; n > 0; --n) bits &= bits - 1;
    return __ffs(static_cast<int>(bits)) - 1;
  }

  const Problem& p_;
  int tile_rows_;
  const SplitKeys& split_;
  int kept_[kKept];
};

// By a whole warp.
template <int kTileRows>
FK_DEVICE Work find_work(const Problem& p, const ForwardPlan& plan) {
  Work w = {};
  const bool ragged = p.cu_seqlens_q != nullptr;
  const int head = static_cast<int>(blockIdx.x) / plan.blocks_per_head;
  Place place{head / static_cast<int>(p.kv_heads),
              static_cast<int>(blockIdx.x) % plan.blocks_per_head};
  if (ragged) {
    place = RaggedOrder(p, kTileRows, plan.split_keys).find(place.item, plan.most_blocks);
    if (place.batch < 0) return w;
  }
  w.kv_head = ragged ? head : head % static_cast<int>(p.kv_heads);
  w.sequence = sequence_of(p, place.batch);
  const SequenceCut cut = cut_of(p, w.sequence, kTileRows, plan.split_keys);
  if (place.item >= cut.blocks()) return w;
  const int packed = static_cast<int>(p.packed_rows());
  const int tile = place.item % cut.tiles;
  w.split = place.item / cut.tiles;
  w.row_begin = (ragged ? tile : cut.tiles - 1 - tile) * kTileRows;
  w.row_end = min(w.row_begin + kTileRows, cut.rows);
  w.whole_output = cut.splits == 1 && !plan.parts_only;
  const Interval keys =
      Band(p, w.sequence).some_keys(w.row_begin / packed, (w.row_end - 1) / packed + 1);
  w.key_begin = static_cast<int>(keys.begin);
  w.key_end = static_cast<int>(keys.end);
  if (cut.splits > 1) {
    w.key_begin = max(w.key_begin, w.split * cut.split_keys);
    w.key_end = min(w.key_end, (w.split + 1) * cut.split_keys);
  }
  if (plan.joined) {
    w.split += shared_parts(p, w.sequence.q_length, w.sequence.earlier, plan.split_keys);
  }
  return w;
}

}  // namespace flashkern::attention::sm80
