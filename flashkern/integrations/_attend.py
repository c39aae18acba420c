"""One call of flashkern's attention with the masks that transformers makes."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

import flashkern
from flashkern.integrations import _masks, _packing
from flashkern.integrations._beam_cache import BeamLayer, BeamTensor
from flashkern.integrations._padding import STEP, cut_head_dim, pad_head_dim


@dataclasses.dataclass
class _Call:
    """What a mask means for `flashkern.attention`: keys from `end` on are unused by every query."""

    end: int
    causal: bool | str = False
    left: int | None = None
    right: int | None = None
    lengths: Tensor | None = None
    keep: Tensor | None = None  # bool or float, broadcastable to (batch, heads, queries, keys)


def _used_keys(mask: Tensor) -> int:
    """How many leading keys a bool mask lets anyone see: the rest is a static cache's unused room.

    Layers share a mask, so the answer is kept on the tensor, with the version that it belongs to.
    """
    keys = mask.shape[-1]
    if mask.dtype != torch.bool or torch.compiler.is_compiling() or mask.is_inference():
        return keys
    version, used = getattr(mask, "_fkern_used_keys", (None, keys))
    if version != mask._version:
        used = keys
        if not bool(mask[..., -1].any()):
            seen = mask.flatten(0, -2).any(0).nonzero()
            used = int(seen[-1]) + 1 if len(seen) else 1
        mask._fkern_used_keys = (mask._version, used)  # type: ignore[attr-defined]
    return used


def _read(mask: Tensor | None, causal: bool, queries: int, keys: int) -> _Call:
    if mask is None:
        if not causal or queries == 1:
            return _Call(keys)
        # transformers aligns to the upper left here: what follows is a static cache's unused room.
        end = min(queries, keys)
        return _Call(end, "bottom_right" if end == queries else "top_left")
    if not isinstance(mask, _masks.Mask):
        return _Call(_used_keys(mask) if mask.shape[-1] == keys else keys, keep=mask)
    recipe, band = mask.recipe, mask.recipe.band
    if recipe.sequences is not None:
        return _Call(keys, keep=mask.dense())
    shift = recipe.q_offset - recipe.kv_offset  # on the diagonal, query i meets key i + shift
    call = _Call(keys, False, band.left, band.right, recipe.lengths)
    if recipe.padding is not None:
        call.keep = recipe.padding[:, None, None, :]
    if band.right == 0 and shift >= 0 and shift + queries <= keys:
        call.end, call.causal, call.right = shift + queries, "bottom_right", None
    elif band != _masks.Band() and shift != keys - queries:
        return _Call(keys, keep=mask.dense())  # a diagonal that no argument describes
    return call


def _merged(bias: Tensor | None, keep: Tensor | None) -> Tensor | None:
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
    """Attention of (batch, heads, sequence, head_dim) tensors under a mask of transformers.

    `causal` counts only without a mask and is aligned to the upper left. `bias` is broadcastable
    to (batch, heads, queries, keys); `left_window` lets a query see no further back than that many
    keys. The result is (batch, heads, queries, value_head_dim).
    """
    if isinstance(key, BeamTensor):
        same = isinstance(value, BeamTensor) and value.layer is key.layer
        if same and query.shape[2] == 1 and left_window is None and not options.get("dropout_p"):
            return _attend_beams(query, key.layer, _merged(bias, _keep(mask)), scale, options)
        key, value = key.dense(), value[:]
    if mask is None and left_window is None and not (causal and query.shape[2] > 1):
        return _run(query, key, value, scale=scale, bias=bias, **options)
    if isinstance(mask, _masks.Mask) and bias is None and left_window is None:
        packed = _packing.plan(query, key, value, mask, options.get("dropout_p", 0.0))
        if packed is not None:
            return _run(query, key, value, packed, scale=scale, **options)
    keys = key.shape[2]
    call = _read(mask, causal, query.shape[2], keys)
    if left_window is not None:
        call.left = left_window if call.left is None else min(call.left, left_window)
    if call.end < keys:
        key, value = key[:, :, : call.end], value[:, :, : call.end]
        if call.keep is not None:
            call.keep = call.keep[..., : call.end]
        if call.lengths is not None:
            call.lengths = call.lengths.clamp(max=call.end)
        if bias is not None and bias.shape[-1] > 1:
            bias = bias[..., : call.end]
    return _run(
        query,
        key,
        value,
        causal=call.causal,
        window=None if call.left is None and call.right is None else (call.left, call.right),
        scale=scale,
        bias=_merged(bias, call.keep),
        kv_lengths=call.lengths,
        **options,
    )


def _keep(mask: Tensor | None) -> Tensor | None:
    """A mask of one query for each row as a bias."""
    if not isinstance(mask, _masks.Mask):
        return mask
    recipe = mask.recipe
    if recipe.padding is not None and recipe.band == _masks.Band():
        return recipe.padding[:, None, None, :]
    return mask.dense()


def _attend_beams(
    query: Tensor, layer: BeamLayer, bias: Tensor | None, scale: float, options: dict[str, Any]
) -> Tensor:
    """One query of each beam over a cache of beams, where it lies."""
    beams, tokens = layer.table.beams, layer.tokens
    if tokens == 0:  # keys that no beam adds to: the beams are the rows of one query
        assert layer.shared_k is not None and layer.shared_v is not None
        if bias is not None:
            bias = bias.expand(query.shape[0], -1, -1, -1)
            bias = bias.unflatten(0, (-1, beams)).squeeze(3).transpose(1, 2)
        rows = query.unflatten(0, (-1, beams)).squeeze(3).transpose(1, 2)
        out = _run(rows, layer.shared_k, layer.shared_v, scale=scale, bias=bias, **options)
        return out.transpose(1, 2).flatten(0, 1).unsqueeze(2)
    batch, device = query.shape[0], query.device
    dims = query.shape[-1], layer.own_v.shape[-1]
    own_k, own_v = layer.own_k[:, :, :tokens], layer.own_v[:, :, :tokens]
    shared_k, shared_v = layer.shared_k, layer.shared_v
    if dims[0] % STEP or dims[1] % STEP:
        query, own_k, own_v = pad_head_dim(query, own_k, own_v)
        if shared_k is not None and shared_v is not None:
            shared_k, shared_v = pad_head_dim(shared_k, shared_v)
    out = flashkern.attention_kvcache(
        query,
        own_k,
        own_v,
        cache_lengths=layer.table.lengths(batch, tokens, device),
        beam_table=layer.table.rows(tokens, device),
        shared_k=shared_k,
        shared_v=shared_v,
        scale=scale,
        bias=bias,
        **options,
    )
    return cut_head_dim(out, dims[1])


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: _packing.Packed | None = None,
    **options: Any,
) -> Tensor:
    """flashkern.attention, or attention_varlen on `packed`, with any head_dim."""
    attention = flashkern.attention if packed is None else packed.attention
    value_dim = value.shape[-1]
    if query.shape[-1] % STEP == 0 == value_dim % STEP:
        return attention(query, key, value, **options)
    return cut_head_dim(attention(*pad_head_dim(query, key, value), **options), value_dim)
