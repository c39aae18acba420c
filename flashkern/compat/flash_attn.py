"""The functions of flash_attn 2.x, argument for argument, by flashkern's kernels.

Replace ``from flash_attn import flash_attn_func`` by ``from flashkern.compat.flash_attn import
flash_attn_func``. Tensors are (batch, sequence, heads, head_dim), or (tokens, heads, head_dim) in
the varlen forms; ``causal`` and ``window_size`` end the diagonal at the last key. What differs:
float32 and float64 run too, so does a CPU; the backward pass is always deterministic; dropout
draws another mask from torch's generator. The third value of ``return_attn_probs`` is None: the
probabilities are never in memory.
"""

from typing import Any

import torch
from torch import Tensor

from flashkern._attention_args import int_argument
from flashkern._attention_ops import sums_dtype
from flashkern._checks import check
from flashkern.attention import attention, attention_kvcache, attention_varlen

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

Window = tuple[int, int]


def _window(window_size: Window) -> tuple[int | None, int | None] | None:
    """flash_attn writes -1 where flashkern writes None."""
    left, right = window_size
    return (None if left < 0 else left, None if right < 0 else right)


def _options(
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Window,
    softcap: float,
    alibi_slopes: Tensor | None,
) -> dict[str, Any]:
    return {
        "dropout_p": dropout_p,
        "scale": softmax_scale,
        "causal": bool(causal),
        "window": _window(window_size),
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "return_lse": True,
    }


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
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    output, lse = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **options)
    output = output.transpose(1, 2).contiguous()
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
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    if block_table is not None:
        output, lse = _attend_pages(q, k, v, cu_seqlens_q, cu_seqlens_k, block_table, options)
    else:
        output, lse = attention_varlen(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options
        )
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


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding of the first 2 * cos.shape[1] channels of (B, S, H, D), at (B, S)."""
    half = cos.shape[1]
    cos, sin = (t[positions].unsqueeze(2).to(x.dtype) for t in (cos, sin))
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    pairs = turned.unflatten(-1, (half, 2) if interleaved else (2, half))
    axis = -1 if interleaved else -2
    a, b = pairs.unbind(axis)
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), axis).flatten(-2)
    return torch.cat((turned, rest), dim=-1)


def _lengths(cache_seqlens: int | Tensor | None, batch: int, capacity: int, q: Tensor) -> Tensor:
    """cache_seqlens as an int32 tensor (B,); None: the cache is full."""
    if isinstance(cache_seqlens, Tensor):
        return cache_seqlens
    length = capacity if cache_seqlens is None else cache_seqlens
    return torch.full((batch,), length, dtype=torch.int32, device=q.device)


def _behind_padding(op: str, leftpad: Tensor | None, q: Tensor, capacity: int) -> Tensor | None:
    """True for the tokens of (B, 1, 1, T) that lie behind each sequence's padding."""
    first = int_argument(op, "cache_leftpad", leftpad, q, (q.shape[0],))
    if first is None:
        return None
    return torch.arange(capacity, device=q.device) >= first.view(-1, 1, 1, 1)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Appends to a cache in place, then attends to it: see :func:`flashkern.attention_kvcache`.

    The caches are (B, T, Hkv, D), or with ``block_table`` (pages, page_size, Hkv, D);
    ``cache_batch_idx``, (B,), names the cache row of each sequence. Rotary embeddings turn the
    appended keys at their positions, and the queries at theirs (all at the cache's end when
    neither ``causal`` nor a window is set), as flash_attn does. The first ``cache_leftpad[b]``
    tokens, padding, count as positions and are not seen. ``num_splits`` is the kernel's own
    choice here.

    Returns:
        The output, (B, Sq, H, Dv); with ``return_softmax_lse`` (output, lse (B, H, Sq)).

    Raises:
        ValueError: arguments that exclude one another, and those of attention_kvcache.

    Example:
        >>> import torch
        >>> from flashkern.compat.flash_attn import flash_attn_with_kvcache
        >>> k_cache, v_cache = torch.zeros(2, 1, 16, 4, 64).unbind()
        >>> q, k, v = torch.randn(3, 1, 2, 4, 64).unbind()
        >>> flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=0, causal=True).shape
        torch.Size([1, 2, 4, 64])
    """
    op = "flash_attn_with_kvcache"
    check((k is None) == (v is None), op, "k and v", "come together", "one of them")
    check(k is None or cache_seqlens is not None, op, "cache_seqlens", "come with k", "None")
    if block_table is not None and cache_batch_idx is not None:
        check(False, op, "cache_batch_idx", "be None where block_table is given", "both")
    batch, rows = q.shape[:2]
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    lengths = _lengths(cache_seqlens, batch, capacity, q)
    if rotary_cos is not None:
        check(rotary_sin is not None, op, "rotary_sin", "come with rotary_cos", "None")
        check(k is not None, op, "rotary_cos", "come with k and v", "no k")
        assert rotary_sin is not None and k is not None
        start = lengths.long().view(-1, 1)
        moving = causal or max(window_size) >= 0
        steps = torch.arange(rows, device=q.device) if moving else start.new_zeros(rows)
        q = _rotate(q, rotary_cos, rotary_sin, start + steps, rotary_interleaved)
        steps = torch.arange(k.shape[1], device=q.device)
        k = _rotate(k, rotary_cos, rotary_sin, start + steps, rotary_interleaved)
    pages = block_table
    if cache_batch_idx is not None:  # a row of the cache is one long page
        pages = cache_batch_idx.view(-1, 1)
    options = _options(0.0, softmax_scale, causal, window_size, softcap, alibi_slopes)
    output, lse = attention_kvcache(
        q.transpose(1, 2),
        k_cache.transpose(1, 2),
        v_cache.transpose(1, 2),
        cache_lengths=lengths,
        k=None if k is None else k.transpose(1, 2),
        v=None if v is None else v.transpose(1, 2),
        page_table=pages,
        bias=_behind_padding(op, cache_leftpad, q, capacity),
        **options,
    )
    output = output.transpose(1, 2).contiguous()
    return (output, lse) if return_softmax_lse else output
