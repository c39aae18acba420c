"""Interleaved sampling: every provider of a case is called in turn, round after round.

A machine's speed drifts: clocks, neighbours, page caches. Two providers measured one after the
other see different machines; measured in turn, they see the same one, and the ratio of their
medians is what the report shows. The order turns and reverses from round to round, so that nobody
always runs behind the same neighbour. A short call is first made once more outside the time: what
its neighbour left in the caches, or took from them, would otherwise be half of what is measured.
flashkern runs twice in each round, the second time as its
own control: whatever differs between the two is noise.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.clock import Clock

FLASHKERN = "flashkern"
CONTROL = "flashkern again"

_SAMPLE_SECONDS = 5e-4  # shorter calls are repeated inside one sample
_WARM_SECONDS = 0.05  # calls shorter than this depend on what the caches hold
_MOST_ROUNDS = 60


def _nothing() -> None:
    pass


@dataclass
class Contender:
    """One provider of one case: a call to measure, and how to read its result."""

    name: str
    call: Callable[[], Any]
    role: str = "peer"  # or "flashkern", "control", "limit" (less work than the others: no peer)
    prepare: Callable[[], None] = _nothing  # before each sample, outside the time
    unpack: Callable[[Any], Any] = field(default=lambda result: result)
    scale: float = 1.0  # of its time, where a call does more than the case asks for


@dataclass
class Samples:
    """What sampling a case gave: seconds per call of each contender, in the order of the rounds."""

    seconds: dict[str, list[float]]
    wall: float


def _order(round_index: int, count: int) -> list[int]:
    turn = [(round_index + i) % count for i in range(count)]
    return turn if round_index % 2 == 0 else turn[::-1]


def sample(contenders: Sequence[Contender], clock: Clock, budget: float, least: int = 5) -> Samples:
    """Measures `contenders` in turn for about `budget` seconds, `least` rounds at least.

    Each must have been called before: a first call pays for allocations and packing. The first
    round tells how often a short call is repeated inside a sample; a call that needs no repeating
    keeps its time from that round. A contender so slow that it would eat the budget of the others
    is measured in every third round only.
    """
    start = time.perf_counter()
    estimate = []
    for contender in contenders:
        contender.prepare()
        estimate.append(max(clock.seconds(contender.call, 1), 1e-7))
    loops = [min(1000, math.ceil(_SAMPLE_SECONDS / t)) for t in estimate]
    slow = max(2 * budget / len(contenders) / least, 3 * min(estimate))
    seconds: dict[str, list[float]] = {
        c.name: [t * c.scale] if n == 1 else []
        for c, t, n in zip(contenders, estimate, loops, strict=True)
    }
    collecting = gc.isenabled()
    gc.disable()
    try:
        for index in range(1, _MOST_ROUNDS):
            if index >= least and time.perf_counter() - start > budget:
                break
            for i in _order(index, len(contenders)):
                if estimate[i] > slow and index % 3:
                    continue
                contenders[i].prepare()
                if estimate[i] < _WARM_SECONDS:
                    contenders[i].call()
                took = clock.seconds(contenders[i].call, loops[i])
                seconds[contenders[i].name].append(took * contenders[i].scale)
    finally:
        if collecting:
            gc.enable()
    return Samples(seconds, time.perf_counter() - start)
