"""What nvcc made of the CUDA kernels: registers, no spills, the instructions that were meant.

Reads the library that is loaded, so it runs where that one has CUDA kernels: `make cuda-check`.
Every kernel has a line in BUDGETS: a new one fails here until its own is written.
"""

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from flashkern import _ops
from tools import sass

pytestmark = [
    pytest.mark.skipif(_ops.BACKEND == "emulated", reason="the emulated library was not made by nvcc"),
    pytest.mark.skipif(
        not _ops.has_kernel("beam_topk", "cuda"), reason="this build has no CUDA kernels"
    ),
    pytest.mark.skipif(sass.missing_tool() is not None, reason="cuobjdump or nvdisasm is missing"),
]


@dataclass(frozen=True)
class Budget:
    """threads: of a block; blocks: how many a multiprocessor must hold by their registers.

    needs: instructions that must stand in the code, by the first letters of their names.
    loads: in the main loop, at most so many loads from shared memory for each tensor-core
    instruction; 0: not asked.
    """

    threads: int
    blocks: int
    needs: tuple[str, ...] = ()
    loads: float = 0


TENSOR = ("HMMA.16816", "LDSM", "LDGSTS", "MUFU.EX2")
BUDGETS: dict[str, Budget] = {}


@pytest.fixture(scope="module")
def kernels() -> list[sass.Kernel]:
    return sass.read_kernels(_ops.LIBRARY)


def budget_of(kernel: sass.Kernel) -> Budget | None:
    found = [b for pattern, b in BUDGETS.items() if re.fullmatch(pattern, kernel.name)]
    assert len(found) <= 1, f"{kernel.name} has {len(found)} budgets"
    return found[0] if found else None


def budgeted(kernels: list[sass.Kernel]) -> Iterator[tuple[str, sass.Kernel, Budget]]:
    for kernel in kernels:
        if (budget := budget_of(kernel)) is not None:
            yield f"{kernel.name} on {kernel.arch}", kernel, budget


def test_every_kernel_has_a_budget(kernels: list[sass.Kernel]) -> None:
    assert [k.name for k in kernels if budget_of(k) is None] == []
    names = [k.name for k in kernels]
    assert [p for p in BUDGETS if not any(re.fullmatch(p, name) for name in names)] == []


def test_every_gpu_has_every_kernel(kernels: list[sass.Kernel]) -> None:
    """The same kernels for each GPU, and PTX of compute_80 for those to come."""
    archs = {k.arch for k in kernels}
    names = [{k.name for k in kernels if k.arch == arch} for arch in archs]
    assert all(those == names[0] for those in names)
    for kind, marker in (("-lelf", "cubin"), ("-lptx", "ptx")):
        listing = sass.run("cuobjdump", kind, str(_ops.LIBRARY))
        found = set(re.findall(rf"\.(sm_\w+)\.{marker}", listing))
        assert found == (archs if marker == "cubin" else {"sm_80"})


def test_no_local_memory(kernels: list[sass.Kernel]) -> None:
    """Neither spills nor arrays that a variable indexes."""
    bad = [(k.name, k.arch, k.local) for k in kernels if k.local or k.count("LDL", "STL")]
    assert bad == []


def test_registers(kernels: list[sass.Kernel]) -> None:
    """Registers come in units of 256 for each warp, of 65536 for a multiprocessor."""
    for name, kernel, budget in budgeted(kernels):
        of_warp = -(-kernel.registers * 32 // 256) * 256
        assert of_warp * (budget.threads // 32) * budget.blocks <= 65536, name


def test_static_shared_memory(kernels: list[sass.Kernel]) -> None:
    """Shared memory is dynamic (ptx::shared_storage); sm_90 keeps 1 KiB of its own."""
    assert [(k.name, k.shared) for k in kernels if k.shared > 1024] == []


def test_instructions(kernels: list[sass.Kernel]) -> None:
    for name, kernel, budget in budgeted(kernels):
        for instruction in budget.needs:
            assert kernel.count(instruction) > 0, f"{name} has no {instruction}"


def test_loads_of_the_main_loop(kernels: list[sass.Kernel]) -> None:
    """What a product takes from shared memory: that limits it before the tensor cores do."""
    for name, kernel, budget in budgeted(kernels):
        if budget.loads:
            loop = sass.by_kind(kernel.main_loop())
            assert loop["load shared"] <= budget.loads * loop["tensor"], (name, loop)


def test_the_library_needs_no_cuda_to_load() -> None:
    """The runtime is inside, and what a CUDA torch alone has is a weak symbol."""
    command = ["readelf", "-d", str(_ops.LIBRARY)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", listing)
    assert [name for name in needed if re.search("cuda|nvrtc|cudart", name)] == []
