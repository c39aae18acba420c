"""Beam-search top-k: log-softmax, beam scores and selection in one read of the logits."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashkern import _ops, reference
from flashkern._checks import (
    FLOATS,
    check,
    check_dense,
    check_device,
    check_dtype,
    check_range,
    check_tensor,
    integer,
)
from flashkern._dispatch import register_autograd
from flashkern._tree import draw
from flashkern._trie import INTEGERS, Trie

__all__ = ["BeamTopK", "Trie", "beam_topk", "draw", "merge_topk"]

DEVICES = ["meta", *(d for d in ("cpu", "cuda") if _ops.has_kernel("beam_topk", d))]


class BeamTopK(NamedTuple):
    """What :func:`beam_topk` and :func:`merge_topk` return.

    Attributes:
        scores: (B, k), descending.
        tokens: (B, k) int64, the token of each candidate; -1 where there are fewer than k.
        parents: (B, k) int64, the beam that each candidate continues, from 0 in each row.
        logsumexp: (B, beams), natural log, of each beam's logits.

    Example:
        >>> import torch, flashkern as fk
        >>> best = fk.beam_topk(torch.zeros(1, 2, 3), torch.zeros(1, 2), 2)
        >>> scores, tokens, parents, logsumexp = best
        >>> tokens
        tensor([[0, 1]])
    """

    scores: Tensor
    tokens: Tensor
    parents: Tensor
    logsumexp: Tensor


def beam_topk(
    logits: Tensor,
    beam_scores: Tensor,
    k: int,
    *,
    logsumexp: Tensor | None = None,
    excluded: Tensor | None = None,
    trie: Trie | None = None,
    nodes: Tensor | None = None,
) -> BeamTopK:
    """The ``k`` best continuations of each batch row's beams.

    A candidate (beam, token) scores ``log_softmax(logits[beam])[token] + beam_scores[beam]``, in
    float32 as ``((logit - shift) - log_sum) + beam_score``, where shift is the beam's greatest
    logit and ``log_sum = log(sum(exp(logits - shift)))``. The logits are read once and neither
    copied nor converted in memory.

    Order: descending scores; equal ones go to the smaller beam, then to the smaller token. It is
    the same for every number of threads and, given the same log_sum, for every back end; AVX2 and
    AVX-512 round log_sum alike, the portable kernel may differ from them in its last bit.

    ``excluded`` and ``trie`` narrow the choice and nothing else: logsumexp is that of all logits,
    scores and order are as without them. Where fewer than ``k`` candidates are allowed, all of them
    come, and the places behind them hold the score -inf, the token -1 and the parent 0.

    A logit of -inf scores -inf. It is chosen only when fewer than ``k`` others are left: then in
    the order of beam and token, with the score -inf. A beam of nothing but -inf has logsumexp -inf.
    A logit of NaN or +inf makes its beam's logsumexp NaN, as in ``log_softmax``, and with it every
    score of the beam but those of -inf; NaN ranks above every number, as in ``torch.topk``.

    Args:
        logits: (B, beams, V), float32, bfloat16, float16, or float64 (plain PyTorch, unhurried).
            Any strides with a contiguous last dimension are taken as they are; others are copied.
        beam_scores: (B, beams), float32 (float64 beside float64 logits), the scores so far.
        k: candidates for each row, 1 to beams * V, also where fewer are allowed.
        logsumexp: (B, beams), like ``beam_scores``: normalises with this instead of the logits'
            own, for shards of a vocabulary (see :func:`merge_topk`): shift is this, log_sum is 0.
        excluded: (B, beams, n) int64, the tokens that a beam may not take, -1 for none.
        trie: a beam may take the children of its node alone. With the logsumexp given too, a CPU
            reads no other logits.
        nodes: (B, beams) integers, each beam's node of the trie; one at -1 has no candidate.

    Returns:
        A :class:`BeamTopK`. ``scores`` and ``logsumexp`` are differentiable with respect to
        ``logits``, ``beam_scores`` and a given ``logsumexp``.

    Raises:
        TypeError: an argument is not a tensor or has another dtype.
        ValueError: shapes do not fit, k is out of range, or the trie has tokens that logits lack.
        RuntimeError: on a CPU, a node or an excluded token out of range. On a GPU, where nobody
            looks, such a node has no children and such a token is none.
        NotImplementedError: a device without a kernel, or beams * V of 2**32 or more.

    Sources: Milakov and Gimelshein, Online normalizer calculation for softmax (arXiv 1805.02867);
    Gaihre et al., Dr. Top-k (arXiv 2109.08219).

    Example:
        >>> import torch, flashkern as fk
        >>> logits = torch.tensor([[[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]]])
        >>> best = fk.beam_topk(logits, torch.tensor([[0.0, -1.0]]), 3)
        >>> best.tokens.tolist(), best.parents.tolist()
        ([[1, 0, 2]], [[0, 1, 0]])
        >>> best.scores.shape
        torch.Size([1, 3])
        >>> excluded = torch.tensor([[[1, 2], [0, -1]]])
        >>> fk.beam_topk(logits, torch.tensor([[0.0, -1.0]]), 2, excluded=excluded).tokens
        tensor([[0, 1]])
    """
    _check(logits, beam_scores, k, logsumexp)
    if excluded is not None or trie is not None or nodes is not None:
        _check_constraints(logits, excluded, trie, nodes)
    if logits.dtype == torch.float64:
        check_range("beam_topk", "excluded", excluded, logits.shape[2])
        check_range("beam_topk", "nodes", nodes, len(trie) if trie is not None else 0)
        options: dict[str, Any] = {"excluded": excluded, "trie": trie, "nodes": nodes}
        return BeamTopK(*reference.beam_topk(logits, beam_scores, k, logsumexp, **options))
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        check_dense("beam_topk", "logits", logits)
        logits = logits.contiguous()
    given = None if logsumexp is None else logsumexp.contiguous()
    without = None if excluded is None else excluded.contiguous()
    below: tuple[Tensor | None, ...] = (None, None, None)
    if trie is not None and nodes is not None:
        below = (nodes.long().contiguous(), trie.starts, trie.tokens)
    return BeamTopK(*_topk(logits, beam_scores.contiguous(), k, given, without, *below))


def _fit(logits: Tensor, beam_scores: Tensor, k: int, logsumexp: Tensor | None) -> bool:
    """Whether the arguments are those of a usual call: `_check` in one pass, without a message."""
    if not (isinstance(logits, Tensor) and isinstance(beam_scores, Tensor)):
        return False
    shape, rows = logits.shape, beam_scores.shape
    return (
        logsumexp is None
        and len(shape) == 3
        and len(rows) == 2
        and rows[0] == shape[0]
        and rows[1] == shape[1]
        and logits.dtype in FLOATS[:3]
        and beam_scores.dtype is torch.float32
        and logits.is_cpu
        and beam_scores.is_cpu
        and isinstance(k, int)
        and 1 <= k <= shape[1] * shape[2] < 2**32
    )


def _check(logits: Tensor, beam_scores: Tensor, k: int, logsumexp: Tensor | None) -> None:
    if _fit(logits, beam_scores, k, logsumexp):
        return
    op = "beam_topk"
    check_dense(op, "logits", logits)
    check_dense(op, "beam_scores", beam_scores)
    integer(op, "k", k)
    check_dtype(op, "logits", logits, FLOATS)
    check(logits.dim() == 3, op, "logits", "have shape (B, beams, V)", tuple(logits.shape))
    score_dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    for name, value in (("beam_scores", beam_scores), ("logsumexp", logsumexp)):
        if value is None:
            continue
        check_tensor(op, name, value)
        check_dtype(op, name, value, (score_dtype,))
        expected = logits.shape[:2]
        must = f"have the logits' shape (B, beams) = {tuple(expected)}"
        check(value.shape == expected, op, name, must, tuple(value.shape))
        same = value.device == logits.device
        check(same, op, name, f"be on the logits' device {logits.device}", value.device)
    candidates = logits.shape[1] * logits.shape[2]
    check(1 <= k <= candidates, op, "k", f"be between 1 and beams * V = {candidates}", k)
    if candidates >= 2**32:
        raise NotImplementedError(f"{op}: beams * V must be below 2**32, got {candidates}")


def _check_constraints(
    logits: Tensor, excluded: Tensor | None, trie: Trie | None, nodes: Tensor | None
) -> None:
    op, beams = "beam_topk", tuple(logits.shape[:2])
    given = [("excluded", excluded, (torch.int64,), 3), ("nodes", nodes, INTEGERS, 2)]
    for name, value, dtypes, dims in given:
        if value is None:
            continue
        check_tensor(op, name, value)
        check_dtype(op, name, value, dtypes)
        must = f"have shape (B, beams{', n' * (dims - 2)}) with (B, beams) = {beams}"
        fits = value.dim() == dims and value.shape[:2] == beams
        check(fits, op, name, must, tuple(value.shape))
        check_device(op, name, value, logits)
    if trie is None:
        return check(nodes is None, op, "nodes", "come with a trie", "no trie")
    if not isinstance(trie, Trie):
        raise TypeError(f"{op}: trie must be a flashkern.Trie, got {type(trie).__name__}")
    check(nodes is not None, op, "nodes", "come with a trie", None)
    must = f"be on device {logits.device}"
    check(trie.device == logits.device, op, "trie", must, trie.device)
    vocab = logits.shape[2]
    most = trie.vocab_size - 1
    check(most < vocab, op, "trie", f"hold tokens below V = {vocab}", most)


# ---- what torch needs beside the kernel ----


@torch.library.register_fake("flashkern::beam_topk")
def _fake(
    logits: Tensor, beam_scores: Tensor, k: int, *_given: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    tokens = beam_scores.new_empty((rows, k), dtype=torch.int64)
    scores = beam_scores.new_empty((rows, k))
    return scores, tokens, torch.empty_like(tokens), beam_scores.new_empty(logits.shape[:2])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.given = inputs[3] is not None
    ctx.save_for_backward(inputs[0], *output)


def _backward(
    ctx: Any, grad_scores: Tensor | None, _tokens: None, _parents: None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    """d score = d logit - d logsumexp + d beam_score; d logsumexp = softmax . d logits."""
    logits, scores, tokens, parents, lse = ctx.saved_tensors
    grad_scores = torch.zeros_like(scores) if grad_scores is None else grad_scores
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    grad_scores = grad_scores.masked_fill(scores == -torch.inf, 0)
    grad_beams = torch.zeros_like(lse).scatter_add(1, parents, grad_scores)
    grad_lse = grad_lse - grad_beams
    vocab = logits.shape[-1]
    if ctx.given:
        grad_logits = logits.new_zeros(logits.shape, dtype=lse.dtype)
    else:
        softmax = (logits - lse.unsqueeze(-1)).exp()
        softmax = softmax.masked_fill(lse.unsqueeze(-1) == -torch.inf, 0)
        grad_logits = softmax * grad_lse.unsqueeze(-1)
    chosen = (parents * vocab + tokens).clamp(min=0)  # token -1: nobody, whose gradient is 0
    grad_logits = grad_logits.flatten(1).scatter_add(1, chosen, grad_scores).view(logits.shape)
    grads = (grad_logits.to(logits.dtype), grad_beams, None, grad_lse if ctx.given else None)
    return *grads, None, None, None, None


_topk = register_autograd(_ops.ops.beam_topk.default, _backward, _setup)


@torch.library.register_vmap("flashkern::beam_topk")
def _vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    logits: Tensor,
    beam_scores: Tensor,
    k: int,
    *given: Tensor | None,
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Rows are independent: the mapped dimension joins the batch. A trie serves all rows."""
    size = info.batch_size
    if any(dim is not None for dim in in_dims[6:]):
        raise NotImplementedError("beam_topk: a trie cannot be mapped by vmap")

    def join(value: Tensor, dim: int | None) -> Tensor:
        value = value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
        return value.flatten(0, 1)

    flat = join(logits, in_dims[0])
    if flat.stride(-1) != 1 and flat.shape[-1] > 1:
        flat = flat.contiguous()
    scores = join(beam_scores, in_dims[1]).contiguous()
    rows = [
        None if value is None else join(value, dim).contiguous()
        for value, dim in zip(given[:3], in_dims[3:6], strict=True)
    ]
    out = _ops.ops.beam_topk(flat, scores, k, *rows, *given[3:])
    return tuple(value.unflatten(0, (size, -1)) for value in out), (0, 0, 0, 0)


