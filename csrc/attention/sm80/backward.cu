// The launches of an attention backward call: the numbers of rows and the sinks, then the
// gradients.
#include "attention/gpu.h"
#include "attention/sm80/backward_plan.h"
#include "attention/sm80/backward_rows.h"

namespace flashkern {
namespace attention::sm80 {

template <class T>
void gradients_of(const BackwardParams& p, const BackwardPlan& plan, GpuStream stream);

template <class T>
void backward_of(const BackwardParams& p, GpuStream stream) {
  const BackwardPlan plan = plan_backward(p);
  launch_rows<T>(p, plan, stream);
  gradients_of<T>(p, plan, stream);
}

}  // namespace attention::sm80

namespace gpu {

BackwardWorkspace attention_backward_workspace(const attention::BackwardParams& p) {
  const auto plan = attention::sm80::plan_backward(p);
  return {plan.floats, plan.ints};
}

void attention_backward(const attention::BackwardParams& p, GpuStream stream) {
  using attention::sm80::backward_of;
  if (p.dtype == DType::kFloat32) return backward_of<float>(p, stream);
  if (p.dtype == DType::kBFloat16) return backward_of<BFloat16>(p, stream);
  backward_of<Half>(p, stream);
}

}  // namespace gpu
}  // namespace flashkern
