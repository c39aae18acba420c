"""Fixtures that every test shares: back ends, the CPU's instruction sets, threads, seeds.

A test that takes ``backend`` runs on each back end of this process: every instruction set of this
CPU and a GPU if there is one; or, with FLASHKERN_BACKEND=emulated, the CUDA kernels' sources on the
CPU, and then no other test runs. New tensors land on the back end's device by themselves.

``@pytest.mark.kernels("attention_forward", ...)`` names the operators that a test needs: where a
back end lacks one of them the test is left out.
"""

from collections.abc import Iterator

import pytest
import torch

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
