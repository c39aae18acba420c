"""LoRA linear: a frozen linear layer plus a trainable low-rank product, in one operator.

The base product runs in the BLAS that torch carries or, where that is slow, in our own tiles with
the adapter's product in the same sum (docs/lora.md); everything else is one C++ pass over the rows
each way. Dropout is a function of a seed: its mask is made again in the backward pass, never
stored.
"""

import math
from typing import Any

import torch
from torch import Tensor

from flashkern._checks import FLOATS, check, check_device, check_dtype, check_tensor
from flashkern._dispatch import register_autograd
from flashkern._ops import ops
from flashkern.random import draw_seed


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    bias: Tensor | None = None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
) -> Tensor:
    """Computes ``x @ W.T + bias + scaling * (dropout(x) @ A.T) @ B.T``.

    Differentiable in ``x``, ``lora_a``, ``lora_b`` and ``bias``. The weight is frozen: it gets no
    gradient. The backward pass keeps ``x`` and ``scaling * dropout(x) @ A.T`` (rows x rank,
    float32), nothing else.

    Under autocast ``x``, ``weight`` and ``bias`` are cast to the autocast dtype; the adapters stay
    as they are, so that float32 ones lose nothing.

    Args:
        x: (..., in), any leading dimensions, any strides.
        weight: (out, in), frozen, of x's dtype.
        lora_a: (rank, in), float32 or x's dtype.
        lora_b: (out, rank), of lora_a's dtype.
        bias: (out,), of x's dtype.
        scaling: a finite number, often ``lora_alpha / rank``.
        dropout_p: probability in [0, 1] that an element of x is left out of the adapter's product;
            those kept are divided by ``1 - dropout_p``. The seed comes from torch's generator
            of the device of ``x``.

    Returns:
        (..., out) in x's dtype, summed in float32.

    Raises:
        ValueError: shapes that don't fit, a probability outside [0, 1], a weight that requires grad
            while grad is enabled.
        TypeError: something other than a tensor, or a dtype that isn't supported.

    Source: Hu et al.: LoRA: Low-Rank Adaptation of Large Language Models (arXiv 2106.09685).

    Example:
        >>> import torch, flashkern as fk
        >>> x, weight = torch.randn(4, 10, 64), torch.randn(32, 64)
        >>> a, b = torch.randn(8, 64), torch.randn(32, 8)
        >>> y = fk.lora_linear(x, weight, a, b, scaling=2.0)
        >>> torch.allclose(y, x @ (weight + 2.0 * b @ a).T, atol=1e-2)
        True
    """
    x, weight, bias = _autocast(x, weight, bias)
    _check("lora_linear", x, weight, lora_a, lora_b, bias, ndim=2)
    if not isinstance(scaling, (int, float)) or not math.isfinite(scaling):
        raise ValueError(f"lora_linear: scaling must be a finite number, got {scaling!r}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"lora_linear: dropout_p must lie in [0, 1], got {dropout_p}")
    seed = draw_seed(x.device) if dropout_p > 0.0 else None
    return _forward(x, weight, lora_a, lora_b, bias, None, None, scaling, dropout_p, seed)[0]


def lora_linear_multi(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    adapter_ids: Tensor,
    *,
    bias: Tensor | None = None,
    scaling: float | Tensor = 1.0,
) -> Tensor:
    """:func:`lora_linear` with an adapter of its own for each row: one call for a mixed batch.

    Row i gets ``scaling[n] * (x[i] @ A[n].T) @ B[n].T`` with ``n = adapter_ids[i]``, or nothing
    on top of the base product where n is -1. It trains too: an adapter's gradient is summed over
    its rows.

    Args:
        x: (..., in).
        weight: (out, in), frozen, of x's dtype.
        lora_a: (n, rank, in), float32 or x's dtype. Adapters of a lower rank: pad with zeros.
        lora_b: (n, out, rank), of lora_a's dtype.
        adapter_ids: integers in [-1, n), one for each row: of the shape of x's leading dimensions,
            or flattened, (rows,).
        bias: (out,), of x's dtype.
        scaling: one number, or one for each adapter, (n,). Gets no gradient.

    Returns:
        (..., out) in x's dtype.

    Raises:
        ValueError, TypeError: as :func:`lora_linear`, and adapter_ids of another shape.
        RuntimeError: an id outside [-1, n), on a CPU. A GPU's ids are not waited for: such a row
            gets no adapter there.

    Source: Chen et al.: Punica: Multi-Tenant LoRA Serving (arXiv 2310.18547).

    Example:
        >>> import torch, flashkern as fk
        >>> x, weight = torch.randn(3, 64), torch.randn(32, 64)
        >>> a, b = torch.randn(2, 8, 64), torch.randn(2, 32, 8)
        >>> y = fk.lora_linear_multi(x, weight, a, b, torch.tensor([1, -1, 0]))
        >>> torch.allclose(y[1], x[1] @ weight.T, atol=1e-4)
        True
    """
    op = "lora_linear_multi"
    x, weight, bias = _autocast(x, weight, bias)
    _check(op, x, weight, lora_a, lora_b, bias, ndim=3)
    check_tensor(op, "adapter_ids", adapter_ids)
    integers = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    check_dtype(op, "adapter_ids", adapter_ids, integers)
    check_device(op, "adapter_ids", adapter_ids, x)
    leading = x.shape[:-1]
    if adapter_ids.shape != leading and adapter_ids.shape != (leading.numel(),):
        flat = "" if len(leading) == 1 else f" or ({leading.numel()},)"
        must = f"have shape {tuple(leading)}{flat}"
        check(False, op, "adapter_ids", must, tuple(adapter_ids.shape))
    adapters = lora_a.shape[0]
    if isinstance(scaling, Tensor):
        check(
            scaling.shape == (adapters,), op, "scaling", f"have shape ({adapters},)", scaling.shape
        )
        check(not scaling.requires_grad, op, "scaling", "not require grad", "requires_grad=True")
        check_device(op, "scaling", scaling, x)
        scalings = scaling.to(torch.float64)
    else:
        check(math.isfinite(scaling), op, "scaling", "be a finite number", repr(scaling))
        scalings = torch.full((adapters,), float(scaling), dtype=torch.float64, device=x.device)
    ids = adapter_ids.to(torch.int64)
    return _forward(x, weight, lora_a, lora_b, bias, ids, scalings, 1.0, 0.0, None)[0]


# ---- arguments ----


def _autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What autocast does to a linear layer's arguments."""
    if not torch._C._is_any_autocast_enabled() or not isinstance(x, Tensor):
        return x, weight, bias
    if not torch.is_autocast_enabled(x.device.type):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    cast: list[Any] = [
        t.to(dtype) if isinstance(t, Tensor) and t.dtype in FLOATS[:3] else t
        for t in (x, weight, bias)
    ]
    return cast[0], cast[1], cast[2]


def _check(
    op: str,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    ndim: int,
) -> None:
    """Raises unless the call is one that the kernels run. The good case costs few steps."""
    for name, value in (("x", x), ("weight", weight), ("lora_a", lora_a), ("lora_b", lora_b)):
        if not isinstance(value, Tensor):
            check_tensor(op, name, value)
    dtype, adapter = x.dtype, lora_a.dtype
    if dtype not in FLOATS:
        check_dtype(op, "x", x, FLOATS)
    if weight.dtype is not dtype:
        check_dtype(op, "weight", weight, (dtype,))
    if adapter is not dtype and (adapter is not torch.float32 or dtype is torch.float64):
        both = (dtype,) if dtype in (torch.float32, torch.float64) else (torch.float32, dtype)
        check_dtype(op, "lora_a", lora_a, both)
    if lora_b.dtype is not adapter:
        check_dtype(op, "lora_b", lora_b, (adapter,))
    _check_shapes(op, x.shape, weight.shape, lora_a.shape, lora_b.shape, ndim)
    if bias is not None:
        check_tensor(op, "bias", bias)
        check_dtype(op, "bias", bias, (dtype,))
        out = weight.shape[0]
        check(bias.shape == (out,), op, "bias", f"have shape ({out},)", tuple(bias.shape))
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: weight must be frozen, as it gets no gradient here (pass weight.detach() or "
            "call weight.requires_grad_(False)), got requires_grad=True"
        )
    others = (weight, lora_a, lora_b) if bias is None else (weight, lora_a, lora_b, bias)
    for name, value in zip(("weight", "lora_a", "lora_b", "bias"), others, strict=False):
        if value.device != x.device:
            check_device(op, name, value, x)


def _check_shapes(
    op: str,
    x: torch.Size,
    weight: torch.Size,
    lora_a: torch.Size,
    lora_b: torch.Size,
    ndim: int,
) -> None:
    many = "(n, rank, in)" if ndim == 3 else "(rank, in)"
    if len(x) < 1:
        raise ValueError(f"{op}: x must have at least one dimension, got a scalar")
    if len(weight) != 2:
        raise ValueError(f"{op}: weight must have shape (out, in), got {tuple(weight)}")
    if x[-1] != weight[1]:
        raise ValueError(
            f"{op}: x must have {weight[1]} columns as weight has, got shape {tuple(x)}"
        )
    if len(lora_a) != ndim or lora_a[-1] != weight[1]:
        raise ValueError(
            f"{op}: lora_a must have shape {many} with in = {weight[1]}, got {tuple(lora_a)}"
        )
    b = (*lora_a[:-2], weight[0], lora_a[-2])
    if tuple(lora_b) != b:
        raise ValueError(f"{op}: lora_b must have shape {b}, got {tuple(lora_b)}")


# ---- autograd ----


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, lora_a, lora_b, _, ids, scalings, scaling, dropout_p, seed = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, lora_a, lora_b, output[1], ids, scalings, seed)
    ctx.scaling, ctx.dropout_p = scaling, dropout_p


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    x, weight, lora_a, lora_b, h, ids, scalings, seed = ctx.saved_tensors
    need_x, _, need_a, need_b, need_bias = ctx.needs_input_grad[:5]
    dx = da = db = None
    if need_x or need_a or need_b:
        dx, da, db = _backward_pass(
            grad,
            x,
            weight,
            lora_a,
            lora_b,
            h,
            ids,
            scalings,
            ctx.scaling,
            ctx.dropout_p,
            seed,
            need_x,
            need_a,
            need_b,
        )
    rows = math.prod(grad.shape[:-1])
    bias = grad.reshape(rows, grad.shape[-1]).sum(0) if need_bias else None
    given = (dx if need_x else None, None, da if need_a else None, db if need_b else None, bias)
    return (*given, None, None, None, None, None)


