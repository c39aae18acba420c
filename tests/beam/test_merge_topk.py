"""merge_topk: shards of a vocabulary against the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import flashkern as fk


def joint_of(shards: list[Tensor], scores: Tensor) -> Tensor:
    return torch.stack([fk.beam_topk(shard, scores, 1).logsumexp for shard in shards]).logsumexp(0)


def offsets_of(shards: list[Tensor]) -> list[int]:
    return [sum(shard.shape[-1] for shard in shards[:i]) for i in range(len(shards))]


def equal(a: fk.BeamTopK, b: fk.BeamTopK) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 8, 100])
@pytest.mark.parametrize("cuts", [(500, 501), (1000, 1), (300, 200, 501), (1001,)], ids=str)
def test_joint_logsumexp_is_bit_exact(cuts: tuple[int, ...], k: int, dtype: torch.dtype) -> None:
    logits = (torch.randn(2, 4, 1001) * 2).to(dtype)  # bfloat16: with many ties
    logits[0, 0] = -torch.inf
    logits[:, 1, 400:] = -torch.inf
    scores = torch.randn(2, 4)
    shards = list(logits.split(cuts, -1))
    joint = joint_of(shards, scores)
    parts = [
        fk.beam_topk(shard, scores, min(k, 4 * shard.shape[-1]), logsumexp=joint)
        for shard in shards
    ]
    merged = fk.merge_topk(parts, offsets=offsets_of(shards), renormalize=False)
    assert equal(merged, fk.beam_topk(logits, scores, k, logsumexp=joint))
    whole = fk.beam_topk(logits, scores, k)
    torch.testing.assert_close(merged.scores, whole.scores, atol=3e-6, rtol=1e-6)
    torch.testing.assert_close(merged.logsumexp, whole.logsumexp, atol=2e-6, rtol=1e-6)


def test_tokens_may_hold_their_offset() -> None:
    logits, scores = torch.randn(1, 2, 60), torch.zeros(1, 2)
    shards = list(logits.split(30, -1))
    joint = joint_of(shards, scores)
    parts = [fk.beam_topk(shard, scores, 5, logsumexp=joint) for shard in shards]
    shifted = [parts[0], parts[1]._replace(tokens=parts[1].tokens + 30)]
    merged = fk.merge_topk(shifted, renormalize=False)
    assert equal(merged, fk.merge_topk(parts, offsets=[0, 30], renormalize=False))


def test_own_logsumexp_with_one_beam() -> None:
    logits, scores = torch.randn(3, 1, 1000) * 4, torch.randn(3, 1)
    shards = list(logits.split((100, 700, 200), -1))
    parts = [fk.beam_topk(shard, scores, 20) for shard in shards]
    merged = fk.merge_topk(parts, offsets=offsets_of(shards))
    whole = fk.beam_topk(logits, scores, 20)
    assert torch.equal(merged.tokens, whole.tokens)
    torch.testing.assert_close(merged.scores, whole.scores, atol=3e-6, rtol=1e-6)
    torch.testing.assert_close(merged.logsumexp, whole.logsumexp, atol=2e-6, rtol=1e-6)


def test_own_logsumexp_is_right_or_refused() -> None:
    """What passes equals the whole; a choice that the parts cannot prove is refused."""
    refused = 0
    for _ in range(40):
        logits, scores = torch.randn(2, 3, 400) * 2, torch.randn(2, 3)
        shards = list(logits.split((150, 250), -1))
        parts = [fk.beam_topk(shard, scores, 12) for shard in shards]
        whole = fk.beam_topk(logits, scores, 12)
        try:
            merged = fk.merge_topk(parts, offsets=[0, 150])
        except ValueError as error:
            assert "merge_topk: parts must be taken with a joint logsumexp" in str(error)
            refused += 1
            continue
        assert torch.equal(merged.tokens, whole.tokens)
        assert torch.equal(merged.parents, whole.parents)
    assert refused < 40


def test_a_lost_candidate_is_refused() -> None:
    """Beam 1 holds nothing in shard 0, so that its own log-sum-exp lifts it there above beam 0."""
    logits = torch.full((1, 2, 8), -20.0)
    logits[0, 0, :4] = torch.tensor([2.0, 1.9, 1.8, 1.7])
    logits[0, 1, 4] = 5.0
    scores = torch.tensor([[-1.0, 0.0]])
    parts = [fk.beam_topk(shard, scores, 3) for shard in logits.split(4, -1)]
    with pytest.raises(ValueError, match="merge_topk: parts must be taken with a joint logsumexp"):
        fk.merge_topk(parts, offsets=[0, 4])


def test_masked_beams_merge() -> None:
    logits, scores = torch.randn(1, 2, 50), torch.zeros(1, 2)
    logits[0, 1] = -torch.inf
    parts = [fk.beam_topk(shard, scores, 25) for shard in logits.split(25, -1)]
    merged = fk.merge_topk(parts, offsets=[0, 25])
    assert merged.logsumexp[0, 1] == -torch.inf
    assert torch.equal(merged.tokens, fk.beam_topk(logits, scores, 25).tokens)


def test_messages() -> None:
    part = fk.beam_topk(torch.randn(1, 2, 9), torch.zeros(1, 2), 3)
    other = fk.beam_topk(torch.randn(1, 3, 9), torch.zeros(1, 3), 3)
    with pytest.raises(ValueError, match="merge_topk: parts must hold one BeamTopK for each shard"):
        fk.merge_topk([])
    with pytest.raises(ValueError, match=r"merge_topk: parts must share \(B, beams\) = \(1, 2\)"):
        fk.merge_topk([part, other])
    with pytest.raises(ValueError, match="merge_topk: offsets must have 2 entries, got 1"):
        fk.merge_topk([part, part], offsets=[0])
