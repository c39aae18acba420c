"""Constraints for the tests of beam_topk, drawn at random."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashkern.beam import Trie

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_trie(vocab: int, count: int, length: int = 3) -> Trie:
    return Trie.from_sequences(torch.randint(0, vocab, (count, length)))


def random_excluded(batch: int, beams: int, vocab: int, count: int) -> Tensor:
    """Some of them -1, some twice."""
    return torch.randint(-1, vocab, (batch, beams, count))


def drawn(batch: int, beams: int, vocab: int, kind: str, count: int) -> dict[str, Any]:
    """The constraints of a kind: "excluded", "trie" or "both"."""
    options: dict[str, Any] = {}
    if kind != "trie":
        options["excluded"] = random_excluded(batch, beams, vocab, count)
    if kind != "excluded":
        trie = random_trie(vocab, 4 * count)
        options["trie"] = trie
        options["nodes"] = torch.randint(-1, min(len(trie), 2 * count + 1), (batch, beams))
    return options
