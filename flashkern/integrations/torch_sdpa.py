"""flashkern behind ``torch.nn.functional.scaled_dot_product_attention`` on the CPU.

    >>> import flashkern.integrations.torch_sdpa as fks
    >>> fks.enable()
    >>> torch.nn.attention.current_flash_attention_impl()
    'flashkern'
    >>> x = torch.randn(1, 2, 5, 16)
    >>> torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True).shape
    torch.Size([1, 2, 5, 16])
    >>> fks.disable()

`enable` makes flashkern the active implementation in torch.nn.attention's registry. Two levels of
the dispatcher change, for CPU tensors only:

- ``aten::scaled_dot_product_attention``: a call goes straight to flashkern, bool masks, dropout and
  a value head_dim of its own included, for which torch would run its unfused math.
- ``aten::_scaled_dot_product_flash_attention_for_cpu`` and its backward: what torch.compile and
  torch.export leave of a call. Compiled code follows `enable` and `disable` without being
  compiled again.

What flashkern does not compute still runs on torch's own kernels; a warning says why, once for each
reason, and the debug log says it at each call: see `reason_for_torch`. A
``torch.nn.attention.sdpa_kernel`` context that leaves out FLASH_ATTENTION is obeyed.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import attention as torch_attention

import flashkern
from flashkern import _attention_args as args
from flashkern._attention_ops import BACKWARD
from flashkern._ops import has_kernel
from flashkern.integrations._padding import LARGEST, cut_head_dim, pad_head_dim
from flashkern.sdpa import cut_head

__all__ = ["NAME", "disable", "enable", "reason_for_torch"]

NAME = "flashkern"
_log = logging.getLogger("flashkern")

_SDPA = torch.ops.aten.scaled_dot_product_attention.default
_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DEVICES = [d for d in ("cpu", "cuda") if has_kernel("attention_forward", d)]


def reason_for_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    enable_gqa: bool = True,
) -> str | None:
    """Why a call of scaled_dot_product_attention stays on torch's own kernels; None if it does not.

    Example:
        >>> x = torch.randn(1, 2, 5, 512)
        >>> reason_for_torch(x, x, x)
        'head_dim is 512, above 256'
    """
    if query.dim() == key.dim() == value.dim() == 3:
        return reason_for_torch(query[None], key[None], value[None], attn_mask, enable_gqa)
    if not (query.dim() == key.dim() == value.dim() == 4):
        return "query, key and value do not have 4 (or 3) dimensions"
    if query.device.type not in _DEVICES:
        return f"this build has no kernel for {query.device.type} tensors"
    if query.is_cuda and query.dtype == torch.float64:
        return "float64 has no kernel on a GPU"
    if not query.dtype == key.dtype == value.dtype or query.dtype not in _DTYPES:
        return f"dtypes are {query.dtype}, {key.dtype}, {value.dtype}"
    if max(query.shape[-1], value.shape[-1]) > LARGEST:
        return f"head_dim is {max(query.shape[-1], value.shape[-1])}, above {LARGEST}"
    if any(x.numel() == 0 for x in (query, key, value)):
        return "a tensor is empty"
    heads, kv_heads = query.shape[1], key.shape[1]
    if key.shape[:3] != value.shape[:3] or query.shape[0] != key.shape[0]:
        return "batch or sequence sizes need broadcasting"
    if heads != kv_heads and (not enable_gqa or heads % kv_heads):
        return f"{heads} query heads on {kv_heads} key heads"
    if attn_mask is not None and not (
        attn_mask.dtype == torch.bool or attn_mask.is_floating_point()
    ):
        return f"the mask's dtype is {attn_mask.dtype}"
    return None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    return_lse: bool = False,
) -> Any:
    value_dim = value.shape[-1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    result = flashkern.attention(
        *pad_head_dim(query, key, value),
        causal="top_left" if is_causal else False,
        scale=scale,
        bias=attn_mask,
        dropout_p=dropout_p,
        return_lse=return_lse,
    )
    if return_lse:
        return cut_head(result[0], value_dim, query), result[1]
    return cut_head(result, value_dim, query)


def _gradients(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What aten's backward operator returns, from what its forward operator kept."""
    rows, columns = query.shape[2], key.shape[2]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    shape = (query.shape[0], query.shape[1], rows, columns)
    bias = args.bias_argument("attention", attn_mask, query, shape)
    band = args.band("attention", "top_left" if is_causal else False, None, own_length=False)
    grad_out, query, key, value, out = map(
        args.contiguous_last, pad_head_dim(grad_out, query, key, value, out)
    )
    grads = BACKWARD(
        grad_out, None, query, key, value, out, lse.contiguous(), bias, *[None] * 6,
        rows, columns, *band, scale, 0.0, 0.0, False,
    )  # fmt: skip
    return grads[:3]


