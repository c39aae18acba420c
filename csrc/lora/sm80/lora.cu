// A LoRA call as launches.
//
//   decode     one launch (decode.cu); several adapters: [sort rows]  shrink  decode
//   forward    [sort rows]  shrink (x, A -> h)  product (x, W, h, B, bias -> y)
//   backward   [sort rows]  shrink (dy, B -> dh)  gradient (dy, h -> dB)  gradient (x, dh -> dA)
//              product (dy, W, dh, A -> dx)
//
// Where BLAS computes the base product, `product` runs without it, y = h B^T + bias, and the caller
// has BLAS add to that.
#include "lora/gpu.h"

#include <atomic>

#include "lora/sm80/kernels.h"
#include "ptx/launch.h"

namespace flashkern::gpu {
namespace {

using namespace sm80;

// Pieces of the workspace, one after another.
struct Workspace {
  char* next;
  template <class T>
  T* take(int64_t count) {
    auto* piece = reinterpret_cast<T*>(next);
    next += padded_bytes(count * sizeof(T));
    return piece;
  }
};

RowOrder sorted(const LoraAdapters& ad, int64_t rows, Workspace& workspace, cudaStream_t stream) {
  if (ad.ids == nullptr) return {};
  int* order = workspace.take<int>(rows);
  int* starts = workspace.take<int>(ad.count + 1);
  sort_rows(ad.ids, rows, ad.count, order, starts, stream);
  return {order, starts, ad.ids, static_cast<int>(ad.count)};
}

// A and B as the kernels see them: `along` is the dimension that the sum runs over.
Factor factor(const LoraAdapters& ad, const void* data, int64_t i_step, int64_t k_step,
              int64_t width) {
  return {data, ad.dtype == DType::kFloat32, i_step, k_step, ad.rank * width};
}

float host_scale(const LoraAdapters& ad) {
  return ad.ids == nullptr ? static_cast<float>(ad.scale[0]) : 0.0f;
}

void run_product(const ProductParams& p, cudaStream_t stream) {
  p.dtype == DType::kFloat32 ? product_float(p, stream) : product(p, stream);
}

void zero(void* p, int64_t bytes, cudaStream_t stream) {
  if (p == nullptr || bytes == 0) return;
  if (cudaMemsetAsync(p, 0, bytes, stream) != cudaSuccess) {
    throw std::runtime_error("lora_linear: cudaMemsetAsync failed");
  }
}

int64_t element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace

int compute_capability(int device) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  int capability = device < kDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (capability != 0) return capability;
  int major = 0, minor = 0;
  ptx::check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "a GPU");
  ptx::check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "a GPU");
  capability = 10 * major + minor;
  if (device < kDevices) known[device].store(capability, std::memory_order_relaxed);
  return capability;
}

int64_t lora_workspace(const LoraForward& p) { return forward_workspace(p); }
int64_t lora_workspace(const LoraBackward& p) { return backward_workspace(p); }

void lora_forward(const LoraForward& p, void* memory, GpuStream stream) {
  const LoraAdapters& ad = p.adapters;
  if (p.rows == 0 || p.out == 0) return;
  const int rank = static_cast<int>(ad.rank);
  const Factor a = factor(ad, ad.a, p.in, 1, p.in), b = factor(ad, ad.b, ad.rank, 1, p.out);
  auto* h = static_cast<float*>(p.h);
  const bool few = decode_fits(p), shrinks = few && decode_shrinks(p);
  Workspace workspace{static_cast<char*>(memory)};
  const RowOrder order = sorted(ad, p.rows, workspace, stream);
  if (rank > 0 && !shrinks) {
    shrink({p.rows, p.in, p.dtype, p.x, p.x_row, a, rank, h, host_scale(ad),
            ad.ids != nullptr ? ad.scale : nullptr, order, Keep(p.dropout)},
           workspace.next, stream);
  }
  if (few) {
    return decode({static_cast<int>(p.rows), p.in, p.out, p.dtype, p.x, p.x_row, p.weight, p.bias,
                   p.y, h, a, b, rank, host_scale(ad), shrinks, ad.ids, static_cast<int>(ad.count)},
                  stream);
  }
  const bool blas = p.base == LoraBase::kBlas;
  run_product({p.rows, p.out, blas ? 0 : p.in, p.dtype, p.x, p.x_row, p.weight, true, p.bias, p.y,
               rank > 0 ? h : nullptr, b, rank, order, Keep()},
              stream);
}

void lora_backward(const LoraBackward& p, void* memory, GpuStream stream) {
  const LoraAdapters& ad = p.adapters;
  const int rank = static_cast<int>(ad.rank);
  if (p.rows == 0) {
    zero(p.da, ad.count * rank * p.in * element_bytes(ad.dtype), stream);
    zero(p.db, ad.count * rank * p.out * element_bytes(ad.dtype), stream);
    return;
  }
  Workspace workspace{static_cast<char*>(memory)};
  const RowOrder order = sorted(ad, p.rows, workspace, stream);
  float* dh = workspace.take<float>(p.rows * rank);
  const bool blas = p.base == LoraBase::kBlas;
  if (p.da != nullptr || p.dx != nullptr) {
    shrink({p.rows, p.out, p.dtype, p.dy, p.dy_row, factor(ad, ad.b, 1, ad.rank, p.out), rank, dh,
            host_scale(ad), ad.ids != nullptr ? ad.scale : nullptr, order, Keep()},
           workspace.next, stream);
  }
  if (p.db != nullptr) {
    gradient({p.rows, p.out, ad.count, p.dtype, p.dy, p.dy_row, static_cast<const float*>(p.h),
              rank, p.db, ad.dtype, false, order, Keep()},
             workspace.next, stream);
  }
  if (p.da != nullptr) {
    gradient({p.rows, p.in, ad.count, p.dtype, p.x, p.x_row, dh, rank, p.da, ad.dtype, true, order,
              Keep(p.dropout)},
             workspace.next, stream);
  }
  if (p.dx != nullptr) {
    run_product({p.rows, p.in, blas ? 0 : p.out, p.dtype, p.dy, p.dy_row, p.weight, false, nullptr,
                 p.dx, dh, factor(ad, ad.a, 1, p.in, p.in), rank, order, Keep(p.dropout)},
                stream);
  }
}

}  // namespace flashkern::gpu
