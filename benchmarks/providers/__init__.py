"""Who can run a case, and how: flashkern, its peers, and limits that are no peers.

Each operator's module maps a case to named factories. A factory that cannot serve on this machine
raises ImportError with the reason, and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from benchmarks.problem import Problem, with_control
from benchmarks.profiles import Attention, Beam, Case
from benchmarks.providers import attention, beam, lora
from benchmarks.sampler import CONTROL, FLASHKERN, Contender

Factory = Callable[[Any], Contender]


def _module(case: Case) -> ModuleType:
    if isinstance(case, Attention):
        return attention
    return beam if isinstance(case, Beam) else lora


def names(case: Case) -> list[str]:
    """The contenders of `case` in the order of the report; the control comes last."""
    return [*_module(case).factories(case), CONTROL]


def problem(case: Case) -> tuple[Problem, dict[str, str]]:
    """The case with its inputs made, and why each provider that is missing is missing."""
    torch.manual_seed(0)
    module = _module(case)
    made = module.inputs(case)
    contenders, missing = [], {}
    for name, factory in module.factories(case).items():
        try:
            contenders.append(factory(made))
        except ImportError as reason:
            if name == FLASHKERN:
                raise
            missing[name] = str(reason)
    result = module.problem(case, made, with_control(contenders))
    return result, missing
