"""What the GPU kernel does differently from the CPU's: splits, addresses, workspace, overflow."""

from __future__ import annotations

import pytest
import torch

import flashkern as fk
from flashkern import _host, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def same_choice(logits: torch.Tensor, scores: torch.Tensor, k: int) -> fk.BeamTopK:
    """Bit for bit the definition, at a joint log-sum-exp."""
    lse = logits.float().logsumexp(-1)
    result = fk.beam_topk(logits, scores, k, logsumexp=lse)
    for mine, expected in zip(result, reference.beam_topk(logits, scores, k, lse), strict=True):
        assert torch.equal(mine, expected)
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 40000), (1, 1, 70001), (3, 70, 900)], ids=str)
def test_rows_in_several_blocks(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits, scores = (torch.randn(shape) * 3).to(dtype), torch.randn(shape[:2])
    same_choice(logits, scores, 40)
    own = fk.beam_topk(logits, scores, 40)
    exact = logits.double().logsumexp(-1)
    torch.testing.assert_close(own.logsumexp.double(), exact, atol=2e-6, rtol=1e-6)
    for row in range(shape[0]):  # another batch, another cut: the same bits
        one = slice(row, row + 1)
        alone = fk.beam_topk(logits[one].clone(), scores[one], 40)
        assert all(torch.equal(a[one], b) for a, b in zip(own, alone, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_address(backend: str, dtype: torch.dtype) -> None:
    """A row's bits do not depend on where it lies: 16 bytes are 4 or 8 elements."""
    row, scores = (torch.randn(1, 2, 3001) * 3).to(dtype), torch.zeros(1, 2)
    expected = fk.beam_topk(row, scores, 20)
    for offset in range(1, 9):
        buffer = torch.full((2 * 3001 + 2 * offset,), torch.nan, dtype=dtype)
        moved = buffer[offset:-offset].view(1, 2, 3001).copy_(row)
        result = fk.beam_topk(moved, scores, 20)
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize("k", [1, 1600, 2048, 2049, 5999, 6000])
@pytest.mark.parametrize("values", ["random", "equal", "ascending"])
def test_many_candidates(backend: str, values: str, k: int) -> None:
    """More than shared memory holds: the workspace takes the chosen chunks and the candidates."""
    logits = torch.linspace(-3, 3, 6000).view(1, 4, 1500)
    if values != "ascending":
        logits = torch.randn(1, 4, 1500) if values == "random" else torch.ones(1, 4, 1500)
    same_choice(logits, torch.zeros(1, 4), k)


@pytest.mark.parametrize("k", [1, 700, 9000])
def test_many_chunks(backend: str, k: int) -> None:
    """More beams than shared memory holds chunk scores."""
    same_choice(torch.randn(1, 8200, 3), torch.randn(1, 8200), k)


@pytest.mark.parametrize("values", ["random", "equal", "ascending", "masked"])
@pytest.mark.parametrize("k", [3, 1000, 1025])
def test_many_spans(backend: str, values: str, k: int) -> None:
    """So many that they are ranked before their chunks; a beam's lie in two blocks."""
    shape = (1, 700, 4100)  # 2100 spans: the third of a beam holds one chunk
    logits = torch.randint(-40, 40, shape).bfloat16() / 8
    if values == "equal":
        logits = torch.zeros(shape, dtype=torch.bfloat16)
    if values == "ascending":
        logits = torch.linspace(-3, 3, logits.numel()).view(shape).bfloat16()
    if values == "masked":
        logits[:, 5:] = -torch.inf
        logits[:, :5, : -k // 10] = -torch.inf
    scores = torch.randint(-3, 1, shape[:2]).float()
    result = same_choice(logits, scores, k)
    again = fk.beam_topk(logits.clone(), scores, k, logsumexp=logits.float().logsumexp(-1))
    assert all(torch.equal(a, b) for a, b in zip(result, again, strict=True))
    own = fk.beam_topk(logits, scores, k).logsumexp.double()
    torch.testing.assert_close(own, logits.double().logsumexp(-1), atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [4, 64, 1024])
def test_ties_everywhere(backend: str, k: int, dtype: torch.dtype) -> None:
    """Few different logits: far more candidates tie than fit, in every chunk."""
    logits = torch.randint(0, 3, (2, 4, 9000)).to(dtype)
    same_choice(logits, torch.tensor([[0.0, 1.0, 0.0, 1.0], [-1e9, 0.0, -1e9, 0.0]]), k)


def test_tensors_on_two_devices(backend: str) -> None:
    """The operator by itself, which nothing in Python guards: a host's pointer is no GPU's."""
    if backend != "cuda":
        pytest.skip("all tensors are on one device")
    logits, scores = torch.randn(1, 2, 50), torch.zeros(1, 2)
    for options in ((scores.cpu(), 4), (scores, 4, scores.cpu())):
        with pytest.raises(RuntimeError, match=r"must be float32, .* and device"):
            torch.ops.flashkern.beam_topk(logits, *options)


def test_plan() -> None:
    """One block for each row where there are many, else about eight waves; no idle split."""
    many = _host.beam_topk_gpu_plan(4096, 1, 128256, 8, True, processors=132)
    assert (many["splits"], many["blocks"]) == (1, 4096)
    few = _host.beam_topk_gpu_plan(1, 4, 128256, 8, True, processors=132)
    assert (few["row_spans"], few["split_spans"], few["splits"]) == (252, 16, 16)
    for batch, beams, vocab, k in [(1, 1, 1, 1), (3, 512, 8192, 1024), (9, 7, 50257, 99)]:
        plan = _host.beam_topk_gpu_plan(batch, beams, vocab, k, False, processors=108)
        spans, each = plan["row_spans"], plan["split_spans"]
        assert each % 16 == 0 and plan["splits"] == -(-spans // each)
        assert plan["blocks"] == batch * plan["splits"]
        assert plan["capacity"] >= 2 * k and plan["chosen_limit"] <= k + k // 8
        assert plan["ticket_bytes"] % 256 == 0
        assert plan["ticket_bytes"] >= 4 * batch * (1 + beams)  # of rows and of beams
        assert plan["in_shared_memory"]
    large = _host.beam_topk_gpu_plan(2, 8, 40000, 5000, True, processors=132)
    assert not large["in_shared_memory"] and large["capacity"] == 16384
    assert large["workspace_bytes"] > 2 * 8 * large["capacity"]
    for k, lists in [(1, True), (1024, True), (1100, False), (5000, False)]:
        spans = _host.beam_topk_gpu_plan(1, 4, 600 * 2048, k, True, processors=132)
        assert spans["row_spans"] == 2400 and spans["lists_spans"] == lists
    assert not _host.beam_topk_gpu_plan(1, 4, 512 * 2048, 1, True, processors=132)["lists_spans"]
    with pytest.raises(ValueError, match="2\\^30 beams"):
        _host.beam_topk_gpu_plan(1, 2**30 + 1, 3, 1, True, processors=132)
    with pytest.raises(ValueError, match="k must be at most 2\\^30"):
        _host.beam_topk_gpu_plan(1, 2, 2**30, 2**30 + 1, True, processors=132)


def test_the_last_of_many_spans(backend: str) -> None:
    """Spans are ranked by fours: the last four of 2049 are one."""
    logits, scores = torch.randn(1, 2049, 8), torch.zeros(1, 2049)
    scores[0, -1] = 10
    assert same_choice(logits, scores, 3).parents.eq(2048).all()


def test_the_first_span_of_every_beam(backend: str) -> None:
    """Where a beam has more spans than a warp has lanes, its end is the next one's start."""
    logits = torch.randn(1, 3, 2048 * 33 + 5)
    logits[0, :, 7] = 40
    assert same_choice(logits, torch.zeros(1, 3), 3).tokens.eq(7).all()
