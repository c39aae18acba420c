"""Argument checks: every message reads ``op: argument must X, got Y``."""

import math
import operator
import re
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

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


def check_dense(op: str, argument: str, value: object) -> None:
    """Raises TypeError unless ``value`` is a tensor with strides, neither sparse nor nested."""
    check_tensor(op, argument, value)
    assert isinstance(value, Tensor)
    if value.is_nested or value.layout is not torch.strided:
        kind = "a nested one" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{op}: {argument} must be a dense tensor, got {kind}")


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


def check_range(op: str, argument: str, value: Tensor | None, end: int) -> None:
    """Raises RuntimeError unless all are in [-1, end), which it reads: no kernel follows."""
    if value is None or not value.numel():
        return
    if torch.compiler.is_compiling() or detect_fake_mode(value):
        return
    least, most = (int(bound) for bound in value.aminmax())
    if least < -1 or most >= end:
        got = least if least < -1 else most
        raise RuntimeError(f"{op}: {argument} must lie in [-1, {end}), got {got}")


def renamed(error: Exception, op: str, names: dict[str, str]) -> Exception:
    """An operator's error in the words of the function that called it for somebody else."""
    if type(error) not in (TypeError, ValueError, RuntimeError, NotImplementedError):
        return error
    text = re.sub(r"^\w+: ", f"{op}: ", str(error))
    words = re.compile(rf"\b({'|'.join(names)})\b")
    return type(error)(words.sub(lambda word: names[word[1]], text))


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` as ``"float32"``."""
    return str(dtype).removeprefix("torch.")
