// A product that a GPU's BLAS adds to what a tensor holds. torch's dispatcher takes no Scalar from
// a library with a stable ABI; its C interface has this one.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "torch/device.h"

#if defined(FK_CUDA_KERNELS)
// libtorch_cuda alone has it: a weak reference, so that this library loads beside a CPU torch.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_cuda_addmm_out(AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle mat1,
                          AtenTensorHandle mat2, double beta, double alpha);
#endif

namespace flashkern {

// out += left right; in place, as torch's addmm_ is.
inline void addmm(const Tensor& out, const Tensor& left, const Tensor& right) {
#if defined(FK_CUDA_KERNELS)
  STD_TORCH_CHECK(aoti_torch_cuda_addmm_out != nullptr, "flashkern: this torch has no CUDA");
  const auto run = aoti_torch_cuda_addmm_out;
#else
  const auto run = aoti_torch_cpu_addmm_out;
#endif
  TORCH_ERROR_CODE_CHECK(run(out.get(), out.get(), left.get(), right.get(), 1.0, 1.0));
}

}  // namespace flashkern
