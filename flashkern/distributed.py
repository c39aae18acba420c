"""Operators over the processes of a torch.distributed group; ``flashkern`` does not import it."""

from __future__ import annotations

from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from flashkern._checks import FLOATS, check, check_dtype
from flashkern.beam import BeamTopK, beam_topk, merge_parts

__all__ = ["sharded_beam_topk"]


def sharded_beam_topk(
    logits: Tensor, beam_scores: Tensor, k: int, *, group: dist.ProcessGroup | None = None
) -> BeamTopK:
    """:func:`flashkern.beam_topk` of a vocabulary that is cut among the processes of a group.

    Process i holds the i-th shard of every beam's logits. Each chooses its own ``k`` best, and one
    gather of them and of the log-sum-exps settles the choice, if it is proven (see
    :func:`flashkern.merge_topk`). Where some shard may have left out a candidate, all processes
    choose again under the joint log-sum-exp, and gather once more. Logits never travel.

    Args:
        logits: (B, beams, V of this shard), float32, bfloat16 or float16; on a device that the
            group's backend can gather from.
        beam_scores: (B, beams), float32, the same on every process.
        k: candidates for each row, 1 to the beams times V of all shards.
        group: the processes, in the vocabulary's order; None for all.

    Returns:
        A :class:`flashkern.BeamTopK`, the same on every process; tokens count over all shards.
        Not differentiable.

    Raises:
        TypeError: float64 logits.
        ValueError: k is out of range; and whatever :func:`flashkern.beam_topk` raises. What one
            process alone is given wrongly it alone refuses, while the others wait for it.

    Source: the joint softmax of shards, as in Shoeybi et al., Megatron-LM (arXiv 1909.08053).
    """
    op = "sharded_beam_topk"
    check_dtype(op, "logits", logits, FLOATS[:3])
    check(logits.dim() == 3, op, "logits", "have shape (B, beams, V)", tuple(logits.shape))
    check(k >= 1, op, "k", "be 1 at least", k)
    parts, sizes = _gather(_own_best(logits, beam_scores, k), logits.shape[2], group)
    candidates = logits.shape[1] * sum(sizes)
    check(k <= candidates, op, "k", f"be at most the shards' beams * V = {candidates}", k)
    offsets = [0, *accumulate(sizes)][:-1]
    best, proven = merge_parts(parts, offsets, renormalize=True)
    if proven:
        return best
    own = _own_best(logits, beam_scores, k, best.logsumexp)
    parts, _ = _gather(own, logits.shape[2], group)
    return merge_parts(parts, offsets, renormalize=False)[0]


def _own_best(
    logits: Tensor, beam_scores: Tensor, k: int, logsumexp: Tensor | None = None
) -> BeamTopK:
    """This shard's k best; where it has fewer, nobody fills up."""
    held = min(k, logits.shape[1] * logits.shape[2])
    scores, tokens, parents, lse = beam_topk(logits, beam_scores, held, logsumexp=logsumexp)
    fill = (0, k - held)
    return BeamTopK(
        pad(scores, fill, value=-torch.inf), pad(tokens, fill, value=-1), pad(parents, fill), lse
    )


def _gather(
    part: BeamTopK, vocab: int, group: dist.ProcessGroup | None
) -> tuple[list[BeamTopK], list[int]]:
    """Every process's part and the size of its vocabulary, in one collective of int32 words."""
    scores, tokens, parents, logsumexp = (t.detach() for t in part)
    words = [scores.view(torch.int32), tokens.int(), parents.int(), logsumexp.view(torch.int32)]
    flat = torch.cat([scores.new_tensor([vocab], dtype=torch.int32), *(w.flatten() for w in words)])
    everyone = [torch.empty_like(flat) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, flat, group=group)
    parts, sizes = [], []
    counts = [w.numel() for w in words]
    for received in everyone:
        score, token, parent, lse = (
            x.view(word.shape) for x, word in zip(received[1:].split(counts), words, strict=True)
        )
        best = score.view(torch.float32), token.long(), parent.long(), lse.view(torch.float32)
        parts.append(BeamTopK(*best))
        sizes.append(int(received[0]))
    return parts, sizes
