"""Attention masks of transformers as descriptions instead of tensors.

transformers hands its mask functions a *recipe* (causal, sliding window, padding, where queries and
keys begin) and expects a bool tensor (batch, 1, queries, keys). `Mask` is such a tensor to everyone
who looks, but holds only the recipe: the attention function reads it and passes `causal`,
`window`, `kv_lengths` or the ends of sequences on, so that a kernel skips whole blocks and no
(queries x keys) memory exists. Any tensor operation on it, a slice for instance, turns it into the
dense bool tensor first: code that knows nothing of this class always sees the right values.

Recipes that are not understood (chunks, a user's own functions) become dense masks at once, made by
transformers' own `sdpa_mask`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from flashkern.integrations._virtual import Virtual


@dataclasses.dataclass(frozen=True)
class Band:
    """Keys that a query may see by position alone: p - left <= key position <= p + right."""

    left: int | None = None
    right: int | None = None

    def __and__(self, other: Band) -> Band:
        def tighter(a: int | None, b: int | None) -> int | None:
            return b if a is None else a if b is None else min(a, b)

        return Band(tighter(self.left, other.left), tighter(self.right, other.right))

    def allows(self, distance: Tensor) -> Tensor:
        """True where a key at `distance` = key position - query position may be seen."""
        keep = torch.ones_like(distance, dtype=torch.bool)
        if self.left is not None:
            keep &= distance >= -self.left
        if self.right is not None:
            keep &= distance <= self.right
        return keep


@dataclasses.dataclass
class Recipe:
    """A mask's meaning: a band of positions, and which keys of each batch row are real.

    q_offset and kv_offset are the positions of the first query and the first key. At most one of
    `lengths` (batch,) int32, for rows whose padding is all on the right, and `padding`
    (batch, keys) bool, True = a real key, is set. Beside `padding`, `starts` holds the first real
    key of each row where its padding is all on the left. `same` says that queries and keys are of
    the same tokens: a padding token's query is then as meaningless as its key. `sequences` (batch,
    keys) tells packed sequences apart, without any padding: neighbours of the same number are of
    one sequence, and the band counts within it.
    """

    band: Band
    q_offset: int
    kv_offset: int
    lengths: Tensor | None = None
    padding: Tensor | None = None
    starts: Tensor | None = None
    same: bool = False
    sequences: Tensor | None = None

    def real_keys(self, keys: int) -> Tensor | None:
        """(batch, keys) bool, True = a real key; None when all are."""
        if self.lengths is not None:
            return torch.arange(keys, device=self.lengths.device) < self.lengths[:, None]
        return self.padding

    def dense(self, batch: int, queries: int, keys: int, device: torch.device) -> Tensor:
        """The mask as a bool tensor (batch, 1, queries, keys), True = attend."""
        q = torch.arange(queries, device=device)[:, None] + self.q_offset
        k = torch.arange(keys, device=device)[None, :] + self.kv_offset
        keep = self.band.allows(k - q)
        if self.sequences is not None:
            keep = keep & (self.sequences[:, :, None] == self.sequences[:, None, :])[:, None]
        real = self.real_keys(keys)
        if real is not None:
            return keep & real[:, None, None, :]
        return keep.expand(batch, 1, queries, keys)


class Mask(Virtual):
    """A bool mask (batch, 1, queries, keys) without storage: see the head of this file."""

    recipe: Recipe
    plans: dict[int, Any]  # what attention functions have worked out from it
    _dense: Tensor | None

    @staticmethod
    def __new__(
        cls, recipe: Recipe, batch: int, queries: int, keys: int, device: torch.device | str
    ) -> Mask:
        return Tensor._make_wrapper_subclass(
            cls, (batch, 1, queries, keys), dtype=torch.bool, device=torch.device(device)
        )

    def __init__(
        self, recipe: Recipe, batch: int, queries: int, keys: int, device: torch.device | str
    ) -> None:
        self.recipe = recipe
        self.plans = {}
        self._dense = None

    def dense(self) -> Tensor:
        """The same mask as an ordinary bool tensor; made once."""
        if self._dense is None:
            batch, _, queries, keys = self.shape
            self._dense = self.recipe.dense(batch, queries, keys, self.device)
        return self._dense

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Mask({tuple(self.shape)}, {self.recipe})"


def _code(function: Any) -> Any:
    return getattr(function, "__code__", None)


# transformers builds each pattern from closures. One made here tells its code object; the numbers
# are in the closure of the one that a model made.
_AND = _code(masking_utils.and_masks())
_LEFT = _code(masking_utils.sliding_window_overlay(1))
_BOTH = _code(masking_utils.sliding_window_bidirectional_overlay(1))
_SAME_SEQUENCE = _code(masking_utils.packed_sequence_mask_function(torch.zeros(1, 1)))
_IN_SEQUENCE = _code(masking_utils.remap_positions_for_packed_sequence(lambda: 0, torch.zeros(1)))


def band_of(function: Callable) -> Band | None:
    """The band that a mask function of transformers describes, or None when it is anything else."""
    if function is masking_utils.causal_mask_function:
        return Band(right=0)
    if function is masking_utils.bidirectional_mask_function:
        return Band()
    code = _code(function)
    if code not in (_AND, _LEFT, _BOTH) or function.__closure__ is None:
        return None
    (value,) = (cell.cell_contents for cell in function.__closure__)
    if code is _LEFT:  # key > query - window
        return Band(left=value - 1)
    if code is _BOTH:
        return Band(left=value, right=value)
    band = Band()
    for part in map(band_of, value):
        if part is None:
            return None
        band = band & part
    return band


def _cells(function: Any) -> dict[str, Any]:
    """A closure's variables by name."""
    cells = (cell.cell_contents for cell in function.__closure__)
    return dict(zip(function.__code__.co_freevars, cells, strict=True))


