"""What torch must know of the attention operators beside their kernels.

Shapes for tracing, gradients, vmap rules, FLOP formulas. The operators take every argument by
place; :mod:`flashkern.attention` is the face that checks them.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flashkern._dispatch import register_autograd
from flashkern._ops import ops

FORWARD = ops.attention_forward.default
BACKWARD = ops.attention_backward.default
APPEND = ops.attention_append_kv.default
BEAMS = ops.attention_beams.default

# Where each tensor of attention_forward stands among its arguments.
_QUERY, _KEY, _VALUE, _BIAS, _SLOPES, _SINKS, _LENGTHS, _CU_Q, _CU_K, _PAGES, _SEED = range(11)
_TENSORS = 11


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a call on these tensors records a gradient."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a kernel sums in, and that lse has."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.register_fake("flashkern::attention_forward")
def _forward_fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *rows, _ = query.shape
    lse_shape = rows[::-1] if len(rows) == 2 else rows
    lse = query.new_empty(lse_shape, dtype=sums_dtype(query.dtype))
    if len(rows) == 3 and query.stride(1) < query.stride(2):
        batch, heads, length = rows
        packed = query.new_empty((batch, length, heads, value.shape[-1]))
        return packed.transpose(1, 2), lse
    return query.new_empty((*rows, value.shape[-1])), lse


torch.library.register_fake("flashkern::attention_beams", _forward_fake)


@torch.library.register_fake("flashkern::attention_backward")
def _backward_fake(
    grad_output: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
    output: Tensor, lse: Tensor, bias: Tensor | None, alibi_slopes: Tensor | None,
    sinks: Tensor | None, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grad_bias = query.new_empty((0,))
    if bias is not None and rest[-1]:
        grad_bias = bias.new_empty(bias.shape)
    heads = query.shape[1] if sinks is not None else 0
    return (
        query.new_empty(query.shape),
        key.new_empty(key.shape),
        value.new_empty(value.shape),
        grad_bias,
        query.new_empty((heads,), dtype=sums_dtype(query.dtype)),
    )


@torch.library.register_fake("flashkern::attention_append_kv")
def _append_fake(*arguments: Any) -> None:
    return None


# ---- gradients ----


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:_PAGES], inputs[_SEED], *output)
    ctx.paged = inputs[_PAGES] is not None
    ctx.numbers = inputs[_TENSORS:]
    ctx.set_materialize_grads(False)


def _forward_backward(
    ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    if ctx.paged:
        raise NotImplementedError(
            "attention_kvcache: a paged cache has no backward pass; "
            "detach the query, or gather the pages and call attention"
        )
    *tensors, output, lse = ctx.saved_tensors
    query, key, value, bias, *others = tensors
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    grads = backward(
        grad_output, grad_lse, query, key, value, output, lse, bias, *others, *ctx.numbers,
        ctx.needs_input_grad[_BIAS],
    )  # fmt: skip
    needed = (*range(_BIAS + 1), _SINKS)
    result: list[Tensor | None] = [None] * (_TENSORS + len(ctx.numbers))
    for place, grad in zip(needed, grads, strict=True):
        if ctx.needs_input_grad[place]:
            result[place] = grad
    return tuple(result)


forward = register_autograd(FORWARD, _forward_backward, _save_forward)


def _double_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "attention: the backward pass has no derivative of its own; for second derivatives use "
        "flashkern.reference.attention"
    )


backward = register_autograd(BACKWARD, _double_backward)


# ---- vmap ----


def _sample(arguments: tuple[Any, ...], in_dims: tuple[Any, ...], i: int) -> list[Any]:
    return [a if d is None else a.select(d, i) for a, d in zip(arguments, in_dims, strict=True)]


def _foldable(arguments: tuple[Any, ...], in_dims: tuple[Any, ...]) -> bool:
    """Whether the mapped dimension can become part of the batch of a dense forward call."""
    dense = arguments[_CU_Q] is None and arguments[_PAGES] is None and arguments[_SEED] is None
    return dense and in_dims[_SINKS] is None and in_dims[_QUERY] is not None


def _fold(tensor: Tensor | None, dim: int | None, size: int, batch: int, rank: int) -> Any:
    """(batch, ...) mapped along ``dim`` as (size * batch, ...); broadcast tensors stay small."""
    if tensor is None:
        return None
    if dim is None:
        if tensor.dim() < rank or tensor.shape[0] == 1:
            return tensor
        return tensor.expand(size, *tensor.shape).flatten(0, 1)
    tensor = tensor.movedim(dim, 0)
    if tensor.dim() == rank:  # ALiBi slopes (heads,), one set for each sample
        tensor = tensor.unsqueeze(1)
    return tensor.expand(size, batch, *tensor.shape[2:]).flatten(0, 1)


def _forward_vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    size = info.batch_size
    if not _foldable(arguments, in_dims):
        parts = [FORWARD(*_sample(arguments, in_dims, i)) for i in range(size)]
        return tuple(torch.stack(p) for p in zip(*parts, strict=True)), (0, 0)
    query = arguments[_QUERY]
    batch = query.movedim(in_dims[_QUERY], 0).shape[1]
    ranks = {_QUERY: 4, _KEY: 4, _VALUE: 4, _BIAS: 4, _SLOPES: 2, _LENGTHS: 1}
    folded = list(arguments)
    for place, rank in ranks.items():
        folded[place] = _fold(arguments[place], in_dims[place], size, batch, rank)
    result = FORWARD(*folded)
    return tuple(t.unflatten(0, (size, batch)) for t in result), (0, 0)


def _backward_vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    parts = [BACKWARD(*_sample(arguments, in_dims, i)) for i in range(info.batch_size)]
    return tuple(torch.stack(p) for p in zip(*parts, strict=True)), (0,) * 5


torch.library.register_vmap("flashkern::attention_forward", _forward_vmap)
torch.library.register_vmap("flashkern::attention_backward", _backward_vmap)


# ---- FLOPs, as torch counts its own attention: masks do not reduce them ----


def _pairs(query: Tensor, key: Tensor, cu_q: Tensor | None, cu_k: Tensor | None) -> int:
    """Query-key pairs of all heads."""
    if cu_q is None or cu_k is None:
        return math.prod(query.shape[:3]) * key.shape[2]
    if cu_q.device.type == "meta" or isinstance(cu_q, torch._subclasses.FakeTensor):
        sequences = cu_q.shape[0] - 1
        return query.shape[1] * query.shape[0] * key.shape[0] // max(sequences, 1)
    return query.shape[1] * int((cu_q.diff().long() * cu_k.diff().long()).sum())


@register_flop_formula(ops.attention_forward, get_raw=True)
def _forward_flops(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **_: Any) -> int:
    pairs = _pairs(query, key, rest[_CU_Q - 3], rest[_CU_K - 3])
    return 2 * pairs * (query.shape[-1] + value.shape[-1])


@register_flop_formula(ops.attention_backward, get_raw=True)
def _backward_flops(
    grad_output: Tensor, grad_lse: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any,
    **_: Any,
) -> int:  # fmt: skip
    pairs = _pairs(query, key, rest[6], rest[7])
    return 2 * pairs * (3 * query.shape[-1] + 2 * value.shape[-1])
