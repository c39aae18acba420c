#include "attention/sm80/backward.h"

namespace flashkern::attention::sm80 {

template void launch_gradients<Half, 32>(const BackwardParams&, GpuStream);
template void launch_gradients<Half, 64>(const BackwardParams&, GpuStream);
template void launch_gradients<Half, 128>(const BackwardParams&, GpuStream);
template void launch_gradients<Half, 256>(const BackwardParams&, GpuStream);

}  // namespace flashkern::attention::sm80
