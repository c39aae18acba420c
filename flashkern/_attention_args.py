"""Argument checks of the attention operators: from what a caller writes to what a kernel takes.

A decode step calls attention thirty times for a few microseconds of work each, so the checks read
shapes and dtypes, never a tensor's values, and an argument that is not given costs one comparison.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashkern._attention_ops import sums_dtype
from flashkern._checks import FINITE, FLOATS, check, check_dense, check_dtype, check_tensor, number
from flashkern.random import draw_seed

Window = tuple[int | None, int | None] | None

MAX_HEAD_DIM = 256
_TOP_LEFT, _BOTTOM_RIGHT, _OWN_LENGTH = 0, 1, 2
_LOW = (torch.float32, torch.bfloat16, torch.float16)


# Where the diagonal lies and how far to its sides a row sees: (alignment, left, right), -1 for
# unbounded. Plain tuples: a NamedTuple costs as much as all the checks of a decode step.
Band = tuple[int, int, int]

# (batch, heads, rows, columns), what masks are broadcast to.
Shape = tuple[int, int, int, int]


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in autocast's dtype where autocast is on, as for torch's own attention."""
    if not torch._C._is_any_autocast_enabled():
        return tensors
    first = tensors[0]
    if not isinstance(first, Tensor) or not torch.is_autocast_enabled(first.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in _LOW else t for t in tensors)


def contiguous_last(tensor: Tensor) -> Tensor:
    """The tensor itself where its last dimension is contiguous, else a copy."""
    if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1:
        return tensor
    check_dense("attention", "query, key or value", tensor)
    return tensor.contiguous()


