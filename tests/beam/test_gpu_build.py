"""What nvcc makes of the GPU kernel: registers, spills, and the instructions that were meant."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent.parent / "csrc"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not here")


def nvcc(*options: str | Path) -> str:
    source = CSRC / "beam" / "sm80" / "topk.cu"
    command = [str(NVCC), "-std=c++20", "-O3", f"-I{CSRC}", *map(str, options), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_no_spills(arch: str, tmp_path: Path) -> None:
    report = nvcc("-cubin", f"-arch={arch}", "-Xptxas", "-v", "-o", tmp_path / "topk.cubin")
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", report)
    assert spills == [("0", "0")] * 3
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
    assert len(registers) == 3 and max(registers) <= 64  # two blocks of 512 threads


def test_instructions(tmp_path: Path) -> None:
    """128-bit loads past the coherent path; the ticket is handed on and taken with its fences.

    The emulator runs one block after another, so that a missing fence is seen here alone.
    """
    nvcc("-ptx", "-arch=compute_80", "-o", tmp_path / "topk.ptx")
    kernels = (tmp_path / "topk.ptx").read_text().split(".entry")[1:]
    assert len(kernels) == 3
    for kernel in kernels:
        assert kernel.count("atom.add.acq_rel.gpu") == 1
        loads = re.findall(r"ld\.global\.nc\.\S+", kernel)
        assert any("v4" in load for load in loads)
        assert ".local" not in kernel
