"""Masks that cut a batch into sequences, as `attention_varlen` on the memory as it lies.

Padding on one side: the real keys of row b are a run of tokens in memory, and so are those of row
b + 1, further on. Seen as one packed tensor whose tokens step over whole rows, a batch is sequences
(real keys) with gaps (padding and what lies between rows) that no query belongs to:

    tokens   | gap 0 | keys of row 0 | gap 1 | keys of row 1 | ...        queries of a gap: none

No key is copied, and none of a gap is read. Where queries are of the same tokens as keys, those of
padding are sequences without keys, whose output is 0, as transformers' flash attention gives it.
Packed sequences are the same without gaps.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

import flashkern
from flashkern.integrations._masks import Band, Mask

_LARGEST = 2**31 - 1  # sequences are counted in int32


@dataclasses.dataclass(frozen=True)
class Packed:
    """The sequences of a batch; `step` tokens lead from a row's keys to the next row's."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    longest_q: int
    longest_k: int
    band: Band
    step: int | None = None  # None: rows follow one another without a gap

    def attention(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """What flashkern.attention would give under the mask: (batch, heads, rows, dim)."""
        causal = self.band.right == 0
        right = None if causal else self.band.right
        out = flashkern.attention_varlen(
            _rows(query),
            _rows(key) if self.step is None else _stepped(key, self.step),
            _rows(value) if self.step is None else _stepped(value, self.step),
            self.cu_seqlens_q,
            self.cu_seqlens_k,
            self.longest_q,
            self.longest_k,
            causal=causal,
            window=None if self.band.left is None and right is None else (self.band.left, right),
            **options,
        )
        return out.unflatten(0, (query.shape[0], query.shape[2])).transpose(1, 2)


def _rows(tensor: Tensor) -> Tensor:
    """(batch, heads, tokens, dim) as (batch * tokens, heads, dim), a view where there is one."""
    return tensor.transpose(1, 2).flatten(0, 1)


def _stepped(tensor: Tensor, step: int) -> Tensor:
    """(batch, heads, tokens, dim) as (tokens, heads, dim): row b begins at token b * step."""
    batch, heads, tokens, dim = tensor.shape
    size = ((batch - 1) * step + tokens, heads, dim)
    _, head, token, element = tensor.stride()
    return tensor.as_strided(size, (token, head, element), tensor.storage_offset())


def _step(tensor: Tensor) -> int:
    """How many tokens lead from one row of the batch to the next; 0 where no number does."""
    batch, _, tokens, _ = tensor.shape
    if batch == 1:
        return tokens
    row, _, token, _ = tensor.stride()
    if token <= 0 or row % token or row // token < tokens:
        return 0
    return row // token


def plan(query: Tensor, key: Tensor, value: Tensor, mask: Mask, dropout_p: float) -> Packed | None:
    """The sequences that `mask` makes of a batch; None where it makes none, or not in this memory.

    Worked out once for all layers that share a mask.
    """
    recipe = mask.recipe
    batch, _, rows, _ = query.shape
    keys = key.shape[2]
    if mask.shape != (batch, 1, rows, keys):
        return None
    step: int | None = None
    if recipe.sequences is not None:
        step = 0
    elif recipe.starts is not None or (recipe.lengths is not None and recipe.same):
        step = _usable_step(query, key, value, mask, dropout_p)
    if step is None:
        return None
    if step not in mask.plans:
        mask.plans[step] = _sequences(mask) if step == 0 else _padded(mask, step)
    return mask.plans[step]


def _usable_step(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, dropout_p: float
) -> int | None:
    """The step of padded keys and values; None where packing would be wrong, or a copy."""
    recipe = mask.recipe
    batch, _, rows, keys = mask.shape
    last = recipe.q_offset - recipe.kv_offset + rows
    if recipe.band != Band() and last != keys:  # the diagonal would end elsewhere
        return None
    step = _step(key)
    if step == 0 or step != _step(value) or (batch - 1) * step + keys > _LARGEST:
        return None
    if step == keys:
        return step
    # Views that overlap: their gradient would be a scatter. And a checkpoint's two passes, one
    # without a gradient and one with, must count sequences, and so draw dropout, alike.
    if dropout_p or (torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))):
        return None
    return step


def _padded(mask: Mask, step: int) -> Packed:
    """Four sequences for each row: keys before it, its queries of padding, itself, more padding."""
    recipe = mask.recipe
    batch, _, rows, keys = mask.shape
    row = torch.arange(batch, device=mask.device)
    none, all_keys = torch.zeros_like(row), torch.full_like(row, keys)
    first = none if recipe.starts is None else recipe.starts
    end = all_keys if recipe.lengths is None else recipe.lengths
    # Without `same`, padding is on the left of the keys alone: every query is real.
    begin_q, end_q = (first, end) if recipe.same else (none, none + rows)
    ends_q = torch.stack([none, begin_q, end_q, none + rows], 1) + (row * rows)[:, None]
    ends_k = torch.stack([first, first, end, end], 1) + (row * step)[:, None]
    cu_q, cu_k = (
        torch.nn.functional.pad(ends.flatten(), (1, 0)).int() for ends in (ends_q, ends_k)
    )
    longest = max(step, keys)
    return Packed(cu_q, cu_k, rows, longest, recipe.band, None if step == keys else step)


def _sequences(mask: Mask) -> Packed:
    numbers: Any = mask.recipe.sequences
    first = torch.ones_like(numbers, dtype=torch.bool)
    first[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    begins = first.flatten().nonzero().flatten()
    cu_seqlens = torch.cat([begins, begins.new_tensor([first.numel()])]).int()
    longest = int(cu_seqlens.diff().max())
    return Packed(cu_seqlens, cu_seqlens, longest, longest, mask.recipe.band)
