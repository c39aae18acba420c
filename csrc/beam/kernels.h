// The beam top-k kernels, one for each CPU ISA, and the call that picks one.
#pragma once

#include "beam/plan.h"
#include "simd/isa.h"

namespace flashkern {

FK_CPU_KERNEL(beam_topk, beam::TopkParams)

}  // namespace flashkern
