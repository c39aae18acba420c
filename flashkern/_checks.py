"""Argument checks: every message reads ``op: argument must X, got Y``."""

import math
import operator
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FINITE = (-sys.float_info.max, math.inf)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check(condition: bool, op: str, argument: str, must: str, got: object) -> None:
    """Raises ValueError unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{op}: {argument} must {must}, got {got}")


def check_tensor(op: str, argument: str, value: object) -> None:
    """Raises TypeError unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {argument} must be a tensor, got {type(value).__name__}")


def check_dtype(op: str, argument: str, value: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """Raises TypeError unless the tensor's dtype is one of ``allowed``."""
    if value.dtype not in allowed:
        names = ", ".join(dtype_name(dtype) for dtype in allowed)
        raise TypeError(f"{op}: {argument} must have dtype {names}, got {dtype_name(value.dtype)}")


def number(op: str, argument: str, value: Any, must: str, least: float, below: float) -> float:
    """The value as a float, in [least, below); with the bounds FINITE any finite number.

    Comparisons, where ``math.isfinite`` would do for numbers: torch.compile traces them through a
    scale that is made of a symbolic size.
    """
    if not isinstance(value, int | float) and (
        isinstance(value, Tensor) or not hasattr(value, "__float__")
    ):
        raise TypeError(f"{op}: {argument} must be a number, got {type(value).__name__}")
    if not least <= value < below:
        raise ValueError(f"{op}: {argument} must {must}, got {value}")
    return float(value)


def integer(op: str, argument: str, value: Any) -> int:
    """The value, which must be an integer, a symbolic one included."""
    if isinstance(value, int | torch.SymInt):
        return value  # type: ignore[return-value]
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{op}: {argument} must be an integer, got {value!r}") from None


def check_device(op: str, argument: str, value: Tensor, like: Tensor) -> None:
    """Raises ValueError unless the tensor is on the device of ``like``."""
    if value.device != like.device:
        raise ValueError(f"{op}: {argument} must be on device {like.device}, got {value.device}")


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` as ``"float32"``."""
    return str(dtype).removeprefix("torch.")
