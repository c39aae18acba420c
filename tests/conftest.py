"""Fixtures that every test shares: the CPU instruction sets of this machine, threads, seeds."""

from collections.abc import Iterator

import pytest
import torch

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