# ---- shards of a vocabulary ----


def merge_topk(
    parts: Sequence[BeamTopK],
    *,
    offsets: Sequence[int] | None = None,
    renormalize: bool = True,
) -> BeamTopK:
    """Merges the :func:`beam_topk` of shards of a vocabulary into that of the whole, exactly.

    A beam's log-sum-exp is that of its shards' log-sum-exps: ``joint = logsumexp(part.logsumexp)``.
    A shard's own choice rests on its own log-sum-exp, which lifts the beams that it holds little
    of, so it can leave out candidates of the joint choice. Two ways out:

    - ``renormalize=False``: every part was taken with ``beam_topk(..., logsumexp=joint)``. The
      merge is a selection and nothing else: bit for bit what ``beam_topk(whole, ...,
      logsumexp=joint)`` gives. Each shard reads its logits twice, the first time for
      ``beam_topk(shard, beam_scores, 1).logsumexp``.
    - ``renormalize=True``: parts with their own logsumexp. A score becomes
      ``score + (part.logsumexp - joint)``, in float32 as written. The best that a part can have
      left out is its last score plus its greatest such correction; where that is above the merged
      k-th score, the merge cannot be known to be exact and is refused. One beam always passes.

    Args:
        parts: one BeamTopK for each shard, over the same rows and beams, in the vocabulary's order.
            Each holds its k best, or all its candidates when those are fewer. The result has as
            many as the longest part.
        offsets: each shard's first token. None: the parts' tokens are those of the whole already.
        renormalize: see above.

    Returns:
        A :class:`BeamTopK` with the joint logsumexp, ordered as :func:`beam_topk` orders.

    Raises:
        ValueError: no parts, shapes that differ, or a choice that the parts cannot prove.

    Example:
        >>> import torch, flashkern as fk
        >>> logits, scores = torch.randn(2, 3, 100), torch.zeros(2, 3)
        >>> shards = logits.split(50, dim=-1)
        >>> lses = [fk.beam_topk(shard, scores, 1).logsumexp for shard in shards]
        >>> joint = torch.stack(lses).logsumexp(0)
        >>> parts = [fk.beam_topk(shard, scores, 6, logsumexp=joint) for shard in shards]
        >>> merged = fk.merge_topk(parts, offsets=[0, 50], renormalize=False)
        >>> torch.equal(merged.tokens, fk.beam_topk(logits, scores, 6, logsumexp=joint).tokens)
        True
    """
    _check_parts(parts, offsets)
    merged, proven = merge_parts(parts, offsets, renormalize)
    must = "be taken with a joint logsumexp (see renormalize=False) or hold more candidates"
    check(proven, "merge_topk", "parts", must, "a choice they cannot prove")
    return merged


