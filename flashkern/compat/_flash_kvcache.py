"""flash_attn's function for caches: see :mod:`flashkern.compat.flash_attn`."""

from typing import Any

import torch
from torch import Tensor

from flashkern._attention_args import int_argument
from flashkern._checks import check, renamed
from flashkern.attention import attention_kvcache
from flashkern.compat._flash_calls import NAMES, Window, call_options, check_layout


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
    check_layout(op, ("batch", "sequence", "heads", "head_dim"), q, k_cache, v_cache)
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
    options = call_options(0.0, softmax_scale, causal, window_size, softcap, alibi_slopes)
    try:
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
    except Exception as error:
        raise renamed(error, op, NAMES) from None
    output = output.transpose(1, 2).contiguous()
    return (output, lse) if return_softmax_lse else output
