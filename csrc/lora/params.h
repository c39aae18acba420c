// What a LoRA linear is to a kernel: plain numbers and pointers.
//
//   h  = scale * drop(x) A^T        (rows, rank)   scale = scaling / (1 - p)
//   y  = x W^T + bias + h B^T       (rows, out)
//
// Backward, from dy and the h that the forward pass kept:
//
//   dh = scale * dy B               dB = dy^T h
//   dA = dh^T keep(x)               dx = dy W + keep(dh A)
//
// keep(v) puts zeros where dropout drops; the factor 1 / (1 - p) lies in h and in dh once.
#pragma once

#include <cstdint>

#include "lora/plan.h"
#include "simd/isa.h"
#include "types.h"

namespace flashkern {

struct LoraDropout {
  const uint64_t* seed = nullptr;  // where the call runs: a captured graph draws it anew
  uint64_t threshold = 0;  // a value stays when its random word is at least this; 0: no dropout
};

// One adapter (ids is null) or several, one for each row: A (adapters, rank, in) and
// B (adapters, out, rank) contiguous.
struct LoraAdapters {
  int64_t count;
  int64_t rank;
  DType dtype;  // float32 beside any x, else x's own
  const void* a;
  const void* b;
  const double* scale;  // (adapters,), with dropout's 1 / (1 - p) in it
  const int64_t* ids;   // (rows,), -1 for no adapter; null: every row has adapter 0
};

struct LoraForward {
  int64_t rows, in, out;
  DType dtype;    // of x and y
  LoraBase base;  // who computes x W^T + bias; kBlas: y holds it already
  const void* x;
  int64_t x_row;       // elements from one row to the next
  const void* weight;  // (out, in) contiguous
  const void* bias;    // (out,), or null
  void* y;             // (rows, out)
  void* h;             // (rows, rank), float32 (float64 for float64)
  LoraAdapters adapters;
  LoraDropout dropout;
};

struct LoraBackward {
  int64_t rows, in, out;
  DType dtype;    // of x, dy and dx
  LoraBase base;  // who computes dy W; kBlas: dx holds it already
  const void* x;
  int64_t x_row;
  const void* dy;
  int64_t dy_row;
  const void* h;
  const void* weight;  // (out, in) contiguous
  void* dx;            // (rows, in); null where x needs no gradient
  void* da;            // like A; null where the adapter needs none
  void* db;            // like B; null likewise
  LoraAdapters adapters;
  LoraDropout dropout;
};

FK_CPU_KERNEL(lora_forward, LoraForward)
FK_CPU_KERNEL(lora_backward, LoraBackward)
FK_CPU_KERNEL(lora_forward_plain, LoraForward)  // float64, unhurried
FK_CPU_KERNEL(lora_backward_plain, LoraBackward)

}  // namespace flashkern
