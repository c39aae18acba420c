// TMA: tiles between a tensor in global memory and shared memory. What the twin's headers call.
#pragma once

#include <cstdint>

#include "emulator/api.h"
#include "types.h"

namespace flashkern::emulator {

struct Tensor {
  char* data;
  uint64_t extent[4], stride[4];  // elements; bytes
  uint32_t box[4];
  DType dtype;
  int rank;
  uint32_t span;  // bytes of a row that the swizzle turns; 16: none
};

void check_tensor(const Tensor& tensor);

// blocks: the ranks in the cluster that the tile goes to; 0: the caller's own block.
void load_tile(void* shared, const Tensor& tensor, const int32_t* at, int rank, uint64_t* barrier,
               uint32_t blocks, const Site& site);
void store_tile(const Tensor& tensor, const int32_t* at, int rank, const void* shared, bool add,
                const Site& site);
void store_commit();
void store_wait(int groups_left, bool read_only);

}  // namespace flashkern::emulator
