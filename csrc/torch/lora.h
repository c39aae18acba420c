// LoRA linear as torch sees it. Shapes are checked in flashkern/lora.py; here, only what the
// kernels' memory safety rests on.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "torch/tensor.h"

namespace flashkern {

// Who computes base products from now on: "auto" (lora/plan.h), "blas", "own"; "" changes nothing.
// Returns the choice.
std::string set_lora_base(std::string name);

// y = x W^T + bias + the adapters' part, and h. Without ids, lora_a is (rank, in), lora_b (out,
// rank) and `scaling` counts; with ids (one for each row), (n, rank, in), (n, out, rank) and
// `scalings`, float64 (n,), count. `seed` holds one int64; it is there when dropout_p > 0.
std::tuple<Tensor, Tensor> lora_linear(const Tensor& x, const Tensor& weight, const Tensor& lora_a,
                                       const Tensor& lora_b, const std::optional<Tensor>& bias,
                                       const std::optional<Tensor>& ids,
                                       const std::optional<Tensor>& scalings, double scaling,
                                       double dropout_p, const std::optional<Tensor>& seed);

// The gradients of x, lora_a and lora_b; an empty tensor in place of one that is not needed.
std::tuple<Tensor, Tensor, Tensor> lora_linear_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& lora_a,
    const Tensor& lora_b, const Tensor& h, const std::optional<Tensor>& ids,
    const std::optional<Tensor>& scalings, double scaling, double dropout_p,
    const std::optional<Tensor>& seed, bool need_x, bool need_a, bool need_b);

}  // namespace flashkern