def contiguous_rows(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three tensors, copied where their last dimension is not contiguous."""
    if query.stride()[-1] == key.stride()[-1] == value.stride()[-1] == 1:
        return query, key, value
    return contiguous_last(query), contiguous_last(key), contiguous_last(value)


def _fit(query: Tensor, key: Tensor, value: Tensor, dims: int) -> bool:
    """Whether a kernel takes the three: `check_matrices` in one pass, without a message."""
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        return False
    q, k, v = query.shape, key.shape, value.shape
    if not len(q) == len(k) == len(v) == dims:
        return False
    if k != v and (k[:-1] != v[:-1] or v[-1] % 8 or not 0 < v[-1] <= MAX_HEAD_DIM):
        return False
    head_dim, kv_heads, dtype, device = q[-1], k[1], query.dtype, query.device
    return (
        k[-1] == head_dim
        and head_dim % 8 == 0
        and 0 < head_dim <= MAX_HEAD_DIM
        and kv_heads != 0
        and q[1] % kv_heads == 0
        and dtype in FLOATS
        and key.dtype is dtype
        and value.dtype is dtype
        and key.device == device
        and value.device == device
    )


def check_matrices(
    op: str, names: str, query: Tensor, key: Tensor, value: Tensor, dims: int, layout: str
) -> None:
    """Checks query, key and value, whose `names` the caller knows, against one another."""
    try:
        if _fit(query, key, value, dims):
            return
    except (RuntimeError, AttributeError):  # of a nested tensor, which has no shape
        pass
    q_name, k_name, v_name = names.split()
    for name, tensor in ((q_name, query), (k_name, key), (v_name, value)):
        check_dense(op, name, tensor)
        if tensor.dim() != dims:
            check(False, op, name, f"have {dims} dimensions, {layout}", tuple(tensor.shape))
    check_dtype(op, q_name, query, FLOATS)
    for name, tensor in ((k_name, key), (v_name, value)):
        if tensor.dtype != query.dtype:
            cast = " (autocast's)" if torch.is_autocast_enabled(query.device.type) else ""
            raise TypeError(
                f"{op}: {name} must have the dtype of {q_name}, {query.dtype}{cast}, "
                f"got {tensor.dtype}"
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
    must = f"have a number of heads that divides {q_name}'s {query.shape[1]}"
    check(False, op, k_name, must, key.shape[1])


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
            if side is not None and not (isinstance(side, int) and 0 <= side < 2**63):
                must = "hold None or integers from 0, below 2**63"
                check(False, op, "window", must, repr(window))
        left = -1 if window[0] is None else window[0]
        right = -1 if window[1] is None else window[1]
    return alignment, left, 0 if causal else right


def numbers(
    op: str, query: Tensor, scale: float | None, softcap: float, dropout_p: float
) -> tuple[float, float, float]:
    """scale, softcap and dropout_p, checked."""
    if scale is None:
        scale = float(query.shape[-1] ** -0.5)
    else:
        scale = number(op, "scale", scale, "be finite", *FINITE)
    if type(softcap) is not float or softcap:
        softcap = number(op, "softcap", softcap, "be finite and not negative", 0, math.inf)
    if type(dropout_p) is not float or dropout_p:
        dropout_p = number(op, "dropout_p", dropout_p, "be in [0, 1)", 0, 1)
    return scale, softcap, dropout_p


def seed_for(query: Tensor, dropout_p: float) -> Tensor | None:
    """A seed where dropout is on, on the device of ``query``."""
    return draw_seed(query.device) if dropout_p else None


def optional(
    op: str,
    query: Tensor,
    shape: Shape,
    bias: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """bias, alibi_slopes, sinks and kv_lengths as a kernel takes them; None where not given."""
    if bias is None and slopes is None and sinks is None and lengths is None:
        return None, None, None, None
    return (
        bias_argument(op, bias, query, shape),
        slopes_argument(op, slopes, query, shape),
        sinks_argument(op, sinks, query, shape),
        int_argument(op, "kv_lengths", lengths, query, shape[:1]),
    )


def beam_arguments(
    op: str,
    query: Tensor,
    v_cache: Tensor,
    columns: int,
    table: Tensor | None,
    shared_k: Tensor | None,
    shared_v: Tensor | None,
    lengths: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """beam_table, shared_k, shared_v and shared_lengths as a kernel takes them."""
    batch = query.shape[0]
    table = int_argument(op, "beam_table", table, query, (None, None, columns))
    if table is not None and table.shape[0] * table.shape[1] != batch:
        must = f"have shape (prompts, beams, {columns}) with query's batch of {batch} in all"
        check(False, op, "beam_table", must, tuple(table.shape))
    if shared_k is None or shared_v is None:
        for name, value in (("shared_k", shared_k), ("shared_v", shared_v)):
            if value is not None:
                check(False, op, name, "come with the other of shared_k and shared_v", "it alone")
        if lengths is not None:
            check(False, op, "shared_lengths", "come with shared_k", "shared_lengths alone")
        return table, None, None, None
    check_matrices(op, "query shared_k shared_v", query, shared_k, shared_v, 4, "(prompts, ...)")
    prompts = shared_k.shape[0]
    if prompts == 0 or batch % prompts or (table is not None and prompts != table.shape[0]):
        must = f"have a row for each prompt, of which query's batch of {batch} has the beams"
        check(False, op, "shared_k", must, tuple(shared_k.shape))
    kv_heads, value_dim = v_cache.shape[1], v_cache.shape[3]
    if shared_v.shape[1] != kv_heads or shared_v.shape[3] != value_dim:
        must = f"have v_cache's {kv_heads} heads and head_dim of {value_dim}"
        check(False, op, "shared_v", must, tuple(shared_v.shape))
    if dropout_p:
        raise NotImplementedError(f"{op}: dropout_p must be 0 with shared_k, got {dropout_p}")
    lengths = int_argument(op, "shared_lengths", lengths, query, (prompts,))
    return table, contiguous_last(shared_k), contiguous_last(shared_v), lengths


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
    if tuple(sinks.shape) != (shape[1],):
        check(False, op, "sinks", f"have shape ({shape[1]},)", tuple(sinks.shape))
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
    if value.dtype == torch.int64:  # what int32 cannot hold stays out of range
        value = value.clamp(-(2**31), 2**31 - 1).to(torch.int32)
    return value.contiguous()
