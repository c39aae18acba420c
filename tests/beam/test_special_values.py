"""beam_topk where logits or scores are not finite."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import flashkern as fk
from flashkern import reference

INF, NAN = torch.inf, torch.nan


def same(logits: Tensor, scores: Tensor, k: int, lse: Tensor | None = None) -> fk.BeamTopK:
    """The kernel's choice is the definition's, non-finite scores included."""
    result = fk.beam_topk(logits, scores, k, logsumexp=lse)
    best, tokens, parents, own = reference.beam_topk(logits, scores, k, lse)
    torch.testing.assert_close(result.scores, best, atol=2e-6, rtol=1e-6, equal_nan=True)
    torch.testing.assert_close(result.logsumexp, own, atol=2e-6, rtol=1e-6, equal_nan=True)
    assert torch.equal(result.tokens, tokens)
    assert torch.equal(result.parents, parents)
    return result


@pytest.mark.parametrize("left", [0, 1, 5, 7])
def test_masked_logits_come_last(backend: str, left: int) -> None:
    """Fewer allowed tokens than k: -inf fills the rest in the order of beam and token."""
    logits = torch.full((2, 3, 1500), -INF)
    allowed = torch.tensor([3, 600, 601, 1024, 1499, 10, 900])[:left]
    logits[:, 1, allowed] = torch.randn(2, left)
    result = same(logits, torch.zeros(2, 3), 7)
    assert result.scores.isfinite().sum().item() == 2 * left
    filled = [(0, token) for token in range(7 - left)]
    for row in range(2):
        pairs = zip(result.parents[row].tolist(), result.tokens[row].tolist(), strict=True)
        assert list(pairs)[left:] == filled


def test_masked_beam(backend: str) -> None:
    logits = torch.randn(1, 3, 700)
    logits[0, 1] = -INF
    result = same(logits, torch.zeros(1, 3), 1400)
    assert result.logsumexp[0, 1] == -INF
    assert not (result.parents == 1).any()


@pytest.mark.parametrize("value", [INF, NAN])
@pytest.mark.parametrize("token", [0, 515, 699])
def test_nan_and_inf_win(backend: str, value: float, token: int) -> None:
    """One such logit makes its beam NaN, as log_softmax does; NaN ranks first, as in topk."""
    logits = torch.randn(1, 3, 700)
    logits[0, 1, token] = value
    logits[0, 1, 4] = -INF  # stays out
    result = same(logits, torch.zeros(1, 3), 8)
    assert result.scores.isnan().all()
    assert result.parents.tolist() == [[1] * 8]
    assert result.tokens.tolist() == [[0, 1, 2, 3, 5, 6, 7, 8]]
    log_probs = logits.log_softmax(-1).flatten(1)
    assert log_probs.topk(8).values.isnan().all()


def test_all_nan_chunk(backend: str) -> None:
    logits = torch.randn(1, 2, 1100)
    logits[0, 1, 512:1024] = NAN
    same(logits, torch.zeros(1, 2), 5)
    logits[0, 1, 1024:] = -INF
    same(logits, torch.zeros(1, 2), 1090)


def test_nan_beside_masks_only(backend: str) -> None:
    logits = torch.full((1, 2, 40), -INF)
    logits[0, 1, 7] = NAN
    result = same(logits, torch.zeros(1, 2), 3)
    assert result.tokens[0].tolist() == [7, 0, 1]


@pytest.mark.parametrize("value", [INF, NAN, -INF])
def test_given_logsumexp(backend: str, value: float) -> None:
    logits = torch.randn(1, 3, 600)
    logits[0, 2, [5, 550]] = value
    lse = torch.tensor([[1.0, 2.0, 3.0]])
    result = same(logits, torch.zeros(1, 3), 6, lse)
    if value != -INF:
        assert result.tokens[0, :2].tolist() == [5, 550]


@pytest.mark.parametrize("token", [512, 700, 1020])
def test_one_nan_among_low_logits(backend: str, token: int) -> None:
    """A NaN wins over the greater logits of all other chunks, wherever in its own it stands."""
    logits = torch.randn(1, 1, 40 * 512)
    logits[0, 0, 512:1024] -= 50
    logits[0, 0, token] = NAN
    result = same(logits, torch.zeros(1, 1), 3, torch.ones(1, 1))
    assert result.tokens[0, 0] == token


@pytest.mark.parametrize("value", [INF, NAN, -INF])
def test_beam_scores(backend: str, value: float) -> None:
    logits = torch.randn(1, 3, 600)
    logits[0, 1, ::2] = -INF
    same(logits, torch.tensor([[0.0, value, -2.0]]), 310)
    same(logits, torch.tensor([[value, value, value]]), 1000)


def test_zeros_of_both_signs_tie(backend: str) -> None:
    logits = torch.tensor([[[-0.0, 0.0, -0.0, 0.0]]])
    lse, scores = torch.zeros(1, 1), torch.tensor([[-0.0]])
    result = fk.beam_topk(logits, scores, 4, logsumexp=lse)
    assert result.tokens.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_magnitudes(backend: str, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    logits = torch.tensor([largest, -largest, 0.0, 1e-7, largest]).to(dtype).repeat(130)
    same(logits.view(1, 1, -1), torch.zeros(1, 1), 400)


def steps(chunks: int, rise: float) -> Tensor:
    """Logits around a level that rises from one 512 tokens to the next."""
    return torch.randn(1, 2, chunks * 512) + torch.arange(chunks).repeat_interleave(512) * rise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rise", [-90.0, -21.0, 7.0, 30.0, 100.0])
def test_levels_far_apart(backend: str, rise: float, dtype: torch.dtype) -> None:
    """No exponential overflows or is lost, whichever level comes first."""
    logits = steps(5, rise)
    logits[0, 1, :513] = -INF
    logits = logits.to(dtype)
    same(logits, torch.zeros(1, 2), 9)


@pytest.mark.parametrize("token", [0, 700, 1300, 2000])
def test_nan_among_rising_levels(backend: str, token: int) -> None:
    logits = steps(4, 50.0)
    logits[0, 1, token] = NAN
    result = same(logits, torch.zeros(1, 2), 5)
    assert result.scores.isnan().all() and not result.logsumexp[0, 0].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [100, 5003, 40001])
def test_wider_vectors_give_the_same_bits(isa: str, vocab: int, dtype: torch.dtype) -> None:
    if not isa.startswith("avx512"):
        pytest.skip("for ISAs wider than AVX2")
    logits, scores = (torch.randn(2, 3, vocab) * 5).to(dtype), torch.randn(2, 3)
    wide = fk.beam_topk(logits, scores, 4)
    fk.cpu_isa("avx2")
    narrow = fk.beam_topk(logits, scores, 4)
    assert all(torch.equal(x, y) for x, y in zip(wide, narrow, strict=True))
