"""The functions of flash_attn 2.x, argument for argument, by flashkern's kernels.

Replace ``from flash_attn import flash_attn_func`` by ``from flashkern.compat.flash_attn import
flash_attn_func``. Tensors are (batch, sequence, heads, head_dim), or (tokens, heads, head_dim) in
the varlen forms; ``causal`` and ``window_size`` end the diagonal at the last key. What differs:
float32 and float64 run too, so does a CPU; the backward pass is always deterministic; dropout
draws another mask from torch's generator. As there, a head_dim that is no multiple of 8 is padded,
a copy; one of a cache is refused. The third value of ``return_attn_probs`` is None: the
probabilities are never in memory.
"""

from typing import Any

import torch
from torch import Tensor

from flashkern._attention_ops import sums_dtype
from flashkern._checks import check, renamed
from flashkern.attention import attention, attention_kvcache, attention_varlen
from flashkern.compat._flash_calls import (
    NAMES,
    Window,
    call_options,
    check_layout,
    scale_of,
)
from flashkern.compat._flash_kvcache import flash_attn_with_kvcache
from flashkern.sdpa import pad_head

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention over (B, S, H, D) tensors: see :func:`flashkern.attention`.

    Returns:
        The output, (B, Sq, H, Dv); with ``return_attn_probs`` (output, lse (B, H, Sq), None).

    Example:
        >>> import torch
        >>> from flashkern.compat.flash_attn import flash_attn_func
        >>> q, k, v = torch.randn(3, 2, 10, 4, 64).unbind()
        >>> flash_attn_func(q, k, v, causal=True, window_size=(4, 0)).shape
        torch.Size([2, 10, 4, 64])
    """
    op = "flash_attn_func"
    check_layout(op, ("batch", "sequence", "heads", "head_dim"), q, k, v)
    scale = scale_of(q, softmax_scale)
    options = call_options(dropout_p, scale, causal, window_size, softcap, alibi_slopes)
    try:
        output, lse = attention(*(pad_head(t).transpose(1, 2) for t in (q, k, v)), **options)
    except Exception as error:
        raise renamed(error, op, NAMES) from None
    output = output[..., : v.shape[-1]].transpose(1, 2).contiguous()
    return (output, lse, None) if return_attn_probs else output


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_func` with keys and values in one tensor, (B, S, 2, Hkv, D).

    Example:
        >>> import torch
        >>> from flashkern.compat.flash_attn import flash_attn_kvpacked_func
        >>> flash_attn_kvpacked_func(torch.randn(1, 3, 4, 64), torch.randn(1, 5, 2, 4, 64)).shape
        torch.Size([1, 3, 4, 64])
    """
    k, v = kv.unbind(dim=2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_func` with query, key and value in one tensor, (B, S, 3, H, D).

    Example:
        >>> import torch
        >>> from flashkern.compat.flash_attn import flash_attn_qkvpacked_func
        >>> flash_attn_qkvpacked_func(torch.randn(1, 5, 3, 4, 64), causal=True).shape
        torch.Size([1, 5, 4, 64])
    """
    q, k, v = qkv.unbind(dim=2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs,
    )  # fmt: skip


def _attend_pages(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    pages: Tensor,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Packed queries, paged keys: each sequence is a small attention_kvcache, nothing is copied.

    Where the queries start is read on the host: a call waits for the GPU once.
    """
    op = "flash_attn_varlen_func"
    starts, lengths = cu_seqlens_q.tolist(), cu_seqlens_k.diff()
    batch = len(starts) - 1
    good = starts == sorted(starts) and starts[:1] == [0] and starts[-1] <= q.shape[0]
    check(good, op, "cu_seqlens_q", f"rise from 0 to the {q.shape[0]} rows at most", starts)
    for name, have, want in (
        ("cu_seqlens_k", cu_seqlens_k.shape[0], batch + 1),
        ("block_table", pages.shape[0], batch),
    ):
        check(have == want, op, name, f"have {want} rows", have)
    output = q.new_zeros(*q.shape[:2], v.shape[-1])
    lse = torch.full(q.shape[1::-1], -torch.inf, dtype=sums_dtype(q.dtype), device=q.device)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    slopes = options.pop("alibi_slopes")
    per_row = slopes is not None and slopes.dim() == 2
    for b in range(batch):
        rows, one = slice(starts[b], starts[b + 1]), slice(b, b + 1)
        part, part_lse = attention_kvcache(
            q[rows].transpose(0, 1).unsqueeze(0), k, v, cache_lengths=lengths[one],
            page_table=pages[one], alibi_slopes=slopes[one] if per_row else slopes, **options,
        )  # fmt: skip
        output[rows], lse[:, rows] = part[0].transpose(0, 1), part_lse[0]
    return output, lse


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """Attention over packed (tokens, H, D) tensors: see :func:`flashkern.attention_varlen`.

    With ``block_table``, (B, pages of a sequence) int32, ``k`` and ``v`` are caches in pages,
    (pages, page_size, Hkv, D), and ``cu_seqlens_k`` tells the lengths alone.

    Returns:
        The output, (Tq, H, Dv); with ``return_attn_probs`` (output, lse (H, Tq), None).

    Raises:
        NotImplementedError: a tensor that requires a gradient where ``block_table`` is given.
        ValueError: cu_seqlens that do not fit, and what attention_varlen refuses.

    Example:
        >>> import torch
        >>> from flashkern.compat.flash_attn import flash_attn_varlen_func
        >>> q, k, v = torch.randn(3, 12, 4, 64).unbind()
        >>> starts = torch.tensor([0, 5, 12], dtype=torch.int32)
        >>> flash_attn_varlen_func(q, k, v, starts, starts, 7, 7).shape
        torch.Size([12, 4, 64])
    """
    op = "flash_attn_varlen_func"
    scale = scale_of(q, softmax_scale)
    options = call_options(dropout_p, scale, causal, window_size, softcap, alibi_slopes)
    try:
        if block_table is not None:
            output, lse = _attend_pages(q, k, v, cu_seqlens_q, cu_seqlens_k, block_table, options)
        else:
            check_layout(op, ("tokens", "heads", "head_dim"), q, k, v)
            output, lse = attention_varlen(
                pad_head(q), pad_head(k), pad_head(v), cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                max_seqlen_k, **options,
            )  # fmt: skip
            output = output[..., : v.shape[-1]].contiguous()
    except Exception as error:
        raise renamed(error, op, NAMES) from None
    return (output, lse, None) if return_attn_probs else output


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_varlen_func` with keys and values in one tensor, (tokens, 2, Hkv, D).

    Example:
        >>> import torch
        >>> from flashkern.compat.flash_attn import flash_attn_varlen_kvpacked_func
        >>> q, kv = torch.randn(12, 4, 64), torch.randn(12, 2, 4, 64)
        >>> starts = torch.tensor([0, 5, 12], dtype=torch.int32)
        >>> flash_attn_varlen_kvpacked_func(q, kv, starts, starts, 7, 7).shape
        torch.Size([12, 4, 64])
    """
    k, v = kv.unbind(dim=1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_varlen_func` with all three in one tensor, (tokens, 3, H, D).

    Example:
        >>> import torch
        >>> from flashkern.compat.flash_attn import flash_attn_varlen_qkvpacked_func
        >>> starts = torch.tensor([0, 5, 12], dtype=torch.int32)
        >>> flash_attn_varlen_qkvpacked_func(torch.randn(12, 3, 4, 64), starts, 7).shape
        torch.Size([12, 4, 64])
    """
    q, k, v = qkv.unbind(dim=1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip
