"""The calls that every test of this folder goes through, and the operators that they need."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from flashkern import _ops

sys.path.insert(0, str(Path(__file__).parent))

from calls import CALLS, Call  # noqa: E402


@pytest.fixture(params=CALLS, ids=lambda call: call.name)
def call(request: pytest.FixtureRequest, backend: str) -> Call:
    """A call whose operators the back end has."""
    device = "cuda" if backend == "cuda" else "cpu"
    absent = [name for name in request.param.kernels if not _ops.has_kernel(name, device)]
    if absent:
        pytest.skip(f"{backend} has no kernel of {', '.join(absent)}")
    return request.param
