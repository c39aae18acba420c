// Partial sums added in their order: what makes a split sum the same bits, run after run.
#include "lora/sm80/kernels.h"
#include "ptx/launch.h"

namespace flashkern::sm80 {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads)
    add_kernel(const float* parts, int64_t count, int64_t size, T* out) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= size) return;
  float sum = 0.0f;
  for (int64_t k = 0; k < count; ++k) sum += parts[k * size + i];
  out[i] = ptx::from_float<T>(sum);
}

}  // namespace

void add_parts(const float* parts, int64_t count, int64_t size, void* out, DType dtype,
               cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(divide_up(size, kThreads));
  for_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    ptx::launch(add_kernel<T>, {blocks, kThreads}, stream, parts, count, size,
                static_cast<T*>(out));
  });
}

}  // namespace flashkern::sm80
