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
    pytest.mark.skipif(_ops.BACKEND == "emulated", reason="nvcc made none of the emulated library"),
    pytest.mark.skipif(
        not _ops.has_kernel("beam_topk", "cuda"), reason="this build has no CUDA kernels"
    ),
    pytest.mark.skipif(sass.missing_tool() is not None, reason="cuobjdump or nvdisasm is missing"),
]


@dataclass(frozen=True)
class Budget:
    """What a kernel may take and must hold.

    Attributes:
        threads: of a block; blocks: how many a multiprocessor must hold by their registers.
        needs: instructions that must stand in the code, by the first letters of their names.
        fragments: in the main loop, at most so many LDSM, which load a tensor core's factors from
            shared memory, for each tensor-core instruction. 0: not asked.
        steady: no integer division and no float64 in the main loop.
    """

    threads: int
    blocks: int
    needs: tuple[str, ...] = ()
    fragments: float = 0
    steady: bool = False


COPY = "LDGSTS.E.BYPASS.LTC128B.128"
TILES = ("HMMA.16816.F32", "LDSM", COPY)
ATTENTION = (*TILES, "MUFU.EX2")
FLOAT_ATTENTION = ("HMMA.1688.F32.TF32", COPY, "MUFU.EX2")
DECODE = ("HMMA.16816.F32", "LDG.E.128")
TOPK = ("LDG.E.128.CONSTANT", "MUFU.EX2", "MEMBAR.ALL.GPU", "ATOMG.E.ADD.S32.STRONG.GPU")
HALF = r"(BFloat16|Half)"
# forward<dtype, columns, form>, backward<dtype, columns, full>,
# decode_kernel<dtype, adapter's, strips of rows, slabs of ranks>,
# shrink_kernel<dtype, ranks, float32 adapter>, gradient_kernel<dtype, ranks>,
# topk<dtype, constrained>.
BUDGETS = {
    rf"forward<{HALF}, \d+, 0>": Budget(32, 8, ATTENTION, fragments=0.63),
    rf"forward<{HALF}, \d+, 1>": Budget(128, 2, ATTENTION, fragments=0.63),
    rf"forward<{HALF}, \d+, 2>": Budget(128, 2, ATTENTION, fragments=0.32),
    rf"forward<{HALF}, \d+, 3>": Budget(128, 2, ATTENTION, fragments=0.32, steady=True),
    r"forward<float, \d+, 0>": Budget(32, 8, FLOAT_ATTENTION),
    r"forward<float, (32|64|128), 1>": Budget(128, 2, FLOAT_ATTENTION),
    r"forward<float, 256, 1>": Budget(64, 4, FLOAT_ATTENTION),
    r"merge<\w+>": Budget(128, 8, ("MUFU.EX2", "LDG.E.128")),
    r"append": Budget(128, 16, ("LDG.E.128", "STG.E.128")),
    rf"backward<{HALF}, (32|256), \w+>": Budget(128, 2, ATTENTION, fragments=0.67, steady=True),
    rf"backward<{HALF}, (64|128), false>": Budget(128, 2, ATTENTION, fragments=0.43, steady=True),
    rf"backward<{HALF}, (64|128), true>": Budget(256, 1, ATTENTION, fragments=0.61, steady=True),
    r"backward<float, (32|64|128), \w+>": Budget(128, 2, FLOAT_ATTENTION, steady=True),
    r"backward<float, 256, \w+>": Budget(64, 4, FLOAT_ATTENTION, steady=True),
    r"row_deltas<\w+>": Budget(128, 7, ("LDG.E.128",)),
    r"sink_gradients": Budget(32, 32, ("DADD",)),
    r"decode_kernel<\w+, \w+, ([12], \d|4, [01])>": Budget(256, 2, DECODE, steady=True),
    r"decode_kernel<\w+, \w+, (8, \d|4, 2)>": Budget(256, 1, DECODE, steady=True),
    r"product_kernel<.*>": Budget(128, 2, TILES, fragments=0.25, steady=True),
    r"expand_kernel<BFloat16>": Budget(128, 3, ("HMMA.16816.F32", "LDSM", "STG.E.128")),
    r"expand_kernel<Half>": Budget(128, 2, ("HMMA.16816.F32", "LDSM", "STG.E.128")),
    r"product_float_kernel": Budget(256, 2, ("FFMA", "STG.E.128"), steady=True),
    r"(shrink|gradient)_kernel<\w+, (16|32)(, true)?>": Budget(128, 3, TILES, 0.67, steady=True),
    r"(shrink|gradient)_kernel<\w+, 64(, true)?>": Budget(256, 2, TILES, 0.67, steady=True),
    r"shrink_kernel<\w+, (16|32), false>": Budget(128, 3, TILES, 1, steady=True),
    r"shrink_kernel<\w+, 64, false>": Budget(256, 2, TILES, 1, steady=True),
    r"sort_kernel": Budget(256, 8),
    r"add_kernel<\w+>": Budget(256, 8),
    r"topk<\w+, (true|false)>": Budget(512, 2, TOPK),
}


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
    bad = [
        f"{k.name} on {k.arch}: a stack of {k.stack}, {k.count('STL')} STL, {k.count('LDL')} LDL"
        for k in kernels
        if k.stack or k.local or k.count("LDL", "STL")
    ]
    assert not bad, "\n".join(bad)


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


def test_fragments_of_the_main_loop(kernels: list[sass.Kernel]) -> None:
    """What a product takes from shared memory: that limits it before the tensor cores do."""
    for name, kernel, budget in budgeted(kernels):
        if budget.fragments:
            loop = kernel.main_loop()
            loads = sum(n for i, n in loop.items() if i.startswith("LDSM"))
            assert loads <= budget.fragments * sass.by_kind(loop)["tensor"], name


def test_steady_main_loops(kernels: list[sass.Kernel]) -> None:
    """A division of integers begins with a reciprocal: a conversion that rounds up, I2F.RP."""
    for name, kernel, budget in budgeted(kernels):
        slow = re.compile(r"I2F.*\.RP|D(ADD|MUL|FMA|SETP)|MUFU\.\w+64H")
        assert not (budget.steady and [i for i in kernel.main_loop() if slow.match(i)]), name


def test_the_library_needs_no_cuda_to_load() -> None:
    """The runtime is inside, and what a CUDA torch alone has is a weak symbol."""
    command = ["readelf", "-d", str(_ops.LIBRARY)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", listing)
    assert [name for name in needed if re.search("cuda|nvrtc|cudart", name)] == []
