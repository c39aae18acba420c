"""The real models that tests share, one load for a session: see benchmarks/models/loaders.py."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from benchmarks.models import loaders


@functools.cache
def _load(name: str) -> Any:
    return getattr(loaders, name)()


def real_model(name: str) -> Any:
    """What the loader `name` returns, not to be changed; skips where its package is missing."""
    reason = loaders.why_missing(name)
    if reason is not None:
        pytest.skip(reason)
    return _load(name)
