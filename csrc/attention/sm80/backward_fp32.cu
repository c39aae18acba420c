#include "attention/sm80/backward.h"

namespace flashkern::attention::sm80 {

template void launch_gradients<float, 32>(const BackwardParams&, GpuStream);
template void launch_gradients<float, 64>(const BackwardParams&, GpuStream);
template void launch_gradients<float, 128>(const BackwardParams&, GpuStream);
template void launch_gradients<float, 256>(const BackwardParams&, GpuStream);

}  // namespace flashkern::attention::sm80
