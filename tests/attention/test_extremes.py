"""Attention at the ends of the numbers: scores beyond any exponential, NaN where it may stay."""

import pytest
import torch

import flashkern as fk
from tests.attention.test_attention import draw

pytestmark = pytest.mark.kernels("attention_forward", "attention_backward")


@pytest.mark.parametrize("size", [3e4, 5e4, 1e12])
def test_equal_scores_however_large(backend: str, size: float) -> None:
    """The greatest score's exponential is 1, however far a rounding of it reaches."""
    query = torch.full((1, 2, 20, 64), size).bfloat16()
    key, value = torch.full((1, 2, 30, 64), size).bfloat16(), torch.randn(1, 2, 30, 64).bfloat16()
    output, lse = fk.attention(query, key, value, return_lse=True)
    mean = value.float().mean(2, keepdim=True).expand_as(output)
    torch.testing.assert_close(output.float(), mean, atol=4e-3, rtol=1e-2)
    assert lse.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_huge_scores_are_finite(backend: str, dtype: torch.dtype) -> None:
    """The log-sum-exp of scores beyond 2^24 is rounded by more than the exponential can bear."""
    shapes = [(1, 2, n, 32) for n in (20, 30, 30)]
    tensors = [(torch.randn(s) * 3e5).to(dtype).requires_grad_() for s in shapes]
    for extra in ({}, {"alibi_slopes": torch.rand(2)}):
        fk.attention(*tensors, **extra).sum().backward()
        for t in tensors:
            assert t.grad is not None and t.grad.isfinite().all()


def test_infinite_keys_and_values(backend: str) -> None:
    """An infinity in float32 operands, which tensor cores take in two parts, stays one."""
    query, key, value = (torch.rand(1, 1, n, 32) + 0.5 for n in (20, 30, 30))
    key[0, 0, 7] = torch.tensor([-torch.inf] + [0.0] * 31)  # nobody sees it
    value[0, 0, 9, 4] = torch.inf
    value[0, 0, 11, 5] = torch.finfo(torch.float32).max
    output = fk.attention(query, key, value)
    others = [i for i in range(30) if i != 7]
    expected = fk.attention(query, key[:, :, others].clone(), value[:, :, others].clone())
    torch.testing.assert_close(output, expected)
    assert (output[..., 4] == torch.inf).all()
    assert output[..., 5].isfinite().all() and (output[..., 5] > 1e35).all()


def test_keys_behind_the_length_have_no_gradient(backend: str) -> None:
    """Not 0 times a gradient, which would be NaN here."""
    tensors = [torch.randn(1, 2, n, 32).bfloat16().requires_grad_() for n in (9, 40, 40)]
    lengths = torch.tensor([21], dtype=torch.int32)
    grad = torch.randn(1, 2, 9, 32).bfloat16()
    grad[0, 0, 3] = torch.nan
    fk.attention(*tensors, kv_lengths=lengths).backward(grad)
    for t in tensors[1:]:
        assert t.grad is not None and (t.grad[:, :, 21:] == 0).all()


def test_huge_values_and_nan(backend: str) -> None:
    query, key, value = (t.detach() for t in draw((1, 2, 2, 20, 30), 32, torch.float32))
    assert fk.attention(query * 1e4, key * 1e4, value).isfinite().all()
    query[0, 0, 3] = torch.nan
    output = fk.attention(query, key, value)
    assert output[0, 0, 3].isnan().all() and output[0, 1].isfinite().all()
