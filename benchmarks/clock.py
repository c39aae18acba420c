"""What a time is: clocks that measure calls, and the replay that feeds pytest-benchmark.

The providers of a case are measured in turn, call by call (see sampler.py), while pytest-benchmark
measures one function at a time. So a case is sampled first, and each provider's samples are then
replayed through pytest-benchmark's public ``timer=`` plug: its statistics and its JSON are those of
the recorded samples. `EventClock` is a GPU's, with the same two members as `WallClock`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from statistics import median
from typing import Protocol

import torch


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


class EventClock:
    """GPU time of a call by CUDA events, from memory: the L2 cache is overwritten before each.

    The write takes a tenth of a millisecond, in which the host gets ahead of the GPU: what a call
    costs in Python is not part of its time unless it takes longer than that.
    """

    name = "cuda events"

    def __init__(self) -> None:
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        self._buffer = torch.empty(max(256 << 20, 4 * l2), dtype=torch.int8, device="cuda")

    def seconds(self, call: Callable[[], object], loops: int) -> float:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(loops)]
        for start, end in pairs:
            self._buffer.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return median(start.elapsed_time(end) for start, end in pairs) / 1e3


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
