// The entry points of the backward pass on a CPU. Each exists once for each
// ISA; for AMX those of FK_TILE_KERNEL.
#pragma once

#include "attention/params.h"
#include "simd/isa.h"

namespace flashkern {

FK_TILE_KERNEL(attention_backward, flashkern::attention::BackwardParams)
FK_CPU_KERNEL(attention_backward_float64, flashkern::attention::BackwardParams)

}  // namespace flashkern
