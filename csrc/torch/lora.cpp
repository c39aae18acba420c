#include "torch/lora.h"

#include <algorithm>
#include <array>
#include <string_view>
#include <vector>

#include "dropout.h"
#include "lora/gpu.h"
#include "lora/params.h"
#include "lora/sm80/plan.h"
#include "torch/addmm.h"
#include "torch/device.h"
#include "torch/threads.h"

namespace flashkern {
namespace {

// The base product through the BLAS that torch carries.
Tensor base_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(x), from(weight), from(bias)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

LoraChoice& lora_choice() {
  static LoraChoice choice = LoraChoice::kAuto;
  return choice;
}

// Who computes the base product of this call: lora/plan.h's choice, or the one that was forced. Our
// own tiles read a weight whose rows are contiguous.
LoraBase choose_base(const Tensor& x, int64_t rows, const Tensor& weight, bool forward) {
  if (!weight.is_contiguous()) return LoraBase::kBlas;
  if constexpr (kGpuKernels) {
    if (on_gpu(x)) {  // the emulator stands for the GPUs whose best kernels are ours
      const int capability = kEmulated ? 80 : gpu::compute_capability(x.get_device_index());
      return sm80::lora_base(rows, weight.size(forward), dtype_of(x), forward, lora_choice(),
                             capability);
    }
  }
  return lora_base(rows, dtype_of(x), forward, lora_choice(), cpu_facts());
}

Tensor packed(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// A matrix of rows that lie a fixed number of elements apart: a view wherever one exists.
struct RowView {
  Tensor tensor;
  int64_t rows, row;

  explicit RowView(const Tensor& t) : tensor(t) {
    const int64_t width = t.size(t.dim() - 1);
    rows = 1;
    for (int64_t d = 0; d + 1 < t.dim(); ++d) rows *= t.size(d);
    row = width;
    if (t.is_contiguous()) return;
    if (t.dim() == 2 && t.stride(1) == 1 && t.stride(0) >= width) {
      row = t.stride(0);
    } else {
      tensor = torch::stable::contiguous(t);
    }
  }
};

// out += rows x matrix, by a GPU's BLAS.
void add_product(const Tensor& out, const RowView& rows, const Tensor& matrix) {
  const auto flat = [&](const Tensor& t) {
    return torch::stable::reshape(t, {rows.rows, t.size(t.dim() - 1)});
  };
  if constexpr (kGpuKernels) addmm(flat(out), flat(rows.tensor), matrix);
}

Tensor multiply(const Tensor& t, double factor) {
  using torch::stable::detail::from;
  const Tensor number = torch::stable::fill_(empty<1>(t, {1}, t.scalar_type()), factor);
  std::array<StableIValue, 2> stack{from(t), from(number)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mul", "Tensor", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Holds what the params point to.
struct Adapters {
  Tensor a, b;
  std::optional<Tensor> ids, scalings;
  std::vector<double> scale;
  LoraAdapters params;
  LoraDropout dropout;

  Adapters(const Tensor& lora_a, const Tensor& lora_b, const std::optional<Tensor>& ids_,
           const std::optional<Tensor>& scalings_, double scaling, double dropout_p,
           const std::optional<Tensor>& seed, int64_t rows)
      : a(packed(lora_a)), b(packed(lora_b)) {
    const bool several = ids_.has_value();
    const int64_t count = several ? a.size(0) : 1;
    STD_TORCH_CHECK(a.scalar_type() == b.scalar_type() && a.dim() == (several ? 3 : 2),
                    "lora_linear: lora_a and lora_b must be alike");
    double kept = 1.0;
    if (dropout_p > 0.0) {
      STD_TORCH_CHECK(seed.has_value(), "lora_linear: dropout needs a seed");
      dropout.seed = seed_of(*seed, lora_a);
      dropout.threshold = dropout_threshold(dropout_p);
      kept = dropout_p < 1.0 ? 1.0 / (1.0 - dropout_p) : 0.0;
    }
    params = {count,
              a.size(several ? 1 : 0),
              dtype_of(a),
              a.const_data_ptr(),
              b.const_data_ptr(),
              nullptr,
              nullptr};
    if (several) {
      take_rows(*ids_, *scalings_, kept, rows);
    } else {
      scale.assign(1, scaling * kept);
      params.scale = scale.data();
    }
  }

 private:
  // An adapter for each row. On a GPU nobody looks at the ids or waits for them.
  void take_rows(const Tensor& ids_, const Tensor& scalings_, double kept, int64_t rows) {
    const int64_t count = params.count;
    ids = packed(ids_);
    scalings = packed(scalings_);
    STD_TORCH_CHECK(ids->scalar_type() == ScalarType::Long && ids->numel() == rows,
                    "lora_linear: adapter_ids must be int64, one for each row");
    STD_TORCH_CHECK(scalings->scalar_type() == ScalarType::Double && scalings->numel() == count,
                    "lora_linear: scaling must be float64, one for each adapter");
    STD_TORCH_CHECK(ids->is_cuda() == a.is_cuda() && scalings->is_cuda() == a.is_cuda(),
                    "lora_linear: adapter_ids and scaling must be on lora_a's device");
    if (kept != 1.0) scalings = multiply(*scalings, kept);
    params.ids = static_cast<const int64_t*>(ids->const_data_ptr());
    params.scale = static_cast<const double*>(scalings->const_data_ptr());
    for (int64_t i = 0; !on_gpu(a) && i < rows; ++i) {
      STD_TORCH_CHECK(params.ids[i] >= -1 && params.ids[i] < count,
                      "lora_linear_multi: adapter_ids must lie in [-1, ", count, "), got ",
                      params.ids[i]);
    }
  }
};

ScalarType sum_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_shapes(const Tensor& x, const Tensor& weight, const Adapters& adapters) {
  const int64_t in = weight.size(1), out = weight.size(0), rank = adapters.params.rank;
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == in,
                  "lora_linear: x must have weight's columns");
  STD_TORCH_CHECK(adapters.a.numel() == adapters.params.count * rank * in &&
                      adapters.b.numel() == adapters.params.count * rank * out,
                  "lora_linear: lora_a and lora_b must fit the weight");
}

// Contiguous, whatever the strides of `like`.
Tensor empty_of(const Tensor& like, bool needed) {
  if (!needed) return empty<1>(like, {0}, like.scalar_type());
  return empty(like, std::span(like.sizes().data(), like.sizes().size()), like.scalar_type());
}

Tensor empty_result(const Tensor& x, int64_t out) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = out;
  return empty(x, sizes, x.scalar_type());
}

template <class Params>
Tensor workspace_of(const Params& p, const Tensor& x) {
  STD_TORCH_CHECK(p.dtype != DType::kFloat64,
                  "lora_linear: x must have dtype float32, bfloat16 or float16 on a GPU");
  return empty<1>(x, {gpu::lora_workspace(p)}, ScalarType::Byte);
}

void launch(const LoraForward& p, const Tensor& x) {
  if (on_gpu(x)) {
    if constexpr (kGpuKernels) {
      const GpuScope scope(x);
      gpu::lora_forward(p, workspace_of(p, x).mutable_data_ptr(), scope.stream());
    }
  } else if constexpr (kCpuKernels) {
    const bool wide = p.dtype == DType::kFloat64;
    wide ? lora_forward_plain(p, torch_threads()) : lora_forward(p, torch_threads());
  }
}

void launch(const LoraBackward& p, const Tensor& x) {
  if (on_gpu(x)) {
    if constexpr (kGpuKernels) {
      const GpuScope scope(x);
      gpu::lora_backward(p, workspace_of(p, x).mutable_data_ptr(), scope.stream());
    }
  } else if constexpr (kCpuKernels) {
    const bool wide = p.dtype == DType::kFloat64;
    wide ? lora_backward_plain(p, torch_threads()) : lora_backward(p, torch_threads());
  }
}

}  // namespace

std::string set_lora_base(std::string name) {
  constexpr const char* kNames[] = {"auto", "blas", "own"};
  const auto* found = std::find(kNames, kNames + 3, std::string_view(name));
  STD_TORCH_CHECK(name.empty() || found != kNames + 3,
                  "lora_base: name must be auto, blas or own, got ", name);
  if (!name.empty()) lora_choice() = static_cast<LoraChoice>(found - kNames);
  return kNames[static_cast<int>(lora_choice())];
}

std::tuple<Tensor, Tensor> lora_linear(const Tensor& x, const Tensor& weight, const Tensor& lora_a,
                                       const Tensor& lora_b, const std::optional<Tensor>& bias,
                                       const std::optional<Tensor>& ids,
                                       const std::optional<Tensor>& scalings, double scaling,
                                       double dropout_p, const std::optional<Tensor>& seed) {
  const RowView view(x);
  const Adapters adapters(lora_a, lora_b, ids, scalings, scaling, dropout_p, seed, view.rows);
  check_shapes(x, weight, adapters);
  const LoraBase base = choose_base(x, view.rows, weight, true);
  const bool blas = base == LoraBase::kBlas, last = blas && on_gpu(x);
  const Tensor y = blas && !last ? packed(base_linear(view.tensor, weight, bias))
                                 : empty_result(x, weight.size(0));
  std::optional<Tensor> added;
  if (bias.has_value()) added.emplace(packed(*bias));
  const Tensor h = empty<2>(x, {view.rows, adapters.params.rank}, sum_type(x));
  const LoraForward p{view.rows,
                      weight.size(1),
                      weight.size(0),
                      dtype_of(x),
                      base,
                      view.tensor.const_data_ptr(),
                      view.row,
                      weight.const_data_ptr(),
                      added.has_value() ? added->const_data_ptr() : nullptr,
                      y.mutable_data_ptr(),
                      h.mutable_data_ptr(),
                      adapters.params,
                      adapters.dropout};
  launch(p, x);
  if (last) add_product(y, view, torch::stable::transpose(weight, 0, 1));
  return {y, h};
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& lora_a,
    const Tensor& lora_b, const Tensor& h, const std::optional<Tensor>& ids,
    const std::optional<Tensor>& scalings, double scaling, double dropout_p,
    const std::optional<Tensor>& seed, bool need_x, bool need_a, bool need_b) {
  const RowView dy(grad), view(x);
  const Adapters adapters(lora_a, lora_b, ids, scalings, scaling, dropout_p, seed, view.rows);
  check_shapes(x, weight, adapters);
  const LoraBase base = choose_base(x, view.rows, weight, false);
  const bool blas = need_x && base == LoraBase::kBlas, last = blas && on_gpu(x);
  const Tensor dx =
      blas && !last ? packed(torch::stable::matmul(dy.tensor, weight)) : empty_of(x, need_x);
  const Tensor da = empty_of(adapters.a, need_a), db = empty_of(adapters.b, need_b);
  const Tensor kept = packed(h);
  const LoraBackward p{view.rows,
                       weight.size(1),
                       weight.size(0),
                       dtype_of(x),
                       base,
                       view.tensor.const_data_ptr(),
                       view.row,
                       dy.tensor.const_data_ptr(),
                       dy.row,
                       kept.const_data_ptr(),
                       weight.const_data_ptr(),
                       need_x ? dx.mutable_data_ptr() : nullptr,
                       need_a ? da.mutable_data_ptr() : nullptr,
                       need_b ? db.mutable_data_ptr() : nullptr,
                       adapters.params,
                       adapters.dropout};
  if (need_x || need_a || need_b) launch(p, x);
  if (last) add_product(dx, dy, weight);
  return {dx, da, db};
}

}  // namespace flashkern
