// What a beam top-k kernel is told: a plain struct, filled by csrc/torch/beam.cpp. Strides count
// elements; the vocabulary has stride 1.
#pragma once

#include <cstdint>

#include "types.h"

namespace flashkern::beam {

struct TopkParams {
  DType dtype = DType::kFloat32;  // of the logits; all else is float32
  int64_t batch = 0, beams = 0, vocab = 0, k = 0;

  const void* logits = nullptr;  // (batch, beams, vocab)
  int64_t batch_stride = 0, beam_stride = 0;
  const float* beam_scores = nullptr;  // (batch, beams)
  const float* given_logsumexp =
      nullptr;  // (batch, beams), or null: the kernel takes each beam's own

  float* scores = nullptr;     // (batch, k)
  int64_t* tokens = nullptr;   // (batch, k)
  int64_t* parents = nullptr;  // (batch, k)
  float* logsumexp = nullptr;  // (batch, beams)
};

}  // namespace flashkern::beam
