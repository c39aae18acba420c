// Where a call runs. A build has CPU kernels, GPU kernels or both; an adapter serves both, and asks
// here for what differs. In the emulated library the sources of the GPU kernels run on the CPU, on
// CPU tensors.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <optional>

#include "stream.h"
#include "torch/tensor.h"

#if defined(FK_CUDA_KERNELS)
// libtorch_cuda alone has it: a weak reference, so that this library loads beside a CPU torch.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace flashkern {

#if defined(FK_EMULATED_KERNELS)
inline constexpr bool kCpuKernels = false, kGpuKernels = true, kEmulated = true;
#elif defined(FK_CUDA_KERNELS)
inline constexpr bool kCpuKernels = true, kGpuKernels = true, kEmulated = false;
#else
inline constexpr bool kCpuKernels = true, kGpuKernels = false, kEmulated = false;
#endif

inline bool on_gpu(const Tensor& t) { return kEmulated || t.is_cuda(); }

// Whether a launcher may read the tensor's memory: the emulated GPU's is out of reach as any
// other's.
inline bool host_readable(const Tensor& t) { return !on_gpu(t); }

// A dropout seed: one int64 in the memory of the device that the call runs on.
inline const uint64_t* seed_of(const Tensor& seed, const Tensor& like) {
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1 &&
                      seed.is_cuda() == like.is_cuda(),
                  "dropout: the seed must be one int64 on the device of the tensors");
  return static_cast<const uint64_t*>(seed.const_data_ptr());
}

// While it lives, the tensor's GPU is the current one; `stream()` is torch's current stream there.
class GpuScope {
 public:
  explicit GpuScope(const Tensor& t) : index_(t.get_device_index()) {
    if constexpr (!kEmulated) guard_.emplace(index_);
  }

  GpuStream stream() const {
    void* stream = nullptr;
#if defined(FK_CUDA_KERNELS)
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                    "flashkern: this torch has no CUDA streams");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
#endif
    return static_cast<GpuStream>(stream);
  }

 private:
  int32_t index_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

}  // namespace flashkern
