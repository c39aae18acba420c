// Stable-ABI adapters of beam top-k.
#pragma once

#include <optional>
#include <tuple>

#include "torch/tensor.h"

namespace flashkern {

// logits (B, beams, V), beam_scores (B, beams) float32, logsumexp (B, beams) float32 or none.
// What a beam may take (beam/params.h): excluded (B, beams, n) int64; nodes (B, beams) int64 with
// trie_starts (nodes + 1) and trie_tokens (edges) int32; each or none.
// Returns scores (B, k) float32, tokens (B, k) int64, parents (B, k) int64, logsumexp (B, beams)
// float32.
std::tuple<Tensor, Tensor, Tensor, Tensor> beam_topk(Tensor logits, Tensor beam_scores, int64_t k,
                                                     std::optional<Tensor> logsumexp,
                                                     std::optional<Tensor> excluded,
                                                     std::optional<Tensor> nodes,
                                                     std::optional<Tensor> trie_starts,
                                                     std::optional<Tensor> trie_tokens);

}  // namespace flashkern
