"""Argument checks of the attention operators: from what a caller writes to what a kernel takes.

A decode step calls attention thirty times for a few microseconds of work each, so the checks read
shapes and dtypes, never a tensor's values, and an argument that is not given costs one comparison.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashkern._attention_ops import sums_dtype
from flashkern._checks import FLOATS, check, check_dtype, check_tensor
from flashkern.random import draw_seed

Window = tuple[int | None, int | None] | None

MAX_HEAD_DIM = 256
_TOP_LEFT, _BOTTOM_RIGHT, _OWN_LENGTH = 0, 1, 2
_LOW = (torch.float32, torch.bfloat16, torch.float16)


class Band(NamedTuple):
    """Where the diagonal lies and how far to its sides a row sees; -1 for unbounded."""

    alignment: int
    left: int
    right: int


class Shape(NamedTuple):
    """The (batch, heads, rows, columns) that masks are broadcast to."""

    batch: int
    heads: int
    rows: int
    columns: int


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in autocast's dtype where autocast is on, as for torch's own attention."""
    first = tensors[0]
    if not isinstance(first, Tensor) or not torch.is_autocast_enabled(first.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in _LOW else t for t in tensors)


def contiguous_last(tensor: Tensor) -> Tensor:
    """The tensor itself where its last dimension is contiguous, else a copy."""
    if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1:
        return tensor
    return tensor.contiguous()


def check_matrices(
    op: str, named: dict[str, Tensor], dims: int, layout: str, head_axis: int = 1
) -> None:
    """Checks query, key and value (by these or other names, in this order) against one another."""
    for name, tensor in named.items():
        check_tensor(op, name, tensor)
        if tensor.dim() != dims:
            check(False, op, name, f"have {dims} dimensions, {layout}", tuple(tensor.shape))
    (q_name, query), (k_name, key), (v_name, value) = named.items()
    check_dtype(op, q_name, query, FLOATS)
    for name, tensor in ((k_name, key), (v_name, value)):
        if tensor.dtype != query.dtype:
            raise TypeError(
                f"{op}: {name} must have the dtype of {q_name}, {query.dtype}, got {tensor.dtype}"
            )
        if tensor.device != query.device:
            check(False, op, name, f"be on {q_name}'s device, {query.device}", tensor.device)
    if key.shape[:-1] != value.shape[:-1]:
        must = f"have the shape of {k_name} but for the last dimension, {tuple(key.shape)}"
        check(False, op, v_name, must, tuple(value.shape))
    if key.shape[-1] != query.shape[-1]:
        check(False, op, k_name, f"have {q_name}'s head_dim, {query.shape[-1]}", key.shape[-1])
    for name, tensor in ((q_name, query), (v_name, value)):
        dim = tensor.shape[-1]
        if dim % 8 or not 0 < dim <= MAX_HEAD_DIM:
            must = f"have a head_dim that is a multiple of 8 from 8 to {MAX_HEAD_DIM}"
            check(False, op, name, must, dim)
    heads, kv_heads = query.shape[head_axis], key.shape[head_axis]
    if kv_heads == 0 or heads % kv_heads:
        must = f"have a number of heads that divides {q_name}'s {heads}"
        check(False, op, k_name, must, kv_heads)


def band(op: str, causal: bool | str, window: Window, own_length: bool) -> Band:
    """The mask that causal and window describe."""
    alignment = _OWN_LENGTH if own_length else _BOTTOM_RIGHT
    if causal == "top_left":
        alignment = _TOP_LEFT
    elif causal not in (False, True, "bottom_right"):
        check(False, op, "causal", 'be False, True, "top_left" or "bottom_right"', repr(causal))
    left = right = -1
    if window is not None:
        if not isinstance(window, Sequence) or len(window) != 2:
            check(False, op, "window", "be a pair (left, right)", repr(window))
        for side in window:
            if side is not None and (not isinstance(side, int) or side < 0):
                check(False, op, "window", "hold None or integers from 0", repr(window))
        left = -1 if window[0] is None else window[0]
        right = -1 if window[1] is None else window[1]
    return Band(alignment, left, 0 if causal else right)


