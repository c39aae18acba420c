#include "attention/sm80/backward.h"

namespace flashkern::attention::sm80 {

template void gradients_of<BFloat16>(const BackwardParams&, const BackwardPlan&, GpuStream);

}  // namespace flashkern::attention::sm80
