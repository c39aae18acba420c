"""Fixtures that every test shares: back ends, the CPU's instruction sets, threads, seeds.

A test that takes ``backend`` runs on each back end of this process: every instruction set of this
CPU and a GPU if there is one; or, with FLASHKERN_BACKEND=emulated, the CUDA kernels' sources on the
CPU, and then no other test runs; ``--backend=cuda`` runs one back end's tests alone. New tensors
land on the back end's device by themselves.

``@pytest.mark.kernels("attention_forward", ...)`` names the operators that a test needs: where a
back end lacks one of them the test is left out.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

if find_spec("hypothesis") is None:  # its tests are skipped, the others of their files are not
    sys.modules["hypothesis"] = absent = MagicMock()
    absent.given.return_value = pytest.mark.skip(reason="hypothesis is not installed")
    absent.settings.return_value = lambda test: test

import flashkern
from flashkern import _ops

EMULATED = _ops.BACKEND == "emulated"


def available_isas() -> list[str]:
    names = []
    for name in ("portable", "avx2", "avx512", "avx512_bf16", "amx_bf16"):
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
    if device == "cuda":
        settle(request.node.nodeid)


def settle(test: str) -> None:
    """Waits for the GPU. A kernel's fault ends the process, in which nothing would run any more.

    Under pytest-xdist another worker takes its place.
    """
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"{test}: {error}", file=sys.__stderr__, flush=True)
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        pytest.exit(f"the GPU gave up in {test}: {error}", returncode=1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", default="", help="the tests of this back end alone: cuda, avx2")
    parser.addoption("--stop-at", type=float, default=0.0, help="skip what starts after that time")


def pytest_runtest_setup(item: pytest.Item) -> None:
    end = item.config.getoption("--stop-at")
    if end and time.time() > end:
        pytest.skip("out of time")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """One back end's tests where one is asked for; in an emulated process none that takes long."""
    asked = "emulated" if EMULATED else config.getoption("--backend")
    if not asked:
        return
    if asked not in backends():
        raise pytest.UsageError(f"--backend must be one of {backends()}, got {asked!r}")

    def belongs(item: pytest.Item) -> bool:
        long = EMULATED and item.get_closest_marker("long")
        callspec = getattr(item, "callspec", None)
        return callspec is not None and callspec.params.get("backend") == asked and not long

    chosen = [item for item in items if belongs(item)]
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
def far() -> Iterator[Callable[[Tensor, int], Tensor]]:
    """Gives a tensor again with its last element past 2^31 elements along one dimension.

    All share one block of 2-byte elements. Only pages that hold a value are ever touched.
    """
    room, gap = 1 << 22, (1 << 31) + (1 << 24)
    block, taken = torch.empty(0), 0

    def move(x: Tensor, dim: int) -> Tensor:
        nonlocal taken, block
        if not taken:
            free = torch.cuda.mem_get_info()[0] if x.is_cuda else available_memory()
            if free < 8 << 30:
                pytest.skip("less than 8 GiB of memory available")
            block = torch.empty(gap + 8 * room, dtype=torch.bfloat16, device=x.device)
        strides = list(torch.empty_like(x[(slice(None),) * dim + (0,)]).contiguous().stride())
        strides.insert(dim, gap // (x.shape[dim] - 1))
        block_of_dtype = block.view(x.dtype)
        copy = block_of_dtype.as_strided(x.shape, strides, taken).copy_(x)
        taken += room
        assert x.element_size() == 2 and x.numel() <= room
        assert copy.stride(dim) * (x.shape[dim] - 1) > 1 << 31
        return copy

    yield move
    block = torch.empty(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