def _no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "lora_linear: backward must not itself be differentiated, got a gradient of a gradient"
    )


_forward = register_autograd(ops.lora_linear.default, _backward, _setup_context)
_backward_pass = register_autograd(ops.lora_linear_backward.default, _no_double_backward)


# ---- fake kernels: shapes and dtypes alone ----


@torch.library.register_fake("flashkern::lora_linear")
def _fake(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    ids: Tensor | None,
    scalings: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    rows = math.prod(x.shape[:-1])
    sums = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return y, x.new_empty((rows, lora_a.shape[-2]), dtype=sums)


@torch.library.register_fake("flashkern::lora_linear_backward")
def _fake_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    h: Tensor,
    ids: Tensor | None,
    scalings: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_x: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    needs = ((x, need_x), (lora_a, need_a), (lora_b, need_b))
    dx, da, db = (t.new_empty(t.shape if need else (0,)) for t, need in needs)
    return dx, da, db


# ---- vmap ----


def _vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    """A mapped x alone becomes one more leading dimension; anything else runs one by one."""
    if in_dims[0] is not None and all(d is None for d in in_dims[1:]) and args[5] is None:
        y, h = ops.lora_linear(args[0].movedim(in_dims[0], 0), *args[1:])
        return (y, h.view(info.batch_size, -1, h.shape[-1])), (0, 0)
    return _one_by_one(ops.lora_linear, info, in_dims, args)


def _vmap_backward(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    return _one_by_one(ops.lora_linear_backward, info, in_dims, args)


def _one_by_one(op: Any, info: Any, in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> Any:
    calls = [
        op(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    outputs = tuple(torch.stack(parts) for parts in zip(*calls, strict=True))
    return outputs, (0,) * len(outputs)


torch.library.register_vmap("flashkern::lora_linear", _vmap)
torch.library.register_vmap("flashkern::lora_linear_backward", _vmap_backward)
