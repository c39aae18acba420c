"""Where a launch of the beam kernel gets its tickets: csrc/beam/sm80/tickets.h."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from machine import HERE, Kernels

Ask = Callable[..., tuple[bool, int, int, int]]


@pytest.fixture
def ask() -> Ask:
    """Whether they are the workspace's; how often malloc, memset and the last error were called."""
    library = Kernels(HERE / "tickets.cu")
    out, before = np.zeros(5, np.int32), np.zeros(3, np.int32)

    def one(stream: int, count: int, full: bool = False, capturing: bool = False):
        library.call("fk_tickets", stream, count, int(full), int(capturing), out)
        calls = out[2:] - before
        before[:] = out[2:]
        assert out[1] == 1  # all of them are zero
        return bool(out[0]), *(int(n) for n in calls)

    one(0, 1)
    return one


def test_a_stream_keeps_its_tickets(ask: Ask) -> None:
    assert ask(1001, 10) == (False, 1, 1, 0)
    assert ask(1001, 700) == (False, 0, 0, 0)
    assert ask(1001, 5000) == (False, 1, 1, 0)  # more than it has
    assert ask(1001, 5000, capturing=True) == (True, 0, 1, 0)


def test_a_device_without_memory(ask: Ask) -> None:
    """As when torch holds it all: no error, none is left behind, and nobody asks at each call."""
    assert ask(1002, 10, full=True) == (True, 1, 1, 1)
    assert ask(1002, 10, full=True) == (True, 0, 1, 0)
    assert ask(1002, 5000) == (False, 1, 1, 0)


def test_streams_without_end(ask: Ask) -> None:
    """What is kept is bounded: later streams use their workspace."""
    answers = [ask(stream, 10) for stream in range(2000, 2100)]
    kept = answers.count((False, 1, 1, 0))
    assert 50 <= kept <= 64 and answers[kept:] == [(True, 0, 1, 0)] * (100 - kept)
    assert ask(2000, 10) == (False, 0, 0, 0)
