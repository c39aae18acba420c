"""Elements more than 2^31 elements from the first: strided views give what near copies give."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import flashkern as fk

Far = Callable[[Tensor, int], Tensor]
pytestmark = pytest.mark.long


def draw(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def differentiate(tensors: list[Tensor], direction: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    return torch.autograd.grad(fk.attention(*leaves, causal=True), leaves, direction)


@pytest.mark.kernels("attention_forward")
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "head", "row"])
@pytest.mark.parametrize("rows", [1, 70])
def test_attention(far: Far, backend: str, rows: int, dim: int) -> None:
    near = [draw(2, 2, rows, 64), draw(2, 2, 150, 64), draw(2, 2, 150, 64)]
    distant = [far(t, dim) if t.shape[dim] > 1 else t for t in near]
    for causal in (False, True):
        one, other = (fk.attention(*t, causal=causal, return_lse=True) for t in (near, distant))
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.kernels("attention_backward")
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "head", "row"])
def test_attention_backward(far: Far, backend: str, dim: int) -> None:
    near = [draw(2, 2, 70, 64), draw(2, 2, 250, 64), draw(2, 2, 250, 64), draw(2, 2, 70, 64)]
    distant = [far(t, dim) for t in near]
    one, other = (differentiate(t[:3], t[3]) for t in (near, distant))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.kernels("attention_forward", "attention_append_kv")
@pytest.mark.parametrize("rows", [1, 20])
def test_paged_cache(far: Far, backend: str, rows: int) -> None:
    """Pages beyond the offset take the new tokens and give them back."""
    query, k, v = draw(2, 4, rows, 64), draw(2, 2, rows, 64), draw(2, 2, rows, 64)
    near = [draw(9, 2, 16, 64) for _ in range(2)]
    distant = [far(t, 0) for t in near]
    options = {
        "cache_lengths": torch.tensor([30, 3]),
        "page_table": torch.tensor([[8, 0, 7, 3], [1, 6, 2, 4]]),
        "causal": True,
    }
    one, other = (fk.attention_kvcache(query, *c, k=k, v=v, **options) for c in (near, distant))
    assert torch.equal(one, other)
    assert all(torch.equal(a, b) for a, b in zip(near, distant, strict=True))


@pytest.mark.kernels("beam_topk")
@pytest.mark.parametrize("dim", [0, 1], ids=["batch", "beam"])
def test_beam_topk(far: Far, backend: str, dim: int) -> None:
    logits, scores = draw(2, 3, 5000), torch.randn(2, 3)
    one, other = (fk.beam_topk(x, scores, 20) for x in (logits, far(logits, dim)))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.kernels("beam_topk")
def test_beam_topk_of_more_than_2_to_31_candidates(backend: str) -> None:
    """The flat index of a candidate needs all of its 32 bits."""
    beams, vocab = 2100, 1 << 20
    logits = torch.zeros(vocab, dtype=torch.bfloat16)
    logits[[3, vocab - 1]] = torch.tensor([8.0, 9.0]).bfloat16()
    scores = torch.zeros(1, beams)
    scores[0, [7, 2099]] = torch.tensor([2.0, 5.0])
    best = fk.beam_topk(logits.expand(1, beams, vocab), scores, 4)
    assert best.parents.tolist() == [[2099, 2099, 7, 7]]
    assert best.tokens.tolist() == [[vocab - 1, 3, vocab - 1, 3]]


@pytest.mark.kernels("lora_linear", "lora_linear_backward")
def test_lora_linear(far: Far, backend: str) -> None:
    x, grad = draw(110, 48), draw(110, 32)
    weight, a, b = draw(32, 48), torch.randn(8, 48), torch.randn(32, 8)
    results = []
    for rows, direction in ((x, grad), (far(x, 0), far(grad, 0))):
        leaves = [t.detach().requires_grad_() for t in (rows, a, b)]
        y = fk.lora_linear(leaves[0], weight, *leaves[1:])
        results.append((y, *torch.autograd.grad(y, leaves, direction)))
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)
