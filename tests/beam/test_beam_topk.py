"""beam_topk: against float64, and bit for bit against its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import flashkern as fk
from flashkern import reference

INF, NAN = torch.inf, torch.nan
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]
# (batch, beams, V, k): one element, chunk borders (512), lanes (16) and their neighbours, primes,
# k of all, k above the number of chunks, several slices of 16384.
SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 1, 3),
    (1, 2, 15, 7),
    (2, 1, 16, 16),
    (1, 3, 17, 51),
    (2, 4, 511, 8),
    (1, 4, 512, 2048),
    (3, 2, 513, 4),
    (1, 5, 1009, 64),
    (2, 16, 3001, 32),
    (1, 2, 40007, 16),
]


def rank_by_definition(logits: Tensor, scores: Tensor, k: int, result: fk.BeamTopK) -> bool:
    """Whether it is the definition's bit for bit, with sums of exponentials within 8 ulp."""
    x = logits.float()
    shift = x.amax(-1, keepdim=True)
    total = (x.double() - shift).exp().sum(-1, keepdim=True).float()
    table = torch.full_like(x, NAN)
    found = torch.zeros_like(scores, dtype=torch.bool)
    for ulps in range(8, -9, -1):  # the lowest scores that fit: weak for beams without a choice
        nearby = (total.view(torch.int32) + ulps).view(torch.float32)
        candidate = ((x - shift) - nearby.double().log().float()) + scores.unsqueeze(-1)
        chosen = candidate.flatten(1).gather(1, result.parents * x.shape[-1] + result.tokens)
        wrong = torch.zeros_like(scores).scatter_add(
            1, result.parents, (chosen != result.scores).float()
        )
        fits = (wrong == 0) & ~found
        table[fits], found = candidate[fits], found | fits
    best, index = table.flatten(1).sort(dim=-1, descending=True, stable=True)
    flat = result.parents * x.shape[-1] + result.tokens
    return torch.equal(best[:, :k], result.scores) and torch.equal(index[:, :k], flat)