def numbers(
    op: str, query: Tensor, scale: float | None, softcap: float, dropout_p: float
) -> tuple[float, float, float]:
    """scale, softcap and dropout_p, checked."""
    if scale is None:
        scale = query.shape[-1] ** -0.5
    elif not math.isfinite(scale):
        check(False, op, "scale", "be finite", scale)
    if softcap and not 0 <= softcap < math.inf:
        check(False, op, "softcap", "be finite and not negative", softcap)
    if dropout_p and not 0 <= dropout_p < 1:
        check(False, op, "dropout_p", "be in [0, 1)", dropout_p)
    return float(scale), float(softcap), float(dropout_p)


def seed_for(query: Tensor, dropout_p: float) -> Tensor | None:
    """A seed where dropout is on."""
    return draw_seed() if dropout_p else None


def _on_device(op: str, name: str, value: Any, query: Tensor) -> None:
    check_tensor(op, name, value)
    if value.device != query.device:
        check(False, op, name, f"be on query's device, {query.device}", value.device)


def bias_argument(op: str, bias: Tensor | None, query: Tensor, shape: Shape) -> Tensor | None:
    """The bias with four dimensions, bool, of query's dtype or float32."""
    if bias is None:
        return None
    _on_device(op, "bias", bias, query)
    if bias.dtype != torch.bool:
        check_dtype(op, "bias", bias, (torch.bool, *FLOATS))
        if bias.dtype != query.dtype and bias.dtype != torch.float32:
            bias = bias.to(sums_dtype(query.dtype))
    if bias.dim() > 4 or any(
        have not in (1, want)
        for have, want in zip(reversed(bias.shape), reversed(shape), strict=False)
    ):
        check(False, op, "bias", f"be broadcastable to {tuple(shape)}", tuple(bias.shape))
    return bias if bias.dim() == 4 else bias[(None,) * (4 - bias.dim())]


def slopes_argument(op: str, slopes: Tensor | None, query: Tensor, shape: Shape) -> Tensor | None:
    """ALiBi slopes in float32, (heads,) or (batch, heads)."""
    if slopes is None:
        return None
    _on_device(op, "alibi_slopes", slopes, query)
    batch, heads, *_ = shape
    if tuple(slopes.shape) not in ((heads,), (batch, heads)):
        must = f"have shape ({heads},) or ({batch}, {heads})"
        check(False, op, "alibi_slopes", must, tuple(slopes.shape))
    if torch.is_grad_enabled() and slopes.requires_grad:
        check(False, op, "alibi_slopes", "not require a gradient", "requires_grad=True")
    check_dtype(op, "alibi_slopes", slopes, FLOATS)
    return slopes.float()


def sinks_argument(op: str, sinks: Tensor | None, query: Tensor, shape: Shape) -> Tensor | None:
    """Sinks in the dtype of lse, (heads,)."""
    if sinks is None:
        return None
    _on_device(op, "sinks", sinks, query)
    if tuple(sinks.shape) != (shape.heads,):
        check(False, op, "sinks", f"have shape ({shape.heads},)", tuple(sinks.shape))
    check_dtype(op, "sinks", sinks, FLOATS)
    return sinks.to(sums_dtype(query.dtype)).contiguous()


def int_argument(
    op: str, name: str, value: Tensor | None, query: Tensor, shape: tuple[int | None, ...]
) -> Tensor | None:
    """An int32 tensor of this shape (None: any size), contiguous."""
    if value is None:
        return None
    _on_device(op, name, value, query)
    check_dtype(op, name, value, (torch.int32, torch.int64))
    if value.dim() != len(shape) or any(
        want is not None and have != want for have, want in zip(value.shape, shape, strict=True)
    ):
        want = str(shape).replace("None", "any")
        check(False, op, name, f"have shape {want}", tuple(value.shape))
    return value.to(torch.int32).contiguous()
