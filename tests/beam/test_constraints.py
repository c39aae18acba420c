"""beam_topk under constraints: excluded tokens and the children of a trie's nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from constraints import DTYPES, drawn, random_excluded, random_trie
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import flashkern as fk
from flashkern import reference
from flashkern.beam import Trie

INF, NAN = torch.inf, torch.nan
NOBODY = (-INF, -1, 0)  # score, token, parent


def same(
    logits: Tensor, scores: Tensor, k: int, lse: Tensor | None = None, **constraints: Any
) -> fk.BeamTopK:
    """The definition's choice, bit for bit, at a joint log-sum-exp; the kernel's own beside it."""
    joint = logits.float().logsumexp(-1).nan_to_num(neginf=0.0) if lse is None else lse
    result = fk.beam_topk(logits, scores, k, logsumexp=joint, **constraints)
    wanted = reference.beam_topk(logits, scores, k, joint, **constraints)
    for mine, theirs in zip(result, wanted, strict=True):
        assert torch.equal(mine.nan_to_num(7e7), theirs.nan_to_num(7e7))
    own = fk.beam_topk(logits, scores, k, **constraints)
    free = fk.beam_topk(logits, scores, 1)
    assert torch.equal(own.logsumexp.nan_to_num(7e7), free.logsumexp.nan_to_num(7e7))
    exact = reference.beam_topk(logits, scores, k, **constraints)
    torch.testing.assert_close(own.scores, exact[0], atol=4e-6, rtol=1e-6, equal_nan=True)
    legal = reference.allowed_tokens(logits, **{"excluded": None, **constraints})
    chosen = (own.parents * logits.shape[-1] + own.tokens).clamp(min=0)
    assert (legal.flatten(1).gather(1, chosen) | (own.tokens < 0)).all()
    return result


def places(result: fk.BeamTopK, row: int = 0) -> list[tuple[float, int, int]]:
    return list(zip(*(value[row].tolist() for value in result[:3]), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["excluded", "trie", "both"])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1),
        (2, 3, 17, 9),
        (1, 2, 512, 40),
        (3, 4, 513, 8),
        (2, 5, 1009, 300),
        (1, 3, 2049, 64),
        (1, 2, 20011, 16),
    ],
    ids=str,
)
def test_shapes(backend: str, shape: Sequence[int], kind: str, dtype: torch.dtype) -> None:
    batch, beams, vocab, k = shape
    logits = (torch.randn(batch, beams, vocab) * 3).to(dtype)
    constraints = drawn(batch, beams, vocab, kind, 50)
    same(logits, torch.randn(batch, beams), k, **constraints)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    beams=st.integers(1, 6),
    vocab=st.integers(1, 1200),
    count=st.integers(0, 400),
    kind=st.sampled_from(["excluded", "trie", "both"]),
    fraction=st.floats(0, 1),
    coarse=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape(
    batch: int, beams: int, vocab: int, count: int, kind: str, fraction: float, coarse: bool,
    seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    logits = torch.randn(batch, beams, vocab)
    k = max(1, round(fraction**3 * beams * vocab))
    constraints = drawn(batch, beams, vocab, kind, count)
    same(logits.round() if coarse else logits, torch.randn(batch, beams), k, **constraints)


@pytest.mark.parametrize("k", [1, 8, 300, 2048])
@pytest.mark.parametrize("values", ["equal", "coarse", "ascending"])
@pytest.mark.parametrize("kind", ["excluded", "trie", "both"])
def test_ties_and_adversaries(backend: str, kind: str, values: str, k: int) -> None:
    """Far more candidates tie than fit: the order still is beam, then token."""
    logits = torch.linspace(-3, 3, 5003).expand(2, 3, 5003)
    if values != "ascending":
        logits = torch.randn(2, 3, 5003).round() if values == "coarse" else torch.ones(2, 3, 5003)
    constraints = drawn(2, 3, 5003, kind, 700)
    if "nodes" in constraints:  # the root, and what few it has
        constraints["nodes"] = torch.tensor([[0, 0, -1], [0, 1, 0]])
    lse = torch.full((2, 3), 3.25)
    same(logits, torch.tensor([[0.0, 0.0, -0.5], [-1e9, 0.0, -1e9]]), k, lse, **constraints)


def test_excluded_tokens_do_not_raise_the_threshold(backend: str) -> None:
    """The best token of nearly every chunk is excluded: chunks must be ranked without it."""
    vocab = 40 * 512
    logits = torch.rand(1, 2, vocab)
    peaks = torch.arange(40) * 512 + torch.arange(40) * 7
    logits[..., peaks] = 50.0
    excluded = peaks[:-1].expand(1, 2, 39)
    result = same(logits, torch.zeros(1, 2), 30, torch.zeros(1, 2), excluded=excluded)
    assert result.tokens[0, :2].tolist() == [int(peaks[-1])] * 2
    assert (result.scores[0, 2:] < 2).all() and (result.tokens >= 0).all()


@pytest.mark.parametrize("value", [NAN, INF])
def test_an_excluded_token_may_be_nan(backend: str, value: float) -> None:
    """With a joint log-sum-exp it harms nobody; else its beam is NaN, as without constraints."""
    logits, scores = torch.randn(1, 2, 1100), torch.zeros(1, 2)
    logits[0, 1, 700], logits[0, 1, 701] = value, -INF
    excluded = torch.tensor([[[-1, -1], [700, 700]]])
    result = same(logits, scores, 12, torch.ones(1, 2), excluded=excluded)
    assert result.scores.isfinite().all()
    own = fk.beam_topk(logits, scores, 1000, excluded=excluded)
    assert own.scores.isnan().all() and not (own.tokens == 700).any()


def test_an_allowed_token_may_be_nan(backend: str) -> None:
    logits = torch.randn(1, 2, 1100)
    logits[0, 1, 700] = NAN
    trie = Trie.from_sequences([[3], [700], [900]])
    nodes, excluded = torch.zeros(1, 2, dtype=torch.int64), torch.tensor([[[900], [900]]])
    result = same(logits, torch.zeros(1, 2), 4, torch.ones(1, 2), trie=trie, nodes=nodes)
    assert (result.tokens[0, 0], result.parents[0, 0]) == (700, 1)
    same(logits, torch.zeros(1, 2), 4, torch.ones(1, 2), excluded=excluded)


def test_fewer_children_than_k(backend: str) -> None:
    """All that are allowed, -inf logits among them, and nobody behind them."""
    logits = torch.zeros(1, 2, 1500)
    logits[0, 0, 3], logits[0, 1, 1400] = -INF, 1.0
    trie = Trie.from_sequences([[3], [1400]])
    nodes = torch.zeros(1, 2, dtype=torch.int32)
    options: dict[str, Any] = {"trie": trie, "nodes": nodes}
    result = same(logits, torch.zeros(1, 2), 7, torch.zeros(1, 2), **options)
    wanted = [(1.0, 1400, 1), (0.0, 1400, 0), (0.0, 3, 1), (-INF, 3, 0), NOBODY, NOBODY, NOBODY]
    assert places(result) == wanted


@pytest.mark.parametrize("vocab", [5, 512, 1300])
@pytest.mark.parametrize("k", [1, 5])
def test_all_excluded(backend: str, vocab: int, k: int) -> None:
    logits = torch.randn(2, 2, vocab)
    excluded = torch.arange(vocab).expand(2, 2, vocab).clone()
    assert places(same(logits, torch.zeros(2, 2), k, excluded=excluded)) == [NOBODY] * k
    excluded[1, 1, 2] = -1
    result = same(logits, torch.zeros(2, 2), k, excluded=excluded)
    assert result.tokens[1].tolist() == [2] + [-1] * (k - 1) and result.parents[1, 0] == 1


def test_nothing_is_allowed_behind_a_row(backend: str) -> None:
    """A last chunk of 40 tokens, all excluded, has no candidate: others of -inf are."""
    logits, token = torch.full((1, 9, 552), -INF), 7
    excluded = torch.tensor([t for t in range(552) if t != token]).expand(1, 9, 551)
    result = same(logits, torch.zeros(1, 9), 6, torch.zeros(1, 9), excluded=excluded)
    assert places(result) == [(-INF, token, beam) for beam in range(6)]


def test_no_node_no_candidate(backend: str) -> None:
    logits, trie = torch.randn(2, 3, 700), random_trie(700, 90)
    nodes = torch.full((2, 3), -1)
    assert places(same(logits, torch.zeros(2, 3), 4, trie=trie, nodes=nodes)) == [NOBODY] * 4
    nodes[0, 1] = 0
    result = same(logits, torch.zeros(2, 3), 4, trie=trie, nodes=nodes)
    assert result.parents[0].eq(1).all() and result.tokens[1].eq(-1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_beams(backend: str, dtype: torch.dtype) -> None:
    """A search of 512 beams over codes below 8192, at the root and one level on."""
    codes = torch.randint(0, 8192, (20000, 4))
    codes[:, 0] %= 64
    trie = Trie.from_sequences(codes)
    logits, scores = torch.randn(1, 512, 8192).to(dtype), torch.randn(1, 512)
    nodes = torch.randint(1, 65, (1, 512))
    result = same(logits, scores, 512, trie=trie, nodes=nodes)
    assert (trie.advance(nodes.gather(1, result.parents), result.tokens) > 0).all()
    nodes[0, 9:] = 0
    same(logits, scores, 1024, trie=trie, nodes=nodes)
    same(logits, scores, 512, excluded=random_excluded(1, 512, 8192, 3))


def test_threads_give_the_same_bits(threads: None) -> None:
    logits, scores = (torch.randn(2, 30, 3001) * 4).round() / 4, torch.zeros(2, 30)
    for kind in ("excluded", "trie", "both"):
        constraints = drawn(2, 30, 3001, kind, 400)
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(fk.beam_topk(logits, scores, 90, **constraints))
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_a_search_stays_in_the_trie(backend: str) -> None:
    """Four steps with advance() give whole sequences of the trie, the best first."""
    codes = torch.randint(0, 40, (300, 4)).unique(dim=0)
    trie, steps = Trie.from_sequences(codes), torch.randn(4, 40)
    scores, nodes = torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int64)
    taken = torch.empty(1, 1, 0, dtype=torch.int64)
    for logits in steps:
        beams = scores.shape[1]
        best = fk.beam_topk(
            logits.expand(1, beams, 40), scores, min(400, 40 * beams), trie=trie, nodes=nodes
        )
        nodes = trie.advance(nodes.gather(1, best.parents), best.tokens)
        history = taken.gather(1, best.parents.unsqueeze(2).expand(-1, -1, taken.shape[2]))
        taken, scores = torch.cat([history, best.tokens.unsqueeze(2)], 2), best.scores
    alive = nodes[0] >= 0
    assert int(alive.sum()) == len(codes) and trie.is_leaf(nodes[0][alive]).all()
    assert torch.equal(taken[0][alive].unique(dim=0), codes)
    wanted = steps.log_softmax(-1)[torch.arange(4), codes].sum(1).sort(descending=True).values
    torch.testing.assert_close(scores[0][alive], wanted)


def test_shards_of_constrained_beams(backend: str) -> None:
    """A shard that has too few candidates says so, and the merge believes it."""
    logits, scores, joint = torch.randn(1, 2, 100), torch.zeros(1, 2), torch.ones(1, 2)
    logits[0, 0, 3] = -INF
    excluded = torch.arange(100).expand(1, 2, 100).clone()
    excluded[..., [3, 60, 61]] = -1
    whole = fk.beam_topk(logits, scores, 8, logsumexp=joint, excluded=excluded)
    parts = []
    for first in (0, 50):
        own = torch.where(excluded.div(50, rounding_mode="floor") == first // 50, excluded, -1)
        own = torch.where(own >= 0, own - first, -1)
        shard = logits[..., first : first + 50]
        parts.append(fk.beam_topk(shard, scores, 8, logsumexp=joint, excluded=own))
    merged = fk.merge_topk(parts, offsets=[0, 50], renormalize=False)
    assert all(torch.equal(a, b) for a, b in zip(merged, whole, strict=True))
    assert places(merged)[5:] == [(-INF, 3, 0), NOBODY, NOBODY]


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("kind", ["excluded", "trie"])
def test_any_address(backend: str, kind: str, given: bool) -> None:
    """Odd rows and strides: a chunk's mask knows its tokens, not where they lie."""
    constraints = drawn(2, 3, 1501, kind, 300)
    scores = torch.zeros(2, 3)
    for dtype in DTYPES:
        base = torch.randn(2, 2, 3, 1507).to(dtype)
        logits = base[:, 1, :, 3:1504]
        lse = torch.ones(2, 3) if given else None
        mine = fk.beam_topk(logits, scores, 40, logsumexp=lse, **constraints)
        wanted = fk.beam_topk(logits.contiguous(), scores, 40, logsumexp=lse, **constraints)
        assert all(torch.equal(a, b) for a, b in zip(mine, wanted, strict=True))


