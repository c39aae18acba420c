"""The kernels of a .cu file on a real GPU: compiled by nvcc, called as machine.Kernels is."""

from __future__ import annotations

import ctypes
import hashlib
from pathlib import Path

import numpy as np
import torch
from machine import BUILD, HERE, NVCC, ROOT, Argument, EmulatorError, newest_header, run

# Arguments that the host reads before it launches; every other array lies on the GPU.
ON_HOST = {
    "fk_tma_load": {3},
    "fk_tma_store": {3},
    "fk_wgmma": {4},
    "fk_wgmma_registers": {2},
    "fk_cluster": {1},
}


def compile_for_gpu(source: Path, arch: str) -> Path:
    """A shared library of the unchanged source: kernels, launchers and entry points."""
    if NVCC is None:
        raise RuntimeError("nvcc is neither on PATH nor in /usr/local/cuda/bin")
    key = hashlib.sha1(f"{source.read_text()}{arch}{newest_header()}".encode()).hexdigest()[:12]
    library = BUILD / "gpu" / f"{source.stem}-{arch}-{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        run([NVCC, "-std=c++20", "-O2", f"-I{ROOT / 'csrc'}", f"-I{HERE}", "-shared",
             "-Xcompiler", "-fPIC", "--expt-relaxed-constexpr",
             f"-gencode=arch=compute_{arch},code=sm_{arch}", "-o", library, source])  # fmt: skip
    return library


class GpuKernels:
    """kernels.call("fk_name", array, 3, ...): arrays go to the GPU and come back."""

    def __init__(self, source: Path, arch: str) -> None:
        self.library = ctypes.CDLL(str(compile_for_gpu(source, arch)))

    def call(self, name: str, *arguments: Argument) -> None:
        moved: list[tuple[np.ndarray, torch.Tensor]] = []
        passed: list[object] = []
        for place, argument in enumerate(arguments):
            if not isinstance(argument, np.ndarray):
                passed.append(ctypes.c_int(argument or 0))
            elif place in ON_HOST.get(name, ()):
                passed.append(ctypes.c_void_p(argument.ctypes.data))
            else:
                there = torch.from_numpy(argument.view(np.uint8).reshape(-1)).cuda()
                moved.append((argument, there))
                passed.append(ctypes.c_void_p(there.data_ptr()))
        torch.cuda.synchronize()
        function = self.library[name]
        function.restype = ctypes.c_char_p
        error = function(*passed)
        if error is not None:
            raise EmulatorError(error.decode())
        for here, there in moved:
            here.view(np.uint8).reshape(-1)[:] = there.cpu().numpy()
