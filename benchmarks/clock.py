"""What a time is: clocks that measure calls, and the replay that feeds pytest-benchmark.

The providers of a case are measured in turn, call by call (see sampler.py), while pytest-benchmark
measures one function at a time. So a case is sampled first, and each provider's samples are then
replayed through pytest-benchmark's public ``timer=`` plug: its statistics and its JSON are those of
the recorded samples. A clock for another device has the same two members as `WallClock`; times of
CUDA events will come in here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol


class Clock(Protocol):
    """Measures calls."""

    name: str

    def seconds(self, call: Callable[[], object], loops: int) -> float:
        """The time of one call, as the mean of `loops` calls in a row."""


class WallClock:
    """Elapsed time, by ``time.perf_counter``: what a user waits for."""

    name = "wall"
    _now = staticmethod(time.perf_counter)

    def seconds(self, call: Callable[[], object], loops: int) -> float:
        start = self._now()
        for _ in range(loops):
            call()
        return (self._now() - start) / loops


class CpuClock(WallClock):
    """CPU time of the whole process. On one thread it hardly feels what else a machine runs."""

    name = "cpu"
    _now = staticmethod(time.process_time)


CLOCKS: dict[str, Callable[[], Clock]] = {"wall": WallClock, "cpu": CpuClock}


class Replay:
    """A timer for pytest-benchmark that shows recorded durations, the next one at each `step`."""

    __name__ = "replay"

    def __init__(self) -> None:
        self._now = 0.0
        self._samples: Iterator[float] = iter(())

    def load(self, samples: Iterable[float]) -> None:
        self._now, self._samples = 0.0, iter(list(samples))

    def __call__(self) -> float:
        return self._now

    def step(self) -> None:
        self._now += next(self._samples)
