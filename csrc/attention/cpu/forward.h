// The entry points of the CPU kernels. Each exists once for each ISA; for AMX those of
// FK_TILE_KERNEL.
#pragma once

#include "attention/params.h"
#include "simd/isa.h"

namespace flashkern {

FK_TILE_KERNEL(attention_forward, flashkern::attention::ForwardParams)
FK_CPU_KERNEL(attention_forward_float64, flashkern::attention::ForwardParams)
FK_CPU_KERNEL(attention_append, flashkern::attention::AppendParams)

}  // namespace flashkern
