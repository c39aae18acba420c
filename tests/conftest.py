"""Fixtures that every test shares: the CPU instruction sets of this machine, threads, seeds."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import flashkern


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
