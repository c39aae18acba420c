#include "torch/beam.h"

#include "beam/gpu.h"
#include "beam/kernels.h"
#include "torch/device.h"
#include "torch/threads.h"

namespace flashkern {
namespace {

void check_beams(const Tensor& t, const Tensor& logits, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.dim() == 2 && t.is_contiguous() &&
                      t.size(0) == logits.size(0) && t.size(1) == logits.size(1),
                  "beam_topk: ", name,
                  " must be float32, contiguous, of the logits' (batch, beams)");
}

void run(const beam::TopkParams& p, const Tensor& logits, const Tensor& beam_scores) {
  if constexpr (kGpuKernels) {
    if (on_gpu(logits)) {
      const GpuScope scope(logits);
      const Tensor workspace =
          torch::stable::new_empty(beam_scores, {gpu::beam_topk_workspace(p)}, ScalarType::Byte);
      return gpu::beam_topk(p, workspace.mutable_data_ptr(), scope.stream());
    }
  }
  if constexpr (kCpuKernels) beam_topk(p, torch_threads());
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> beam_topk(Tensor logits, Tensor beam_scores, int64_t k,
                                                     std::optional<Tensor> logsumexp) {
  STD_TORCH_CHECK(logits.dim() == 3, "beam_topk: logits must have 3 dimensions");
  beam::TopkParams p;
  p.dtype = dtype_of(logits);
  p.batch = logits.size(0);
  p.beams = logits.size(1);
  p.vocab = logits.size(2);
  p.k = k;
  STD_TORCH_CHECK(p.dtype != DType::kFloat64, "beam_topk: float64 has no kernel");
  STD_TORCH_CHECK(p.vocab == 1 || logits.stride(2) == 1,
                  "beam_topk: logits must be contiguous in the last dimension");
  STD_TORCH_CHECK(k >= 1 && k <= p.beams * p.vocab && p.beams * p.vocab < (int64_t{1} << 32),
                  "beam_topk: k must be between 1 and beams * vocabulary, below 2^32, got ", k);
  check_beams(beam_scores, logits, "beam_scores");
  if (logsumexp.has_value()) check_beams(*logsumexp, logits, "logsumexp");

  Tensor scores = empty<2>(logits, {p.batch, k}, ScalarType::Float);
  Tensor tokens = empty<2>(logits, {p.batch, k}, ScalarType::Long);
  Tensor parents = empty<2>(logits, {p.batch, k}, ScalarType::Long);
  Tensor joint = empty<2>(logits, {p.batch, p.beams}, ScalarType::Float);
  p.logits = logits.const_data_ptr();
  p.batch_stride = logits.stride(0);
  p.beam_stride = logits.stride(1);
  p.beam_scores = beam_scores.const_data_ptr<float>();
  p.given_logsumexp = logsumexp.has_value() ? logsumexp->const_data_ptr<float>() : nullptr;
  p.scores = scores.mutable_data_ptr<float>();
  p.tokens = tokens.mutable_data_ptr<int64_t>();
  p.parents = parents.mutable_data_ptr<int64_t>();
  p.logsumexp = joint.mutable_data_ptr<float>();
  run(p, logits, beam_scores);
  return {scores, tokens, parents, joint};
}

}  // namespace flashkern
