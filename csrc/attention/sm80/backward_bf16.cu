#include "attention/sm80/backward.h"

namespace flashkern::attention::sm80 {

template void launch_gradients<BFloat16, 32>(const BackwardParams&, GpuStream);
template void launch_gradients<BFloat16, 64>(const BackwardParams&, GpuStream);
template void launch_gradients<BFloat16, 128>(const BackwardParams&, GpuStream);
template void launch_gradients<BFloat16, 256>(const BackwardParams&, GpuStream);

}  // namespace flashkern::attention::sm80
