"""Loads the operator library and names the CPU instruction set that its kernels use."""

import os
from pathlib import Path

import torch

# "emulated": the library of tests that runs the CUDA kernels' sources on a CPU, slowly.
BACKEND = os.environ.get("FLASHKERN_BACKEND", "")
if BACKEND not in ("", "emulated"):
    raise ImportError(f"flashkern: FLASHKERN_BACKEND must be empty or 'emulated', got {BACKEND!r}")
LIBRARY = Path(__file__).parent / f"libflashkern{'_' * bool(BACKEND)}{BACKEND}.so"

if not LIBRARY.exists():
    how = "install with `pip install .`, or build it in place with `make dev`"
    how = "`make test-emulated` builds it" if BACKEND else how
    raise ImportError(f"flashkern: the operator library {LIBRARY} is missing; {how}")
torch.ops.load_library(str(LIBRARY))

ops = torch.ops.flashkern

FORCED_ISA = os.environ.get("FLASHKERN_CPU_ISA", "")
if FORCED_ISA:  # asked here: the library itself would look at its first kernel, and end the process
    try:
        ops.cpu_isa(FORCED_ISA)
    except RuntimeError:
        raise ImportError(
            "flashkern: FLASHKERN_CPU_ISA must be portable, avx2, avx512, avx512_bf16 or amx_bf16, "
            f"one that this CPU and build have, got {FORCED_ISA!r}"
        ) from None


def has_kernel(name: str, device: str) -> bool:
    """Whether the loaded library runs the operator ``name`` on ``"cpu"`` or ``"cuda"`` tensors."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"flashkern::{name}", device.upper())


def cpu_isa(name: str = "") -> str:
    """Returns the CPU instruction set in use: ``"portable"``, ``"avx2"``, ``"avx512"``, that
    with products of bfloat16 pairs, ``"avx512_bf16"``, or with AMX's of tiles, ``"amx_bf16"``.

    Args:
        name: an instruction set to use from now on, or ``"best"`` for the best one that this CPU
            runs. Empty: changes nothing. The environment variable ``FLASHKERN_CPU_ISA`` sets the
            first choice.

    Raises:
        ValueError: this CPU or this build lacks the instruction set.

    Example:
        >>> import flashkern
        >>> flashkern.cpu_isa() in ("portable", "avx2", "avx512", "avx512_bf16", "amx_bf16")
        True
    """
    try:
        return ops.cpu_isa(name)
    except RuntimeError as error:
        raise ValueError(
            f"cpu_isa: name must be an ISA that this CPU and build have, got {name!r}"
        ) from error
