#include "torch/attention_backward.h"

#include "attention/cpu/backward.h"
#include "attention/gpu.h"
#include "torch/device.h"
#include "torch/threads.h"

#include <vector>

namespace flashkern {
namespace {

using attention::BackwardParams;

Tensor contiguous_last(const Tensor& t) {
  return t.stride(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t);
}

int64_t longest(const int32_t* cu_seqlens, int64_t batch) {
  int64_t most = 0;
  for (int64_t b = 0; b < batch; ++b) {
    most = std::max<int64_t>(most, cu_seqlens[b + 1] - cu_seqlens[b]);
  }
  return most;
}

// The gradient of a bias: contiguous, of the bias's own shape.
attention::BiasGradient bias_gradient_of(const Tensor& t) {
  auto stride = [&](int64_t dim) { return t.size(dim) == 1 ? 0 : t.stride(dim); };
  return {t.mutable_data_ptr(), stride(0), stride(1), stride(2), stride(3)};
}

// On a GPU each element of the bias has a gradient of its own; broadcast ones are summed after.
Tensor new_bias_gradient(const BackwardParams& p, const Tensor& bias, ScalarType type) {
  if (!on_gpu(bias)) return torch::stable::new_zeros(bias, bias.sizes(), type);
  const int64_t whole[4] = {p.batch, p.heads, p.seq_q, p.seq_k};
  std::vector<int64_t> sizes(4);
  for (int d = 0; d < 4; ++d) sizes[d] = std::max(whole[d], bias.size(d));
  return torch::stable::new_zeros(bias, sizes, type);
}

Tensor sum_bias_gradient(Tensor gradient, const Tensor& bias) {
  std::vector<int64_t> dims;
  for (int64_t d = 0; d < 4; ++d) {
    if (gradient.size(d) != bias.size(d)) dims.push_back(d);
  }
  if (!dims.empty()) gradient = torch::stable::sum(gradient, dims, true);
  return torch::stable::to(gradient, bias.scalar_type());
}

// Zeros, but where all of it will be written.
Tensor gradient_like(const Tensor& t, bool written, ScalarType type) {
  return written ? torch::stable::new_empty(t, t.sizes(), type)
                 : torch::stable::new_zeros(t, t.sizes(), type);
}

void launch_on_gpu(BackwardParams& p, const Tensor& query) {
  STD_TORCH_CHECK(p.dtype != DType::kFloat64,
                  "attention: query must have dtype float32, bfloat16 or float16 on a GPU");
  if constexpr (kGpuKernels) {
    const GpuScope scope(query);
    const auto [floats, zeros] = gpu::attention_backward_workspace(p);
    Tensor workspace = torch::stable::new_empty(query, {floats}, ScalarType::Float);
    Tensor turns = torch::stable::new_zeros(query, {zeros}, ScalarType::Int);
    p.workspace = static_cast<float*>(workspace.mutable_data_ptr());
    p.turns = static_cast<int32_t*>(turns.mutable_data_ptr());
    gpu::attention_backward(p, scope.stream());
  }
}

void launch(BackwardParams& p, const Tensor& query) {
  if (on_gpu(query)) {
    launch_on_gpu(p, query);
  } else if constexpr (kCpuKernels) {
    const bool wide = p.dtype == DType::kFloat64;
    wide ? attention_backward_float64(p, torch_threads()) : attention_backward(p, torch_threads());
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    Tensor grad_output, OptionalTensor grad_lse, Tensor query, Tensor key, Tensor value,
    Tensor output, Tensor lse, OptionalTensor bias, OptionalTensor alibi_slopes,
    OptionalTensor sinks, OptionalTensor kv_lengths, OptionalTensor cu_seqlens_q,
    OptionalTensor cu_seqlens_k, OptionalTensor seed, int64_t max_seqlen_q, int64_t max_seqlen_k,
    int64_t alignment, int64_t window_left, int64_t window_right, double scale, double softcap,
    double dropout_p, bool bias_needs_grad) {
  using torch::stable::new_empty;
  using torch::stable::new_zeros;
  BackwardParams p;
  const OptionalTensor no_pages;
  fill_problem(p, {query, key, value, bias, alibi_slopes, sinks, kv_lengths, cu_seqlens_q,
                   cu_seqlens_k, no_pages, seed, max_seqlen_q, max_seqlen_k, alignment, window_left,
                   window_right, scale, softcap, dropout_p});
  if (p.cu_seqlens_q != nullptr && !on_gpu(query)) {
    p.seq_q = longest(p.cu_seqlens_q, p.batch);
    p.seq_k = longest(p.cu_seqlens_k, p.batch);
  }
  const bool wide = p.dtype == DType::kFloat64, narrow = !wide && p.dtype != DType::kFloat32;
  const auto sums = wide ? ScalarType::Double : ScalarType::Float;

  grad_output = contiguous_last(grad_output);
  output = contiguous_last(output);
  p.grad_output = matrix_of(grad_output);
  p.output = matrix_of(output);
  lse = contiguous_last(lse);
  p.lse = row_values_of(lse);
  if (grad_lse.has_value()) {
    grad_lse = contiguous_last(*grad_lse);
    p.grad_lse = row_values_of(*grad_lse);
  }
  Tensor delta;  // not of a GPU
  if (!on_gpu(query)) {
    delta = new_empty(lse, lse.sizes());
    p.delta = row_values_of(delta);
  }

  // The GPU kernels write every row of a sequence and each key that is not beyond its length. Where
  // there is no row, or no head, there is nothing to launch.
  const bool gpu = on_gpu(query), any = query.numel() > 0;
  const bool whole = any && gpu && p.cu_seqlens_q == nullptr;
  const bool apart = narrow && !gpu;
  Tensor query_sums = gradient_like(query, whole, apart ? sums : query.scalar_type());
  Tensor grad_query = apart ? new_empty(query, query.sizes()) : query_sums;
  Tensor grad_key = gradient_like(key, whole && p.kv_lengths == nullptr, key.scalar_type());
  Tensor grad_value = gradient_like(value, whole && p.kv_lengths == nullptr, value.scalar_type());
  p.grad_query = output_of(grad_query);
  p.query_sums = output_of(query_sums);
  p.query_elements = query.numel();
  p.grad_key = output_of(grad_key);
  p.grad_value = output_of(grad_value);

  Tensor grad_bias = new_zeros(query, {0});
  if (bias_needs_grad) {
    grad_bias = new_bias_gradient(p, *bias, sums);
    p.grad_bias = bias_gradient_of(grad_bias);
  }
  Tensor grad_sinks = new_zeros(query, {sinks.has_value() ? p.heads : 0}, sums);
  if (sinks.has_value()) p.grad_sinks = grad_sinks.mutable_data_ptr();

  if (any) launch(p, query);
  if (bias_needs_grad) grad_bias = sum_bias_gradient(grad_bias, *bias);
  return {grad_query, grad_key, grad_value, grad_bias, grad_sinks};
}

}  // namespace flashkern