def merge_parts(
    parts: Sequence[BeamTopK], offsets: Sequence[int] | None, renormalize: bool
) -> tuple[BeamTopK, bool]:
    """The merged parts, and whether they prove it: see :func:`merge_topk`."""
    shifts = [0] * len(parts) if offsets is None else offsets
    tokens = torch.cat([p.tokens + shift for p, shift in zip(parts, shifts, strict=True)], 1)
    nobody = torch.cat([part.tokens < 0 for part in parts], 1)  # comes behind all that score -inf
    tokens = tokens.masked_fill(nobody, -1)
    parents = torch.cat([part.parents for part in parts], 1)
    joint = parts[0].logsumexp
    part_scores = [part.scores for part in parts]
    if renormalize:
        joint = torch.stack([part.logsumexp for part in parts]).logsumexp(0)
        corrections = [_correction(part.logsumexp, joint) for part in parts]
        part_scores = [
            part.scores + correction.gather(1, part.parents)
            for part, correction in zip(parts, corrections, strict=True)
        ]
    scores = torch.cat(part_scores, 1)
    k = max(part.scores.shape[1] for part in parts)
    order = tokens.argsort(dim=1, stable=True)
    beams = parents.masked_fill(nobody, joint.shape[1])
    order = order.gather(1, beams.gather(1, order).argsort(dim=1, stable=True))
    by_score = scores.gather(1, order).argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, by_score)[:, :k]
    merged = scores.gather(1, order)
    proven = True
    if renormalize and joint.shape[1] > 1:
        for part, correction in zip(parts, corrections, strict=True):
            left_out = part.scores[:, -1] + correction.amax(1)
            beyond = (left_out > merged[:, -1]) | left_out.isnan()  # NaN ranks above all numbers
            proven = proven and not bool(beyond.any())
    best = BeamTopK(merged, tokens.gather(1, order), parents.gather(1, order), joint)
    return best, proven


def _correction(own: Tensor, joint: Tensor) -> Tensor:
    """own - joint, and 0 where neither holds anything."""
    return torch.where(own == joint, 0.0, own - joint)


def _check_parts(parts: Sequence[BeamTopK], offsets: Sequence[int] | None) -> None:
    op = "merge_topk"
    for part in parts:
        if not isinstance(part, BeamTopK):
            raise TypeError(f"{op}: parts must hold BeamTopK, got {type(part).__name__}")
    check(len(parts) > 0, op, "parts", "hold one BeamTopK for each shard", "none")
    shape = parts[0].logsumexp.shape
    for part in parts:
        same = part.logsumexp.shape == shape
        check(same, op, "parts", f"share (B, beams) = {tuple(shape)}", tuple(part.logsumexp.shape))
    if offsets is not None:
        count = len(offsets)
        check(count == len(parts), op, "offsets", f"have {len(parts)} entries", count)
