// The launches of an attention backward call: row sums and sinks, then the three gradients.
#include <algorithm>

#include "attention/gpu.h"
#include "attention/sm80/backward_rows.h"

namespace flashkern {
namespace attention::sm80 {

template <class T, int kDim>
void launch_gradients(const BackwardParams& p, GpuStream stream);  // backward_*.cu

template <class T>
void backward_of(const BackwardParams& p, GpuStream stream) {
  launch_rows<T>(p, stream);
  const int64_t dim = std::max(p.head_dim, p.value_dim);
  if (dim <= 32) return launch_gradients<T, 32>(p, stream);
  if (dim <= 64) return launch_gradients<T, 64>(p, stream);
  if (dim <= 128) return launch_gradients<T, 128>(p, stream);
  launch_gradients<T, 256>(p, stream);
}

}  // namespace attention::sm80

namespace gpu {

void attention_backward(const attention::BackwardParams& p, GpuStream stream) {
  using attention::sm80::backward_of;
  if (p.dtype == DType::kFloat32) return backward_of<float>(p, stream);
  if (p.dtype == DType::kBFloat16) return backward_of<BFloat16>(p, stream);
  backward_of<Half>(p, stream);
}

}  // namespace gpu
}  // namespace flashkern
