"""A case made concrete: its contenders, the work it stands for, and how wrong a result is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.sampler import CONTROL, FLASHKERN, Contender

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
DTYPE_BYTES = {"f32": 4, "bf16": 2, "f16": 2}


@dataclass
class Problem:
    """What a case needs in order to be sampled and judged.

    `flops` and `bytes` are the least that any exact method must do: every input read once, every
    output written once. `exact` gives, for a contender's name, the float64 counterparts of its
    unpacked results.
    """

    contenders: list[Contender]
    flops: int = 0
    bytes: int = 0
    exact: Callable[[str], Sequence[Tensor]] | None = None
    own_exact: bool = False  # each contender has its own exact result (dropout masks)
    facts: dict[str, Any] = field(default_factory=dict)  # into the JSON beside each result
    units: dict[str, float] = field(default_factory=dict)  # work per call: {"tokens": 512}
    # What a contender (by name) computed, from its result: {"perplexity": 12.34}.
    quality: Callable[[str, Any], dict[str, Any]] | None = None


def relative_error(results: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The root mean square of the error over that of the exact values; the worst of the results."""
    worst = 0.0
    for result, truth in zip(results, exact, strict=True):
        if truth.numel() == 0:
            continue
        wrong = (result.detach().double() - truth).norm() / truth.norm().clamp_min(1e-300)
        worst = max(worst, float(wrong.nan_to_num(nan=float("inf"))))
    return worst


def same(one: Any, other: Any) -> bool:
    """Whether two contenders computed the same: numbers to four digits, anything else exactly."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=5e-5)
    return one == other


def with_control(contenders: Sequence[Contender]) -> list[Contender]:
    """The contenders and, when flashkern is among them, flashkern once more as its own control."""
    found = [c for c in contenders if c.name == FLASHKERN]
    again = [Contender(CONTROL, c.call, "control", c.prepare, c.unpack) for c in found]
    return [*contenders, *again]