def check(logits: Tensor, beam_scores: Tensor, k: int) -> fk.BeamTopK:
    """Holds one call against float64: error, order, and the choice."""
    result = fk.beam_topk(logits, beam_scores, k)
    exact = reference.beam_topk(logits.double(), beam_scores.double(), k)
    torch32 = (logits.float().log_softmax(-1) + beam_scores.unsqueeze(-1)).flatten(1)
    chosen = result.parents * logits.shape[-1] + result.tokens
    own = logits.double().log_softmax(-1) + beam_scores.double().unsqueeze(-1)
    error = (result.scores - own.flatten(1).gather(1, chosen)).abs().max()
    peer = (torch32.topk(k).values - exact[0]).abs().max()
    assert error <= 2 * peer + 1e-6
    torch.testing.assert_close(result.scores.double(), exact[0], atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(result.logsumexp.double(), exact[3], atol=1e-6, rtol=1e-6)
    assert rank_by_definition(logits, beam_scores, k, result)
    return result


def equal(a: fk.BeamTopK, b: Any) -> bool:
    return all(torch.equal(x.nan_to_num(7e7), y.nan_to_num(7e7)) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    *logits, k = shape
    check((torch.randn(logits) * 3).to(dtype), torch.randn(logits[:2]), k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    beams=st.integers(1, 6),
    vocab=st.integers(1, 1200),
    fraction=st.floats(0, 1),
    spread=st.sampled_from([0.0, 0.01, 3.0, 300.0]),
    seed=st.integers(0, 99),
)
def test_any_shape(
    dtype: torch.dtype,
    batch: int,
    beams: int,
    vocab: int,
    fraction: float,
    spread: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    logits = (torch.randn(batch, beams, vocab) * spread).to(dtype)
    scores = torch.randn(batch, beams) * 2
    k = max(1, round(fraction**3 * beams * vocab))
    result = fk.beam_topk(logits, scores, k)
    exact = reference.beam_topk(logits.double(), scores.double(), k)
    torch.testing.assert_close(result.scores.double(), exact[0], atol=3e-6, rtol=1e-6)
    assert rank_by_definition(logits, scores, k, result)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 8, 300, 2048])
@pytest.mark.parametrize(
    "values",
    ["equal", "two", "coarse", "ascending", "descending", "spike", "borders", "common_bits"],
)
def test_adversaries(backend: str, values: str, k: int, dtype: torch.dtype) -> None:
    """Bit for bit with the definition, at a joint log-sum-exp, where every bit is defined."""
    logits = _adversary(values).to(dtype)
    scores = torch.tensor([[0.0, 0.0, -0.5], [-1e9, 0.0, -1e9]])
    lse = torch.full((2, 3), 3.25)
    result = fk.beam_topk(logits, scores, k, logsumexp=lse)
    assert equal(result, reference.beam_topk(logits, scores, k, lse))
    assert rank_by_definition(logits, scores, k, fk.beam_topk(logits, scores, k))


def test_one_step_above_the_kth(backend: str) -> None:
    """Where candidates outgrow their room the k best stay; any value above still wins."""
    logits = torch.full((1, 1, 64 * 512), 1.5)
    logits[0, 0, : 10 * 512 : 2] = 2.0  # 2560 candidates in ten chunks, 63 chunks above the rest
    logits[0, 0, -512:] = 0.0
    winner = 40 * 512 + 7
    logits[0, 0, winner] = torch.tensor(2.0).nextafter(torch.tensor(INF))
    zero = torch.zeros(1, 1)
    result = fk.beam_topk(logits, zero, 64, logsumexp=zero)
    assert equal(result, reference.beam_topk(logits, zero, 64, zero))
    assert result.tokens[0, :3].tolist() == [winner, 0, 2]


def _adversary(values: str) -> Tensor:
    shape, vocab = (2, 3, 5003), 5003
    if values == "equal":
        return torch.full(shape, 1.5)
    if values == "two":
        return torch.randint(0, 2, shape).float()
    if values == "coarse":  # as bfloat16 logits near 16: steps of 1/8
        return (torch.randn(shape) * 16).round() / 8
    if values == "ascending":
        return torch.linspace(-4, 4, vocab).expand(shape).clone()
    if values == "descending":
        return torch.linspace(4, -4, vocab).expand(shape).clone()
    if values == "spike":
        logits = torch.full(shape, -3.0)
        logits[..., -1] = 12.0
        return logits
    if values == "borders":  # equal values on both sides of chunks and of beams
        logits = torch.randn(shape) - 6
        logits[..., [0, 511, 512, 1023, 1024, 4607, 4608, 5002]] = 2.0
        return logits
    return 1.0 + torch.rand(shape) * 2**-7


def test_threads_give_the_same_bits(threads: None) -> None:
    for shape, k in (((1, 4, 70001), 8), ((1, 1, 100003), 700), ((5, 3, 9001), 16)):
        logits, scores = (torch.randn(shape) * 4).round() / 4, torch.zeros(shape[:2])
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results += [fk.beam_topk(logits, scores, k) for _ in range(2)]
        assert all(equal(result, results[0]) for result in results[1:])


def test_rows_do_not_depend_on_their_batch(backend: str) -> None:
    logits, scores = torch.randn(4, 3, 2049), torch.randn(4, 3)
    together = fk.beam_topk(logits, scores, 9)
    for row in range(4):
        one = slice(row, row + 1)
        alone = fk.beam_topk(logits[one], scores[one], 9)
        assert equal(fk.BeamTopK(*(value[one] for value in together)), alone)


def test_vector_isas_share_their_bits() -> None:
    """All ISAs agree but for the last bits of log_sum: with a joint log-sum-exp, exactly."""
    logits, scores = torch.randn(2, 4, 5001) * 5, torch.randn(2, 4)
    lse = logits.logsumexp(-1)
    results = []
    for name in ("portable", "best"):
        fk.cpu_isa(name)
        results.append(fk.beam_topk(logits, scores, 40, logsumexp=lse))
    assert equal(*results)


def test_strides(backend: str) -> None:
    base = torch.randn(3, 7, 4, 1000)
    scores = torch.randn(3, 4)
    last = base[:, -1]  # logits[:, -1]: rows apart
    shifted = base[:, 2, :, 3:-5]  # an odd offset
    expanded = base[:, :1, 0].expand(3, 4, 1000)
    transposed = base[:, 0].transpose(1, 2).contiguous().transpose(1, 2)
    for logits in (last, shifted, expanded, transposed):
        expected = fk.beam_topk(logits.contiguous(), scores, 11)
        assert equal(fk.beam_topk(logits, scores, 11), expected)
    assert equal(fk.beam_topk(last, scores.t().contiguous().t(), 5), fk.beam_topk(last, scores, 5))


def test_large_logits_keep_their_scores(backend: str) -> None:
    logits = torch.randn(1, 2, 3000) + 1e4
    exact = reference.beam_topk(logits.double(), torch.zeros(1, 2).double(), 8)
    result = fk.beam_topk(logits, torch.zeros(1, 2), 8)
    torch.testing.assert_close(result.scores.double(), exact[0], atol=2e-6, rtol=0)


def test_many_beams_many_candidates(backend: str) -> None:
    check(torch.randn(1, 64, 2000) * 3, torch.randn(1, 64) * 0.5, 1024)


def test_first_step_of_a_search(backend: str) -> None:
    """Beams at -1e9: the only live beam gives all; where it has too few, ties have their order."""
    logits = torch.randn(1, 1, 300).expand(1, 4, 300)
    scores = torch.tensor([[0.0, -1e9, -1e9, -1e9]])
    assert fk.beam_topk(logits, scores, 8).parents.eq(0).all()
    result = fk.beam_topk(logits, scores, 302)
    assert result.parents[0, 300:].tolist() == [1, 1]
    assert rank_by_definition(logits, scores, 302, result)


def test_empty_batch(backend: str) -> None:
    result = fk.beam_topk(torch.randn(0, 2, 10), torch.zeros(0, 2), 3)
    assert [tuple(value.shape) for value in result] == [(0, 3), (0, 3), (0, 3), (0, 2)]


def test_float64_is_the_reference() -> None:
    logits, scores = torch.randn(2, 3, 50, dtype=torch.float64), torch.randn(2, 3).double()
    assert equal(fk.beam_topk(logits, scores, 5), reference.beam_topk(logits, scores, 5))
