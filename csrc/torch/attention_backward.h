// Attention: stable-ABI adapter of the backward pass.
#pragma once

#include <tuple>

#include "torch/attention.h"

namespace flashkern {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    Tensor grad_output, OptionalTensor grad_lse, Tensor query, Tensor key, Tensor value,
    Tensor output, Tensor lse, OptionalTensor bias, OptionalTensor alibi_slopes,
    OptionalTensor sinks, OptionalTensor kv_lengths, OptionalTensor cu_seqlens_q,
    OptionalTensor cu_seqlens_k, OptionalTensor seed, int64_t max_seqlen_q, int64_t max_seqlen_k,
    int64_t alignment, int64_t window_left, int64_t window_right, double scale, double softcap,
    double dropout_p, bool bias_needs_grad);

}  // namespace flashkern
