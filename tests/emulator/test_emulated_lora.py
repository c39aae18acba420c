"""tests/lora's bodies over the emulator: the sm_80 kernels' own source, without a GPU."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "lora")]

import emulated_lora
import test_lora
import test_multi

LIBRARY = os.environ.get("FLASHKERN_EMULATED_LORA", "")
pytestmark = pytest.mark.skipif(not LIBRARY, reason="FLASHKERN_EMULATED_LORA names no library")


@pytest.fixture(scope="session")
def emulated() -> emulated_lora.EmulatedLora:
    return emulated_lora.EmulatedLora(LIBRARY)


@pytest.fixture(autouse=True)
def in_place(emulated: emulated_lora.EmulatedLora, monkeypatch: pytest.MonkeyPatch) -> None:
    emulated.base = "own"
    emulated.put_in_place(monkeypatch, test_lora, test_multi)


@pytest.fixture
def isa() -> str:
    return "emulated"


@pytest.fixture(params=["blas", "own"])
def base(request: pytest.FixtureRequest, emulated: emulated_lora.EmulatedLora) -> Iterator[str]:
    emulated.base = request.param
    yield request.param
    emulated.base = "own"


# The bodies, each with its own parameters; the fixtures above stand in for the CPU's.
SINGLE = [name for name in dir(test_lora) if name.startswith("test_")]
MULTI = [name for name in dir(test_multi) if name.startswith("test_")]
ON_THE_HOST = {"test_an_id_out_of_range_is_refused"}
globals().update({name: getattr(test_lora, name) for name in SINGLE})
globals().update(
    {f"test_multi_{n[5:]}": getattr(test_multi, n) for n in MULTI if n not in ON_THE_HOST}
)
