"""Argument checks: every message reads ``op: argument must X, got Y``."""

from collections.abc import Sequence

import torch
from torch import Tensor

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


def check_device(op: str, argument: str, value: Tensor, like: Tensor) -> None:
    """Raises ValueError unless the tensor is on the device of ``like``."""
    if value.device != like.device:
        raise ValueError(f"{op}: {argument} must be on device {like.device}, got {value.device}")


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` as ``"float32"``."""
    return str(dtype).removeprefix("torch.")
