"""One call of flashkern's attention with the masks that transformers makes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import flashkern
from flashkern.integrations import _masks
from flashkern.integrations._padding import pad_head_dim


def _masked_bias(bias: Tensor | None, keep: Tensor | None) -> Tensor | None:
    """One bias for both: `keep` (bool, True = attend, or float, added) on top of `bias`."""
    if bias is None or keep is None:
        return keep if bias is None else bias
    if keep.dtype != torch.bool:
        return bias + keep
    return torch.where(keep, bias, torch.full((), -torch.inf, dtype=bias.dtype, device=bias.device))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    causal: bool = False,
    scale: float,
    bias: Tensor | None = None,
    left_window: int | None = None,
    **options: Any,
) -> Tensor:
    """Attention of (batch, heads, sequence, head_dim) tensors under a mask of this module.

    `causal` counts only without a mask and is aligned to the upper left, which is what
    transformers means by it: keys beyond the last query are unused room in a static cache.
    `bias` is broadcastable to (batch, heads, queries, keys); `left_window` narrows a mask that
    already ends at the diagonal to that many keys before it. The result has the query's shape with
    the value's head_dim.
    """
    queries, keys = query.shape[2], key.shape[2]
    window, lengths, end = (None, None), None, keys
    if isinstance(mask, _masks.Mask):
        recipe = mask.recipe
        shift = recipe.q_offset - recipe.kv_offset  # the diagonal: query i sits at key i + shift
        band = recipe.band
        if band.right == 0 and 0 <= shift and shift + queries <= keys:
            causal, end = True, shift + queries
        elif shift != keys - queries and band != _masks.Band():
            mask, band = mask.dense(), _masks.Band()
        if isinstance(mask, _masks.Mask):
            window, lengths, mask = (band.left, band.right), recipe.lengths, recipe.padding
            mask = None if mask is None else mask[:, None, None, :]
            if causal:
                window = (band.left, None)
    elif causal and mask is None and queries > 1:
        end = min(queries, keys)
    else:
        causal = False
    if left_window is not None:
        window = (left_window if window[0] is None else min(window[0], left_window), window[1])
    if end < keys:
        key, value = key[:, :, :end], value[:, :, :end]
        mask = None if mask is None else mask[..., :end]
        bias = bias if bias is None or bias.shape[-1] == 1 else bias[..., :end]
        lengths = None if lengths is None else lengths.clamp(max=end)
    value_dim = value.shape[-1]
    query, key, value = pad_head_dim(query, key, value)
    out = flashkern.attention(
        query,
        key,
        value,
        causal="bottom_right" if causal and end >= queries else "top_left" if causal else False,
        window=None if window == (None, None) else window,
        scale=scale,
        bias=_masked_bias(bias, mask),
        kv_lengths=lengths,
        **options,
    )
    return out[..., :value_dim]
