"""beam_topk as a citizen of torch: gradients, fake tensors, vmap, compile; and its messages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flashkern as fk
from flashkern import reference


def arguments(dtype: torch.dtype = torch.float32, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 70, **kwargs).to(dtype), torch.randn(2, 3)


def gradients(function: Any, *inputs: Tensor) -> list[Tensor]:
    """The gradients of a weighted sum of scores and logsumexp."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    result = function(*leaves)
    scores, lse = result[0], result[3]
    weights = torch.linspace(-1, 2, scores.numel()).view_as(scores).to(scores)
    loss = (scores * weights).sum() + (lse * lse.detach().nan_to_num(neginf=0).sin()).sum()
    return list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients(backend: str, dtype: torch.dtype) -> None:
    logits, scores = arguments(dtype)
    ours = gradients(lambda x, s: fk.beam_topk(x, s, 9), logits, scores)
    exact = gradients(lambda x, s: reference.beam_topk(x, s, 9), logits.double(), scores.double())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for mine, reference_ in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), reference_, atol=tolerance, rtol=tolerance)
    assert ours[0].dtype == dtype


def test_gradients_with_a_given_logsumexp(backend: str) -> None:
    inputs = (*arguments(), torch.randn(2, 3))
    ours = gradients(lambda x, s, lse: fk.beam_topk(x, s, 9, logsumexp=lse), *inputs)
    doubles = [x.double() for x in inputs]
    exact = gradients(lambda x, s, lse: reference.beam_topk(x, s, 9, lse), *doubles)
    for mine, reference_ in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), reference_, atol=1e-5, rtol=1e-5)


def test_gradients_of_masked_logits_are_finite(backend: str) -> None:
    logits, scores = arguments()
    logits[0, 1], logits[1, :, 5:] = -torch.inf, -torch.inf
    grad_logits, grad_scores = gradients(lambda x, s: fk.beam_topk(x, s, 20), logits, scores)
    assert grad_logits.isfinite().all() and grad_scores.isfinite().all()
    assert grad_logits[0, 1].eq(0).all() and grad_logits[1, :, 5:].eq(0).all()


def test_gradcheck() -> None:
    logits, scores = arguments(torch.float64)
    inputs = (logits.requires_grad_(), scores.double().requires_grad_())
    assert torch.autograd.gradcheck(lambda x, s: fk.beam_topk(x, s, 7)[0::3], inputs)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype, given: bool) -> None:
    logits, scores = arguments(dtype)
    lse = torch.randn(2, 3, requires_grad=True) if given else None
    inputs = (logits.requires_grad_(), scores.requires_grad_(), 5, lse)
    torch.library.opcheck(torch.ops.flashkern.beam_topk.default, inputs)


def test_compile_fullgraph() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(logits: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        best = fk.beam_topk(logits * 2, scores, 6)
        return best.scores + 1, best.tokens

    logits, scores = arguments()
    best = fk.beam_topk(logits * 2, scores, 6)
    compiled = step(logits, scores)
    assert torch.equal(compiled[0], best.scores + 1) and torch.equal(compiled[1], best.tokens)
    leaf = logits.clone().requires_grad_()
    step(leaf, scores)[0].sum().backward()
    expected = gradients_of_sum(logits, scores)
    torch.testing.assert_close(leaf.grad, expected)


def gradients_of_sum(logits: Tensor, scores: Tensor) -> Tensor:
    leaf = logits.clone().requires_grad_()
    fk.beam_topk(leaf * 2, scores, 6).scores.sum().backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("dims", [(0, 0), (0, None), (None, 0), (2, 1)])
def test_vmap(dims: tuple[int | None, int | None]) -> None:
    def sized(shape: tuple[int, ...], dim: int | None) -> Tensor:
        return torch.randn(shape if dim is None else (*shape[:dim], 4, *shape[dim:]))

    logits, scores = sized((2, 3, 50), dims[0]), sized((2, 3), dims[1])
    mapped = torch.vmap(lambda x, s: tuple(fk.beam_topk(x, s, 5)), in_dims=dims)(logits, scores)
    for i in range(4):
        x = logits if dims[0] is None else logits.select(dims[0], i)
        s = scores if dims[1] is None else scores.select(dims[1], i)
        for mine, expected in zip(mapped, fk.beam_topk(x, s, 5), strict=True):
            assert torch.equal(mine[i], expected)


def test_meta() -> None:
    logits, scores = (x.to("meta") for x in arguments())
    result = fk.beam_topk(logits, scores, 5)
    assert result.scores.shape == (2, 5) and result.tokens.dtype == torch.int64


def test_inference_mode() -> None:
    with torch.inference_mode():
        logits, scores = arguments()
        assert fk.beam_topk(logits, scores, 4).scores.shape == (2, 4)


def test_plan() -> None:
    from flashkern import _host

    plan = _host.beam_topk_plan(batch=1, beams=4, vocab=128256, k=8, half=False, threads=8)
    assert plan["threads"] == 8 and plan["scan_tasks"] >= 8
    assert plan["read_bytes"] == 4 * 128256 * 4 + 4 * 4
    assert plan["workspace_bytes"] < plan["read_bytes"] / 100


X, S = torch.zeros(2, 3, 10), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("error", "message", "args", "kwargs"),
    [
        (TypeError, "logits must be a tensor, got list", ([1.0], S, 1), {}),
        (TypeError, "logits must have dtype float32, .*, got int64", (X.long(), S, 1), {}),
        (TypeError, "beam_scores must have dtype float32, got float64", (X, S.double(), 1), {}),
        (TypeError, "beam_scores must have dtype float64", (X.double(), S, 1), {}),
        (TypeError, "logsumexp must have dtype float32", (X, S, 1), {"logsumexp": S.bfloat16()}),
        (ValueError, r"logits must have shape \(B, beams, V\)", (X[0], S, 1), {}),
        (ValueError, r"beam_scores must have .*\(2, 3\), got \(2, 2\)", (X, S[:, 1:], 1), {}),
        (ValueError, r"logsumexp must have .* got \(3,\)", (X, S, 1), {"logsumexp": S[0]}),
        (ValueError, "k must be between 1 and beams \\* V = 30, got 31", (X, S, 31), {}),
        (ValueError, "k must be between 1 and beams \\* V = 30, got 0", (X, S, 0), {}),
        (ValueError, "k must be between 1 and beams \\* V = 0", (X[..., :0], S, 1), {}),
        (ValueError, "beam_scores must be on the logits' device", (X.to("meta"), S, 1), {}),
        (
            NotImplementedError,
            r"beams \* V must be below 2\*\*32",
            (torch.zeros(1).expand(1, 2**12, 2**20), torch.zeros(1, 2**12), 1),
            {},
        ),
    ],
)
def test_messages(error: Any, message: str, args: tuple[Any, ...], kwargs: Any) -> None:
    with pytest.raises(error, match="beam_topk: " + message):
        fk.beam_topk(*args, **kwargs)
