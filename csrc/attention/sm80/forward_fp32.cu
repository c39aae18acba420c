#include "attention/sm80/forward.h"

namespace flashkern::attention::sm80 {

template void forward_of<float>(const ForwardParams&, const ForwardPlan&, GpuStream);

}  // namespace flashkern::attention::sm80
