#include "attention/sm80/backward.h"

namespace flashkern::attention::sm80 {

template void gradients_of<Half>(const BackwardParams&, const BackwardPlan&, GpuStream);

}  // namespace flashkern::attention::sm80