def _left_to_torch(*tensors: Tensor) -> bool:
    """True for calls that torch decomposes itself, as a rule into the fused operators below.

    These are calls inside an sdpa_kernel context without flash attention, under torch.func, whose
    transforms know torch's operators alone, and on the tensors of a tracer or a DTensor.
    """
    return (
        not torch.backends.cuda.flash_sdp_enabled()
        or torch._C._are_functorch_transforms_active()
        or any(type(x) not in (Tensor, torch.nn.Parameter) for x in tensors)
    )


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """aten::scaled_dot_product_attention for CPU tensors, and a GPU's where there are kernels."""
    if not _left_to_torch(query, key, value):
        if query.dim() == key.dim() == value.dim() == 3:  # (heads, sequence, head_dim)
            batch = (query[None], key[None], value[None])
            return _sdpa(*batch, attn_mask, dropout_p, is_causal, **options)[0]
        reason = reason_for_torch(query, key, value, attn_mask, options.get("enable_gqa", False))
        if reason is None and attn_mask is not None and is_causal:
            reason = "a mask and is_causal are both given"
        if reason is None and dropout_p >= 1:
            reason = f"dropout_p is {dropout_p}"
        if reason is None:
            return _attend(query, key, value, attn_mask, dropout_p, is_causal, options.get("scale"))
        _say("scaled_dot_product_attention", reason)
    return _SDPA.decompose(query, key, value, attn_mask, dropout_p, is_causal, **options)


_said: set[str] = set()


def _say(name: str, reason: str) -> None:
    """A warning at a reason's first call, which the user may not have expected; then debugging."""
    level = logging.DEBUG if reason in _said else logging.WARNING
    _said.add(reason)
    _log.log(level, "%s: torch's own kernel runs: %s", name, reason)


def _like(values: Tensor, size: torch.Size, order: tuple[int, ...]) -> Tensor:
    """`values` in the memory layout that torch's kernel has, which compiled code relies on."""
    out = torch.empty_permuted(size, order, dtype=values.dtype, device=values.device)
    return values if out.stride() == values.stride() else out.copy_(values)


class _Handle:
    """The registrations, which last as long as the library object; the registry calls `remove`."""

    def __init__(self) -> None:
        self._forward = torch.library.get_kernel(_FUSED, "CPU")
        self._backward = torch.library.get_kernel(_FUSED_BACKWARD, "CPU")
        library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            for device in map(str.upper, _DEVICES):
                library.impl(_SDPA, _sdpa, device)
                library.impl(_SDPA, _sdpa, f"Autograd{device}")
            library.impl(_FUSED, self.fused, "CPU", with_keyset=True)
            library.impl(_FUSED_BACKWARD, self.fused_backward, "CPU", with_keyset=True)
        self._library: torch.library.Library | None = library

    def remove(self) -> None:
        self._library = None
        _log.info("torch %s: scaled_dot_product_attention is torch's own again", torch.__version__)

    def fused(
        self,
        keys: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
        **newer: Any,
    ) -> Any:
        """aten::_scaled_dot_product_flash_attention_for_cpu: (output, logsumexp)."""
        reason = self._reason(query, key, value, attn_mask, dropout_p, newer)
        if reason is not None:
            _say(_FUSED.name(), reason)
            call = (query, key, value, dropout_p, is_causal)
            return self._forward.call_boxed(keys, *call, attn_mask=attn_mask, scale=scale, **newer)
        with torch.no_grad():
            out, lse = _attend(query, key, value, attn_mask, 0.0, is_causal, scale, True)
            expected = torch.empty_like(query)
            if out.stride() != expected.stride():
                out = expected.copy_(out)
            return out, _like(lse, lse.shape, (0, 2, 1))

    def fused_backward(
        self,
        keys: Any,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        dropout_p: float,
        is_causal: bool,
        *,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
        **newer: Any,
    ) -> Any:
        """aten::_scaled_dot_product_flash_attention_for_cpu_backward: three gradients."""
        reason = self._reason(query, key, value, attn_mask, dropout_p, newer)
        if reason is not None:
            call = (grad_out, query, key, value, out, logsumexp, dropout_p, is_causal)
            return self._backward.call_boxed(keys, *call, attn_mask=attn_mask, scale=scale, **newer)
        with torch.no_grad():
            grads = _gradients(
                grad_out, query, key, value, out, logsumexp, attn_mask, is_causal, scale
            )
            sizes = (query.shape, key.shape, value.shape)
            return tuple(
                _like(cut_head_dim(grad, size[-1]), size, (0, 2, 1, 3))
                for grad, size in zip(grads, sizes, strict=True)
            )

    @staticmethod
    def _reason(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        dropout_p: float,
        newer: dict[str, Any],
    ) -> str | None:
        unknown = sorted(name for name, given in newer.items() if given)
        if unknown:
            return f"arguments {', '.join(unknown)} are new"
        if dropout_p:
            return "the operator returns no random state for its backward pass"
        return reason_for_torch(query, key, value, attn_mask)


def enable() -> None:
    """Runs flashkern behind scaled_dot_product_attention in this process.

    For CPU tensors and, where the build has CUDA kernels, for CUDA tensors.

    Raises:
        ImportError: this torch has no registry of flash attention implementations.
    """
    needs = {
        "torch.nn.attention.activate_flash_attention_impl": hasattr(
            torch_attention, "activate_flash_attention_impl"
        ),
        "torch.library.get_kernel": hasattr(torch.library, "get_kernel"),
    }
    missing = [name for name, found in needs.items() if not found]
    if missing:
        raise ImportError(
            f"torch_sdpa: torch must have {missing[0]}, got torch {torch.__version__}"
        )
    torch_attention.register_flash_attention_impl(NAME, register_fn=_Handle)
    torch_attention.activate_flash_attention_impl(NAME)
    _log.info("torch %s: scaled_dot_product_attention runs flashkern", torch.__version__)


def disable() -> None:
    """Gives scaled_dot_product_attention back to torch; does nothing when not enabled."""
    if torch_attention.current_flash_attention_impl() == NAME:
        torch_attention.restore_flash_attention_impl()
