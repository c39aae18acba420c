// What a beam top-k kernel is told: a plain struct, filled by csrc/torch/beam.cpp. Strides count
// elements; the vocabulary has stride 1.
#pragma once

#include <cstdint>

#include "types.h"

namespace flashkern::beam {

// What a beam may take; null: no such constraint. A log-sum-exp is that of all logits regardless.
struct Constraints {
  const int64_t* excluded =
      nullptr;  // (batch, beams, excluded_count) tokens it may not take, or -1
  int64_t excluded_count = 0;
  // (batch, beams) nodes of a trie: it may take their children alone, of -1 none. In compressed
  // rows: the children of node n are the tokens [starts[n], starts[n + 1]), ascending.
  const int64_t* nodes = nullptr;
  const int32_t* trie_starts = nullptr;  // (trie_nodes + 1)
  const int32_t* trie_tokens = nullptr;  // (trie_edges)
  int64_t trie_nodes = 0, trie_edges = 0;
};

struct TopkParams {
  DType dtype = DType::kFloat32;  // of the logits; all else is float32
  int64_t batch = 0, beams = 0, vocab = 0, k = 0;

  const void* logits = nullptr;  // (batch, beams, vocab)
  int64_t batch_stride = 0, beam_stride = 0;
  const float* beam_scores = nullptr;  // (batch, beams)
  const float* given_logsumexp =
      nullptr;  // (batch, beams), or null: the kernel takes each beam's own
  Constraints constraints;

  float* scores = nullptr;     // (batch, k)
  int64_t* tokens = nullptr;   // (batch, k)
  int64_t* parents = nullptr;  // (batch, k)
  float* logsumexp = nullptr;  // (batch, beams)
};

}  // namespace flashkern::beam
