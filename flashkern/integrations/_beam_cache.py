"""A key-value cache for beam search that is never copied.

Each prompt's keys are held once for all its beams, and each beam's own tokens stay in the row where
they were written. A table says whose row holds which token:

    step    0  1  2  3        beams 0 and 1 continue what beam 0 wrote at step 0, and so on: to
    beam 0  0  0  0  0        reorder beams is to reorder the rows of this table, a few integers
    beam 1  0  0  1  1        for each token, whatever the number of layers and heads
    beam 2  2  2  2  2

`fkern` attention reads keys by the table where they lie (`flashkern.attention_kvcache`). To all
other code a cache's keys and values look like tensors (batch * beams, heads, tokens, dim); any
operation on them makes that tensor first, by one gather.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from flashkern._attention_args import contiguous_last
from flashkern._attention_ops import APPEND
from flashkern._checks import check
from flashkern.integrations._virtual import Virtual
from flashkern.reference import gather_beams

_MOST_ROOM = 256  # at first: a search may end long before it has all the tokens it may have
_ROOM = 32  # tokens that a cache has room for at first, where nobody tells how many will come


class BeamTensor(Virtual):
    """The keys or the values of a layer, without storage: see the head of this file."""

    layer: BeamLayer
    of_keys: bool

    @staticmethod
    def __new__(cls, layer: BeamLayer, of_keys: bool) -> BeamTensor:
        own = layer.own_k if of_keys else layer.own_v
        rows, heads, _, dim = own.shape
        shape = (rows, heads, layer.shared_tokens + layer.tokens, dim)
        return Tensor._make_wrapper_subclass(cls, shape, dtype=own.dtype, device=own.device)

    def __init__(self, layer: BeamLayer, of_keys: bool) -> None:
        self.layer = layer
        self.of_keys = of_keys

    def dense(self) -> Tensor:
        """The same as an ordinary tensor."""
        return self.layer.dense(self.of_keys)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"BeamTensor({tuple(self.shape)})"


class BeamTable:
    """Whose row holds which of the beams' own tokens; the layers of a cache share it."""

    def __init__(self, beams: int, room: int) -> None:
        self.beams = beams
        self.room = room
        self.reset()

    def reset(self) -> None:
        """Forgets every token."""
        self.written = 0  # tokens of each beam; behind them each is its own
        self._rows: Tensor | None = None  # (prompts, beams, room) int32
        # Made once for all layers of a step: the first columns, contiguous, and lengths.
        self._current: dict[Any, Tensor] = {}
        self._lengths: dict[Any, Tensor] = {}

    def write(self, batch: int, tokens: int, device: torch.device) -> None:
        """Each beam's tokens, so many by now, are in its own row from the last reorder on."""
        table = self._rows
        self.written = tokens
        if table is not None and table.shape[2] >= tokens:
            return
        self.room = max(self.room, tokens, 0 if table is None else 2 * table.shape[2])
        own = torch.arange(self.beams, dtype=torch.int32, device=device)
        shape = (batch // self.beams, self.beams, self.room)
        self._rows = own.view(1, -1, 1).expand(shape).contiguous()
        if table is not None:
            self._rows[:, :, : table.shape[2]] = table

    def rows(self, tokens: int, device: torch.device) -> Tensor:
        """The table of so many tokens, (prompts, beams, tokens) int32."""
        assert self._rows is not None
        key = tokens, device
        if key not in self._current:
            _forget(self._current)
            self._current[key] = self._rows[:, :, :tokens].to(device).contiguous()
        return self._current[key]

    def lengths(self, batch: int, tokens: int, device: torch.device) -> Tensor:
        """(batch,) int32 of so many tokens."""
        key = batch, tokens, device
        if key not in self._lengths:
            _forget(self._lengths)
            self._lengths[key] = torch.full((batch,), tokens, dtype=torch.int32, device=device)
        return self._lengths[key]

    def reorder(self, parents: Tensor) -> None:
        """Beam i becomes a copy of beam parents[i]; rows of the whole batch, from 0."""
        table = self._rows
        if table is None:
            return
        written = table[:, :, : self.written]
        local = parents.to(table.device, torch.int64).view(table.shape[:2]) % self.beams
        written.copy_(written.gather(1, local.unsqueeze(-1).expand_as(written)))
        self._current.clear()


def _forget(made: dict[Any, Tensor], most: int = 16) -> None:
    """Empties what was made for steps gone by, once it has more than a step's devices can need."""
    if len(made) >= most:
        made.clear()


class BeamLayer(CacheLayerMixin):
    """One layer of a `BeamCache`."""

    is_sliding = False

    def __init__(self, table: BeamTable) -> None:
        self.table = table
        self.is_initialized = False
        self.tokens = 0  # of each beam's own
        self.shared_k: Tensor | None = None  # (prompts, heads, tokens, dim)
        self.shared_v: Tensor | None = None
        self.dropped = 0  # tokens that a sliding window has left behind before the beams began
        self.own_k, self.own_v = torch.empty(0), torch.empty(0)

    def reset(self) -> None:
        """Forgets every token, those of the prompt too."""
        self.__init__(self.table)  # type: ignore[misc]
        self.table.reset()

    @classmethod
    def of(cls, layer: Any, table: BeamTable) -> BeamLayer:
        """Takes over what a layer of a DynamicCache holds, one row for each prompt."""
        made = cls(table)
        made.is_sliding = layer.is_sliding
        if layer.get_seq_length() == 0:
            return made
        made.shared_k, made.shared_v = layer.keys, layer.values
        made.dropped = layer.get_seq_length() - layer.keys.shape[2]
        made._allocate(layer.keys, layer.values, layer.keys.shape[0] * table.beams, 0)
        return made

    @property
    def shared_tokens(self) -> int:
        return 0 if self.shared_k is None else self.shared_k.shape[2]

    @property
    def keys(self) -> Tensor:  # type: ignore[override]
        return BeamTensor(self, True)

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        return BeamTensor(self, False)

    def _allocate(self, k: Tensor, v: Tensor, rows: int, room: int) -> None:
        held = self.own_k, self.own_v
        self.own_k, self.own_v = (t.new_empty((rows, t.shape[1], room, t.shape[3])) for t in (k, v))
        if self.tokens:
            for grown, before in zip((self.own_k, self.own_v), held, strict=True):
                grown[:, :, : self.tokens] = before[:, :, : self.tokens]
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        room = max(self.table.room, key_states.shape[2])
        self._allocate(key_states, value_states, key_states.shape[0], room)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes each beam's new tokens behind its own."""
        rows, _, new, _ = key_states.shape
        if rows % self.table.beams:
            raise ValueError(
                f"BeamCache: the batch must hold {self.table.beams} beams of each prompt, "
                f"got {rows} rows"
            )
        if key_states.shape[:3] != value_states.shape[:3]:
            raise ValueError(
                f"BeamCache: value_states must have the batch, heads and tokens of key_states, "
                f"{tuple(key_states.shape[:3])}, got {tuple(value_states.shape[:3])}"
            )
        before, after = self.tokens, self.tokens + new
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif self.own_k.shape[2] < after:
            room = max(self.table.room, 2 * self.own_k.shape[2], after)
            self._allocate(self.own_k, self.own_v, rows, room)
        lengths = self.table.lengths(rows, before, key_states.device)
        new_k, new_v = contiguous_last(key_states), contiguous_last(value_states)
        APPEND(self.own_k, self.own_v, new_k, new_v, lengths, None)
        self.table.write(rows, after, key_states.device)
        self.tokens = after
        if before == 0 and self.shared_k is None:
            return key_states, value_states
        return self.keys, self.values

    def dense(self, of_keys: bool) -> Tensor:
        """Keys (or values) of every beam, gathered."""
        own = self.own_k if of_keys else self.own_v
        shared = self.shared_k if of_keys else self.shared_v
        gathered = own[:, :, :0]
        if self.tokens:
            table = self.table.rows(self.tokens, own.device)
            gathered = gather_beams(own[:, :, : self.tokens], table)
        if shared is None:
            return gathered
        return torch.cat([shared.repeat_interleave(self.table.beams, 0), gathered], 2)

    def get_seq_length(self) -> int:
        return self.dropped + self.shared_tokens + self.tokens

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.shared_tokens + self.tokens + query_length, self.dropped


class BeamCache(Cache):
    """A cache for transformers whose beams are reordered by a table and that copies no keys.

    :func:`beam_search` makes one from the prompts' caches by itself where the model's attention is
    ``"fkern"``. As ``past_key_values`` of transformers' own beam search it works with any model
    that takes a cache; the prompt is then held for each beam.

    Args:
        beams: beams of each prompt: rows of the batch that follow one another.
        room: tokens that each beam has room for at first; it grows by doubling.

    Raises:
        ValueError: no beams; on an update a batch that is no multiple of ``beams``.

    Example:
        >>> import torch
        >>> import flashkern.integrations.transformers as fkt
        >>> cache = fkt.BeamCache(2)
        >>> k, v = torch.randn(2, 2, 3, 1, 8).unbind()
        >>> for _ in range(2):
        ...     keys, values = cache.update(k, v, layer_idx=0)
        >>> cache.reorder_cache(torch.tensor([1, 1]))
        >>> keys.shape, bool((cache.layers[0].keys[0] == k[1]).all())
        (torch.Size([2, 3, 2, 8]), True)
    """

    def __init__(self, beams: int, room: int = _ROOM) -> None:
        check(beams > 0, "BeamCache", "beams", "be positive", beams)
        self.table = BeamTable(beams, room)
        layer: Any = lambda: BeamLayer(self.table)  # noqa: E731
        super().__init__(layer_class_to_replicate=layer)

    @classmethod
    def of(cls, cache: Any, beams: int, room: int = _ROOM) -> BeamCache:
        """The cache of a batch of prompts, continued by ``beams`` beams of each. Copies nothing."""
        made = cls(beams, min(room, _MOST_ROOM))
        made.layers = [BeamLayer.of(layer, made.table) for layer in cache.layers]
        return made

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam i becomes a copy of beam ``beam_idx[i]`` of the same prompt."""
        self.table.reorder(beam_idx)
