"""sharded_beam_topk over the processes of a group: every one of them gets the whole's choice."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import flashkern as fk
from flashkern.distributed import sharded_beam_topk

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed")

CUTS = (700, 301)


def _cases() -> list[tuple[torch.Tensor, torch.Tensor, int]]:
    """Among them one in which the first gather proves nothing: a beam that one shard hardly has."""
    torch.manual_seed(0)
    plain = torch.randn(2, 4, sum(CUTS)) * 3
    hidden = torch.randn(1, 3, sum(CUTS))
    hidden[:, 0, : CUTS[0]] -= 30
    ties = plain.round().bfloat16()
    unknown = plain[:, :2].clone()
    unknown[0, 1, CUTS[0] + 5] = torch.nan
    return [
        (plain, torch.randn(2, 4), 16),
        (hidden, torch.zeros(1, 3), 5),
        (ties, torch.zeros(2, 4), 9),
        (unknown, torch.zeros(2, 2), 1),
        (plain, torch.zeros(2, 4), 4 * CUTS[1] + 3),  # more than a shard has
    ]


def _process(rank: int, port: int, results: Any) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=len(CUTS))
    found = []
    for logits, scores, k in _cases():
        found.append(
            [t.tolist() for t in sharded_beam_topk(logits.split(CUTS, -1)[rank], scores, k)]
        )
    with pytest.raises(ValueError, match="sharded_beam_topk: k must be at most the shards'"):
        sharded_beam_topk(torch.randn(1, 2, 3 + rank), torch.zeros(1, 2), 15)
    results[rank] = found
    dist.destroy_process_group()


def test_two_processes() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_process, (port, results), nprocs=len(CUTS))
        mine, other = results[0], results[1]
    assert repr(mine) == repr(other)  # NaN is not equal to itself
    for (logits, beam_scores, k), found in zip(_cases(), mine, strict=True):
        best = fk.beam_topk(logits, beam_scores, k)
        scores, tokens, parents, lse = map(torch.tensor, found)
        assert torch.equal(tokens, best.tokens) and torch.equal(parents, best.parents)
        torch.testing.assert_close(scores, best.scores, equal_nan=True)
        torch.testing.assert_close(lse, best.logsumexp, equal_nan=True)


def test_the_hidden_case_needs_a_second_gather() -> None:
    logits, scores, k = _cases()[1]
    parts = [fk.beam_topk(shard, scores, k) for shard in logits.split(CUTS, -1)]
    with pytest.raises(ValueError, match="a choice they cannot prove"):
        fk.merge_topk(parts, offsets=[0, CUTS[0]])


def test_what_a_process_refuses_by_itself() -> None:
    logits, scores = torch.randn(1, 2, 3), torch.zeros(1, 2)
    with pytest.raises(TypeError, match="sharded_beam_topk: logits must"):
        sharded_beam_topk(logits.double(), scores.double(), 2)
    with pytest.raises(ValueError, match="sharded_beam_topk: k must be 1 at least"):
        sharded_beam_topk(logits, scores, 0)
    with pytest.raises(ValueError, match="sharded_beam_topk: logits must have shape"):
        sharded_beam_topk(logits[0], scores, 1)
