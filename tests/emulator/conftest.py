"""Fixtures: the kernels of each .cu file beside this one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from machine import HERE, Kernels  # noqa: E402


@pytest.fixture(scope="session")
def primitives() -> Kernels:
    return Kernels(HERE / "primitives.cu")


@pytest.fixture(scope="session", params=["plain", "race"])
def hopper(request: pytest.FixtureRequest) -> Kernels:
    return Kernels(HERE / "hopper.cu", request.param)
