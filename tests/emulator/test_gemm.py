"""Two whole kernels, sm_80's way and Hopper's: equal to numpy under every schedule, compiled by
nvcc, and every fault put into them caught."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from faults import loosened_waits, removed_barriers, replaced
from machine import (
    HERE,
    NVCC,
    ROOT,
    EmulatorError,
    Kernels,
    bfloat16,
    compile_kernel,
    from_bfloat16,
    run_sanitized,
)

SHAPES = [(64, 64, 64), (1, 1, 8), (63, 65, 72), (130, 70, 320)]
AMPERE, HOPPER = HERE / "gemm.cu", HERE / "hopper_gemm.cu"


def fenced(x: np.ndarray, slack: int = 1 << 15) -> tuple[np.ndarray, np.ndarray]:
    """A copy of x and the elements after it, all ones (NaN): a fault may run past the end."""
    memory = np.full((x.size + slack) * x.itemsize, 0xFF, np.uint8).view(x.dtype)
    memory[: x.size] = x.ravel()
    return memory[: x.size].reshape(x.shape), memory[x.size :]


def error_of(kernels: Kernels, m: int, n: int, k: int, seed: int = 1) -> float:
    rng = np.random.default_rng(m * n + k)
    a, b = (fenced(bfloat16(rng.standard_normal((rows, k))))[0] for rows in (m, n))
    c, beyond = fenced(np.full((m, n), np.nan, np.float32))
    kernels.seed(seed)
    kernels.call("fk_gemm", a, b, c, m, n, k)
    if (beyond.view(np.uint8) != 0xFF).any():
        return np.inf
    return float(np.abs(c - from_bfloat16(a) @ from_bfloat16(b).T).max())


@pytest.mark.parametrize("variant", ["plain", "race"])
@pytest.mark.parametrize("source", [AMPERE, HOPPER], ids=["ampere", "hopper"])
def test_equals_numpy(source: Path, variant: str) -> None:
    kernels = Kernels(source, variant)
    for shape in SHAPES:
        for seed in range(8):
            assert error_of(kernels, *shape, seed) < 1e-4, (shape, seed)


@pytest.mark.parametrize("source", [AMPERE, HOPPER], ids=["ampere", "hopper"])
def test_the_same_seed_gives_the_same_bits(source: Path) -> None:
    kernels = Kernels(source)
    errors = {error_of(kernels, 130, 70, 320, seed) for seed in (3, 3, 9)}
    assert len(errors) == 1


def sanitized(source: str, name: str, shape: tuple[int, int, int]) -> str:
    """What AddressSanitizer says of one run, "" where it is content."""
    compile_kernel(source, name, "asan")
    code = f"""
import numpy as np
from machine import Kernels
m, n, k = {shape}
a, b = np.zeros((m, k), np.uint16), np.zeros((n, k), np.uint16)
Kernels({source!r}, 'asan', {name!r}).call('fk_gemm', a, b, np.zeros((m, n), np.float32), m, n, k)
print('done')
"""
    done = run_sanitized(code)
    return "" if "done" in done.stdout else done.stderr


def caught(source: str, name: str) -> str:
    """What tells of a fault: "" where nothing does. Plain runs, the race detector, then ASan."""
    for variant in ("plain", "race"):
        kernels = Kernels(source, variant, name)
        for seed in range(3):
            try:
                for shape in SHAPES[:1] + SHAPES[2:]:
                    if not error_of(kernels, *shape, seed) < 1e-4:
                        return f"{variant}: wrong result"
            except EmulatorError as error:
                return f"{variant}: {error}"
    return sanitized(source, name, (63, 65, 72))


FAULTS = [
    *((AMPERE, *f) for f in removed_barriers(AMPERE.read_text())),
    *((AMPERE, *f) for f in loosened_waits(AMPERE.read_text())),
    *(
        (AMPERE, *f)
        for f in replaced(
            AMPERE.read_text(),
            [
                ("if (r < p.m && c < p.n) p.c", "if (r < p.m) p.c"),
                ("first + row < rows ?", "first + row <= rows ?"),
                ("min(8, max(0, k - column))", "8"),
                ("k / 8 + lane / 16)", "k / 8 + lane / 16 + 1)"),
                ("lane % 4 * 2 + i % 2", "lane % 4 * 2 + i / 2"),
                ("kStages = 2", "kStages = 1"),
            ],
        )
    ),
    *((HOPPER, *f) for f in removed_barriers(HOPPER.read_text())),
    *((HOPPER, *f) for f in loosened_waits(HOPPER.read_text())),
    *(
        (HOPPER, *f)
        for f in replaced(
            HOPPER.read_text(),
            [
                ("[(step - 1) % kStages]", "[step % kStages]"),
                ("round % 2 ^ 1", "round % 2"),
                ("2 * kTileBytes)", "kTileBytes)"),
                ("ptx::Swizzle::k128, 16, 1024", "ptx::Swizzle::k128, 16, 512"),
                ("step + k > 0", "k > 0"),
                ("advance(b, 32 * k)", "advance(b, 16 * k)"),
                ("kConsumers / 32);", "kConsumers / 32 - 1);"),
            ],
        )
    ),
]


@pytest.mark.parametrize(
    ("source", "what", "text"), FAULTS, ids=[f"{s.stem}: {w}" for s, w, _ in FAULTS]
)
def test_faults_are_caught(source: Path, what: str, text: str) -> None:
    assert caught(text, source.stem), what


@pytest.mark.parametrize("source", [AMPERE, HOPPER], ids=["ampere", "hopper"])
def test_address_sanitizer_is_content(source: Path) -> None:
    assert sanitized(source.read_text(), source.stem, (70, 66, 40)) == ""


def test_address_sanitizer_sees_the_kernel() -> None:
    """A store beyond global memory is reported at the kernel's line."""
    fault = AMPERE.read_text().replace("if (r < p.m && c < p.n)", "if (1)")
    told = sanitized(fault, "gemm", (70, 66, 40))
    assert "heap-buffer-overflow" in told and "gemm.cu:" in told


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize(
    ("name", "arch"),
    [("gemm", "80"), ("gemm", "90a"), ("hopper_gemm", "90a"), ("hopper", "90a"),
     ("primitives", "80"), ("machine_room", "90a")],
)  # fmt: skip
def test_nvcc_compiles_the_same_source(name: str, arch: str, tmp_path: Path) -> None:
    command = [str(NVCC), "-std=c++20", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-cubin",
               f"-I{ROOT / 'csrc'}", f"-I{HERE}", "-Xptxas=-v", str(HERE / f"{name}.cu"),
               "-o", str(tmp_path / "out.cubin")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if "gemm" in name:
        assert "0 bytes spill stores, 0 bytes spill loads" in done.stderr
        assert "wgmma" not in done.stderr  # ptxas warns where it must serialise wgmma