def test_indices_out_of_range_are_harmless_on_a_gpu(backend: str) -> None:
    """Nobody reads a GPU's memory to check them: such a node has no children, such a token is none.

    A trie whose parts contradict each other is no better.
    """
    if backend not in ("cuda", "emulated"):
        pytest.skip("a CPU raises")
    logits, scores = torch.randn(1, 4, 1100), torch.zeros(1, 4)
    trie = random_trie(1100, 300)
    nodes, none = torch.tensor([[0, len(trie), -7, 2**40]]), torch.tensor([[0, -1, -1, -1]])
    wild = torch.tensor([3, -1, -2, 1100, 2**40]).expand(1, 4, 5)
    tame = torch.tensor([3]).expand(1, 4, 1)
    result = fk.beam_topk(logits, scores, 9, trie=trie, nodes=nodes, excluded=wild)
    wanted = fk.beam_topk(logits, scores, 9, trie=trie, nodes=none, excluded=tame)
    assert all(torch.equal(a, b) for a, b in zip(result, wanted, strict=True))
    starts = torch.tensor([0, 4, 2, 99, -5], dtype=torch.int32)
    tokens = torch.tensor([7, 7, 5000, -3], dtype=torch.int32)
    nodes = torch.tensor([[0, 1, 2, 3]])
    below = (None, None, nodes, starts, tokens)
    result = fk.BeamTopK(*torch.ops.flashkern.beam_topk.default(logits, scores, 3, *below))
    assert result.tokens.tolist() == [[7, -1, -1]] and result.parents.eq(0).all()


@pytest.mark.parametrize("kind", ["excluded", "trie", "both"])
@pytest.mark.parametrize("k", [7, 900])
def test_many_spans(backend: str, kind: str, k: int) -> None:
    """So many that a GPU ranks spans before chunks; in most of them nothing is allowed."""
    logits = torch.randint(-9, 9, (1, 2070, 600)).bfloat16()
    options = drawn(1, 2070, 600, kind, 3)
    if kind == "both":
        options["nodes"][:, 3:] = -1
    same(logits, torch.randint(-3, 1, (1, 2070)).float(), k, **options)


def test_long_lists(backend: str) -> None:
    """Excluded tokens and children in all chunks of several spans, most of them twice."""
    logits = torch.randn(2, 2, 9001)
    excluded = random_excluded(2, 2, 9001, 12000)
    best = logits.topk(300).indices
    excluded = torch.cat([excluded, best, best], -1).contiguous()
    trie = Trie.from_sequences(torch.arange(1, 9001, 3)[:, None])
    nodes = torch.zeros(2, 2, dtype=torch.int64)
    for options in ({}, {"trie": trie, "nodes": nodes}):
        same(logits, torch.zeros(2, 2), 64, excluded=excluded, **options)
