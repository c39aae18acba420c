// The backward pass of attention, for float32, bfloat16 and float16 tensors; all sums are float32.
//
//   P  = 2^(scale log2e Q K^T - log2e lse)     recomputed, never stored beyond a tile
//   dV = P^T dO          dP = dO V^T           delta = rowsum(dO * O) - grad_lse
//   dS = P * (dP - delta)
//   dQ = scale dS K      dK = scale dS^T Q     dbias = dS     dsink = -sum(e^(sink - lse) delta)
//
// A task is one block of keys of one KV head. It meets the blocks of query rows one after the
// other:
//
//                      keys of the task (96)
//                    +------------------------+
//                    | K^T, V^T, scale K, dK, dV: float32, in L2 while the task lives
//                    +------------------------+
//   query rows  +--+ +------------------------+
//   (96) of the |Q | | S -> P        dP -> dS |  two tiles, five products by the micro-GEMM
//   heads of    |dO| +------------------------+
//   the group   +--+   its turn comes: dQ += dS (scale K)
//
// dK and dV belong to one task. dQ collects from every task of its head: a ticket for each block of
// rows makes the blocks of keys add in ascending order, so that the sums have one order, and one
// result, whatever the number of threads and without a copy of dQ for each. Only the last of the
// five products waits; tasks start in ascending order of their keys, so the one waited for is
// always under way. Rows go from last to first: under a causal mask every block of keys can start
// at once.
//
// Tiles outside the band are skipped, tiles inside it take no mask, and on its edges the products
// follow the diagonal in steps of kMaskedRows. Memory: O(tile) a thread, and dQ once in float32.
//
// Dao: FlashAttention-2 (2023), section 3.1.2.
#include "attention/cpu/backward.h"

#include <cmath>

#include "attention/cpu/backward_keys.h"

namespace flashkern::FK_ISA {
namespace attention {
namespace {

constexpr int64_t kSumRows = 256;  // rows of one task of row_sums
constexpr int64_t kRoundElements = 1 << 16;

template <class T>
float dot(const T* a, const T* b, int64_t n) {
  VecF sum{};
  int64_t d = 0;
  for (; d + kLanes <= n; d += kLanes) sum = fma(load(a + d), load(b + d), sum);
  const int tail = static_cast<int>(n - d);
  if (tail > 0) sum = fma(load_partial(a + d, tail), load_partial(b + d, tail), sum);
  return reduce_add(sum);
}

// delta: what the normalisation of the softmax takes from every element of a row of dP.
template <class T>
void row_sums(const BackwardParams& p, const Threads& threads) {
  const int64_t blocks = blocks_of(p.seq_q, kSumRows);
  threads.run(p.batch * p.heads * blocks, [&](int64_t task, int) {
    const int64_t h = task / blocks % p.heads;
    const Sequence s = sequence_of(p, task / blocks / p.heads);
    const int64_t begin = task % blocks * kSumRows;
    for (int64_t i = begin; i < std::min(begin + kSumRows, s.q_length); ++i) {
      float delta = dot(row_of<T>(p.output, s, s.q_start, h, i),
                        row_of<T>(p.grad_output, s, s.q_start, h, i), p.value_dim);
      if (p.grad_lse.data != nullptr) delta -= row_values(p.grad_lse, s, h)[i];
      row_values(p.delta, s, h)[i] = delta;
    }
  });
}

// A sink is a logit without a value: its gradient is its share of the softmax times -delta.
void sink_gradient(const BackwardParams& p, const Threads& threads) {
  if (p.grad_sinks == nullptr) return;
  threads.run(p.heads, [&](int64_t h, int) {
    double total = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      const Sequence s = sequence_of(p, b);
      const float* lse = row_values(p.lse, s, h);
      const float* delta = row_values(p.delta, s, h);
      for (int64_t i = 0; i < s.q_length; ++i) {
        if (lse[i] > -kInf) total -= std::exp(static_cast<double>(p.sinks[h]) - lse[i]) * delta[i];
      }
    }
    static_cast<float*>(p.grad_sinks)[h] = static_cast<float>(total);
  });
}

// The thread's working memory. Torch's pool carries the exception out of the launch.
Tiles tiles_or_abandon(const Problem& p, Tickets& tickets) {
  thread_local Scratch scratch;
  try {
    return Tiles(p, scratch);
  } catch (...) {
    tickets.abandon();
    throw;
  }
}

// A task is a block of keys; the batch rows, heads and keys over which the bias is broadcast are
// its own too where the bias wants a gradient: what sums up is then summed by one task, in order.
template <class T>
void key_blocks(const BackwardParams& p, const Threads& threads) {
  const BiasGradient& g = p.grad_bias;
  const bool biased = g.data != nullptr;
  const int64_t blocks = blocks_of(p.seq_k, tile_keys(p));
  if (p.batch * p.kv_heads * blocks == 0) return;
  const int64_t batch_tasks = biased && g.batch == 0 ? 1 : p.batch;
  const int64_t head_tasks = biased && g.head == 0 ? 1 : p.kv_heads;
  const int64_t block_tasks = biased && g.column == 0 ? 1 : blocks;
  const int64_t batches = p.batch / batch_tasks, heads = p.kv_heads / head_tasks;
  const int64_t task_blocks = blocks / block_tasks;

  Tickets tickets(p);
  threads.run(block_tasks * batch_tasks * head_tasks, [&](int64_t task, int) {
    const Tiles tiles = tiles_or_abandon(p, tickets);
    const int64_t head = task % head_tasks * heads,
                  batch = task / head_tasks % batch_tasks * batches;
    const int64_t block = task / head_tasks / batch_tasks * task_blocks;
    for (int64_t k = block; k < block + task_blocks; ++k) {
      for (int64_t b = batch; b < batch + batches; ++b) {
        const Sequence s = sequence_of(p, b);
        const int64_t tensor_keys =
            p.cu_seqlens_k == nullptr ? p.seq_k : p.cu_seqlens_k[b + 1] - p.cu_seqlens_k[b];
        if (k * tiles.keys >= tensor_keys) continue;
        for (int64_t h = head; h < head + heads; ++h) {
          KeyBlock<T>(p, tickets, tiles, s, h, k).run(tensor_keys);
        }
      }
    }
  });
}

template <class T>
void round_query_gradient(const BackwardParams& p, const Threads& threads) {
  const float* sums = static_cast<const float*>(p.query_sums.data);
  T* out = static_cast<T*>(p.grad_query.data);
  threads.run(blocks_of(p.query_elements, kRoundElements), [&](int64_t task, int) {
    const int64_t begin = task * kRoundElements;
    const int64_t n = std::min(kRoundElements, p.query_elements - begin);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(out + begin + i, load(sums + begin + i));
    for (; i < n; ++i) out[begin + i] = from_float<T>(sums[begin + i]);
  });
}

template <class T>
void backward(const BackwardParams& p, const Threads& threads) {
  row_sums<T>(p, threads);
  sink_gradient(p, threads);
  key_blocks<T>(p, threads);
  if (!std::is_same_v<T, float>) round_query_gradient<T>(p, threads);
}

}  // namespace
}  // namespace attention

void attention_backward(const flashkern::attention::BackwardParams& p, const Threads& threads) {
  using namespace attention;
  if (p.dtype == DType::kBFloat16) return backward<BFloat16>(p, threads);
#ifdef FK_TILES_ALONE
  avx512_bf16::attention_backward(p, threads);
#else
  if (p.dtype == DType::kFloat32) return backward<float>(p, threads);
  backward<Half>(p, threads);
#endif
}

}  // namespace flashkern::FK_ISA
