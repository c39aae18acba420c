"""Fixtures that every test shares: back ends, the CPU's instruction sets, threads, seeds.

A test that takes ``backend`` runs on each back end of this process: every instruction set of this
CPU and a GPU if there is one; or, with FLASHKERN_BACKEND=emulated, the CUDA kernels' sources on the
CPU, and then no other test runs. New tensors land on the back end's device by themselves.

``@pytest.mark.kernels("attention_forward", ...)`` names the operators that a test needs: where a
back end lacks one of them the test is left out.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import flashkern
from flashkern import _ops

EMULATED = _ops.BACKEND == "emulated"


def available_isas() -> list[str]:
    names = []
    for name in ("portable", "avx2", "avx512"):
        try:
            flashkern.cpu_isa(name)
            names.append(name)
        except ValueError:
            continue
    flashkern.cpu_isa("best")
    return names


@pytest.fixture(params=available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once for each instruction set that this machine has."""
    before = flashkern.cpu_isa()
    flashkern.cpu_isa(request.param)
    yield request.param
    flashkern.cpu_isa(before)


@pytest.fixture(params=["blas", "own"])
def base(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test with each way to compute the base product of a LoRA linear."""
    flashkern._ops.ops.lora_base(request.param)
    yield request.param
    flashkern._ops.ops.lora_base("auto")


def backends() -> list[str]:
    if EMULATED:
        return ["emulated"]
    return available_isas() + ["cuda"] * torch.cuda.is_available()


@pytest.fixture(params=backends())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once for each back end: an instruction set, ``"emulated"`` or ``"cuda"``."""
    marker = request.node.get_closest_marker("kernels")
    device = "cuda" if request.param == "cuda" else "cpu"
    for name in marker.args if marker else ():
        if not _ops.has_kernel(name, device):
            pytest.skip(f"{request.param} has no kernel of {name}")
    before = flashkern.cpu_isa()
    if request.param in available_isas():
        flashkern.cpu_isa(request.param)
    with torch.device(device):
        yield request.param
    flashkern.cpu_isa(before)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In an emulated process: the tests of back ends alone, and none that takes long."""
    if not EMULATED:
        return
    chosen = [
        item
        for item in items
        if "backend" in getattr(item, "fixturenames", ()) and not item.get_closest_marker("long")
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same seed."""
    torch.manual_seed(0)


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def available_memory() -> int:
    """Bytes that may be asked for without swapping; 0 where the system does not say."""
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


@pytest.fixture
def far() -> Callable[[Tensor, int], Tensor]:
    """Gives a tensor again with its last element past 2^31 elements along one dimension.

    All share one block of 2-byte elements. Only pages that hold a value are ever touched.
    """
    if available_memory() < 8 << 30:
        pytest.skip("less than 8 GiB of memory available")
    room, gap = 1 << 22, (1 << 31) + (1 << 24)
    block = torch.empty(gap + 8 * room, dtype=torch.bfloat16)
    taken = 0

    def move(x: Tensor, dim: int) -> Tensor:
        nonlocal taken
        strides = list(torch.empty_like(x[(slice(None),) * dim + (0,)]).contiguous().stride())
        strides.insert(dim, gap // (x.shape[dim] - 1))
        block_of_dtype = block.view(x.dtype)
        copy = block_of_dtype.as_strided(x.shape, strides, taken).copy_(x)
        taken += room
        assert x.element_size() == 2 and x.numel() <= room
        assert copy.stride(dim) * (x.shape[dim] - 1) > 1 << 31
        return copy

    return move
