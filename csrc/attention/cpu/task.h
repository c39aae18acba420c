// What one task of a launch is to do: rows of one KV head against one split of the keys.
#pragma once

#include "attention/mask.h"

namespace flashkern::FK_ISA::attention {

struct TaskRange {
  int64_t row_begin, row_end;
  flashkern::attention::Interval keys;
};

}  // namespace flashkern::FK_ISA::attention