def packed_of(function: Callable) -> tuple[Band, Tensor] | None:
    """The band within a sequence and the sequences' numbers, for packed sequences; None for others.

    transformers tells sequences apart where positions do not rise by one, so that within one a
    distance of positions is a distance of places.
    """
    if _code(function) is not _AND:
        return None
    (parts,) = _cells(function).values()
    if [_code(part) for part in parts] != [_SAME_SEQUENCE, _IN_SEQUENCE]:
        return None
    band = band_of(_cells(parts[1])["mask_function"])
    sequences = _cells(parts[0])["packed_sequence_mask"]
    return None if band is None else (band, sequences)


def _packed_mask(
    function: Callable, batch: int, queries: int, keys: int, device: torch.device | str
) -> Mask | None:
    """The mask of packed sequences, where `function` describes them."""
    packed = packed_of(function)
    if packed is None or queries != keys or packed[1].shape != (batch, keys):
        return None
    return Mask(Recipe(packed[0], 0, 0, sequences=packed[1]), batch, queries, keys, device)


def _padding(mask: Tensor | None, keys: int, kv_offset: int) -> dict[str, Tensor]:
    """The fields of a `Recipe` for a 2-D padding mask: none, lengths, or padding (and starts)."""
    if mask is None:
        return {}
    missing = keys + kv_offset - mask.shape[-1]
    if missing > 0:
        mask = torch.nn.functional.pad(mask, (0, missing))
    mask = mask[:, kv_offset : kv_offset + keys]
    lengths = mask.sum(-1, dtype=torch.int32)
    place = torch.arange(keys, device=mask.device)
    starts = keys - lengths
    forms = [
        lengths == keys,
        (place < lengths[:, None]) == mask,
        (place >= starts[:, None]) == mask,
    ]
    full, right, left = torch.stack([form.all() for form in forms]).tolist()  # one wait for a GPU
    if full:
        return {}
    if right:
        return {"lengths": lengths}
    return {"padding": mask, "starts": starts} if left else {"padding": mask}


def _without_effect(band: Band, q_offset: int, queries: int, kv_offset: int, keys: int) -> Band:
    """The band without a side that no pair of query and key reaches."""
    behind = q_offset + queries - 1 - kv_offset  # how far the first key lies behind the last query
    ahead = kv_offset + keys - 1 - q_offset
    left = None if band.left is not None and band.left >= behind else band.left
    right = None if band.right is not None and band.right >= ahead else band.right
    return Band(left, right)


def _attends_to_itself(config: Any) -> bool:
    """Whether a model has no cross-attention, whose masks look like those of an encoder."""
    crosses = ("is_encoder_decoder", "add_cross_attention")
    return config is not None and not any(getattr(config, name, False) for name in crosses)


def build_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    never_none: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """A mask function for transformers' AttentionMaskInterface: None, a `Mask`, or a bool tensor.

    None has transformers' own meaning: causal from the upper left where the layer is causal,
    everything where it is not. `never_none` asks for a mask in that case too.
    """
    skip = kwargs.get("allow_is_causal_skip", True) or kwargs.get("allow_is_bidirectional_skip")
    band = band_of(mask_function) if skip else None
    if never_none:
        kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)

    def dense() -> Tensor | None:
        return masking_utils.sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset=q_offset,  # type: ignore[arg-type]
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            device=device,
            **kwargs,
        )

    tracing = masking_utils.is_tracing(attention_mask) or masking_utils.is_torchdynamo_exporting()
    # A static cache, which counts in a tensor, may belong to compiled code: it takes plain tensors.
    if tracing or isinstance(q_offset, Tensor) or kwargs.get("use_vmap", False):
        return dense()
    sizes = (batch_size, q_length, kv_length, device)
    if band is None:
        packed = _packed_mask(mask_function, *sizes) if attention_mask is None else None
        return dense() if packed is None else packed
    padding = _padding(attention_mask, kv_length, kv_offset)
    effective = _without_effect(band, q_offset, q_length, kv_offset, kv_length)
    if not padding and not never_none:
        from_start = band.right == 0 and q_offset == kv_offset and effective == Band(right=0)
        if from_start or (effective == Band() and (band.right != 0 or q_length == 1)):
            return None
    # A row of keys is all that one query's mask is: as dense as it can be, but for left padding.
    if q_length == 1 and not (effective == Band() and "starts" in padding):
        return dense()
    same = q_length == kv_length and q_offset == kv_offset
    if band.right != 0:
        same = same and _attends_to_itself(kwargs.get("config"))
    elif "lengths" in padding:  # generate reads a decoder's last output, be it of padding
        same = same and torch.is_grad_enabled()
    return Mask(Recipe(effective, q_offset, kv_offset, **padding, same=same), *sizes)
