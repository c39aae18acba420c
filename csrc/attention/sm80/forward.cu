// Picks the kernel of an attention forward call.
#include "attention/gpu.h"
#include "attention/sm80/plan.h"

namespace flashkern {
namespace attention::sm80 {

template <class T>
void forward_of(const ForwardParams& p, const ForwardPlan& plan, GpuStream stream);
extern template void forward_of<float>(const ForwardParams&, const ForwardPlan&, GpuStream);
extern template void forward_of<BFloat16>(const ForwardParams&, const ForwardPlan&, GpuStream);
extern template void forward_of<Half>(const ForwardParams&, const ForwardPlan&, GpuStream);

}  // namespace attention::sm80

namespace gpu {

using attention::sm80::forward_of;
using attention::sm80::plan_forward;

int64_t attention_workspace(const attention::ForwardParams& p) {
  return plan_forward(p).workspace_floats * static_cast<int64_t>(sizeof(float));
}

void attention_forward(const attention::ForwardParams& p, GpuStream stream) {
  const auto plan = plan_forward(p);
  if (plan.blocks == 0) return;
  if (p.dtype == DType::kFloat32) {
    forward_of<float>(p, plan, stream);
  } else if (p.dtype == DType::kBFloat16) {
    forward_of<BFloat16>(p, plan, stream);
  } else {
    forward_of<Half>(p, plan, stream);
  }
}

}  // namespace gpu
}  // namespace flashkern
