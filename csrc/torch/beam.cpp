#include "torch/beam.h"

#include "beam/constraints.h"
#include "beam/gpu.h"
#include "beam/kernels.h"
#include "torch/device.h"
#include "torch/threads.h"

namespace flashkern {
namespace {

bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

void check_beams(const Tensor& t, const Tensor& logits, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.dim() == 2 && t.is_contiguous() &&
                      t.size(0) == logits.size(0) && t.size(1) == logits.size(1) &&
                      same_device(t, logits),
                  "beam_topk: ", name,
                  " must be float32, contiguous, of the logits' (batch, beams) and device");
}

const int64_t* beam_integers(const Tensor& t, const Tensor& logits, int64_t dim, const char* name) {
  STD_TORCH_CHECK(
      t.scalar_type() == ScalarType::Long && t.dim() == dim && t.is_contiguous() &&
          t.size(0) == logits.size(0) && t.size(1) == logits.size(1) && same_device(t, logits),
      "beam_topk: ", name, " must be int64, contiguous, of the logits' (batch, beams) and device");
  return t.const_data_ptr<int64_t>();
}

const int32_t* trie_part(const std::optional<Tensor>& t, const Tensor& logits) {
  const bool good = t.has_value() && t->scalar_type() == ScalarType::Int && t->dim() == 1 &&
                    t->is_contiguous() && same_device(*t, logits);
  STD_TORCH_CHECK(good, "beam_topk: the trie must be 1-D contiguous int32 on the logits' device");
  return t->const_data_ptr<int32_t>();
}

void set_constraints(beam::TopkParams& p, const Tensor& logits,
                     const std::optional<Tensor>& excluded, const std::optional<Tensor>& nodes,
                     const std::optional<Tensor>& starts, const std::optional<Tensor>& tokens) {
  beam::Constraints& c = p.constraints;
  if (excluded.has_value() && excluded->numel() > 0) {
    c.excluded = beam_integers(*excluded, logits, 3, "excluded");
    c.excluded_count = excluded->size(2);
  }
  if (!nodes.has_value()) return;
  c.nodes = beam_integers(*nodes, logits, 2, "nodes");
  c.trie_starts = trie_part(starts, logits);
  c.trie_tokens = trie_part(tokens, logits);
  c.trie_nodes = starts->numel() - 1;
  c.trie_edges = tokens->numel();
}

// What lies in memory that an adapter may read. A node's tokens ascend, so two of them tell.
void check_indices(const beam::TopkParams& p) {
  const beam::Constraints& c = p.constraints;
  const int64_t beams = p.batch * p.beams;
  for (int64_t i = 0; i < beams * c.excluded_count; ++i) {
    STD_TORCH_CHECK(c.excluded[i] >= -1 && c.excluded[i] < p.vocab,
                    "beam_topk: excluded must hold tokens below V = ", p.vocab, ", or -1, got ",
                    c.excluded[i]);
  }
  for (int64_t b = 0; c.nodes != nullptr && b < beams; ++b) {
    STD_TORCH_CHECK(c.nodes[b] >= -1 && c.nodes[b] < c.trie_nodes,
                    "beam_topk: nodes must hold nodes of the trie, below ", c.trie_nodes,
                    ", or -1, got ", c.nodes[b]);
    const beam::Children own = beam::children_of(c, b);
    STD_TORCH_CHECK(own.count == 0 || (own.tokens[0] >= 0 && own.tokens[own.count - 1] < p.vocab),
                    "beam_topk: trie must hold tokens below V = ", p.vocab);
  }
}

void run(const beam::TopkParams& p, const Tensor& logits) {
  if constexpr (kGpuKernels) {
    if (on_gpu(logits)) {
      const GpuScope scope(logits);
      const Tensor workspace = empty<1>(logits, {gpu::beam_topk_workspace(p)}, ScalarType::Byte);
      return gpu::beam_topk(p, workspace.mutable_data_ptr(), scope.stream());
    }
  }
  if constexpr (kCpuKernels) beam_topk(p, torch_threads());
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> beam_topk(Tensor logits, Tensor beam_scores, int64_t k,
                                                     std::optional<Tensor> logsumexp,
                                                     std::optional<Tensor> excluded,
                                                     std::optional<Tensor> nodes,
                                                     std::optional<Tensor> trie_starts,
                                                     std::optional<Tensor> trie_tokens) {
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
  set_constraints(p, logits, excluded, nodes, trie_starts, trie_tokens);
  if (host_readable(logits)) check_indices(p);

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
  run(p, logits);
  return {scores, tokens, parents, joint};
}

}  // namespace flashkern
