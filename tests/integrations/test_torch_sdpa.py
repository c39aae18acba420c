"""flashkern behind F.scaled_dot_product_attention: results, gradients, reach, and going back."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import attention as torch_attention

import flashkern
import flashkern.integrations.torch_sdpa as fks

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture
def enabled() -> Iterator[None]:
    fks.enable()
    yield
    fks.disable()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keyword arguments of every call of flashkern.attention, in order."""
    seen: list[dict[str, Any]] = []
    real = flashkern.attention

    def spy(*tensors: Tensor, **options: Any) -> Any:
        seen.append(options)
        return real(*tensors, **options)

    monkeypatch.setattr(flashkern, "attention", spy)
    return seen


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def on_torch(function: Callable[[], Any]) -> Any:
    """The result of `function` on torch's own kernels."""
    fks.disable()
    try:
        return function()
    finally:
        fks.enable()


def run(tensors: list[Tensor], **options: Any) -> list[Tensor]:
    """Output and gradients of one call."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = F.scaled_dot_product_attention(*leaves, **options)
    out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def masks(batch: int, heads: int, rows: int, columns: int) -> dict[str, dict[str, Any]]:
    keep = torch.rand(batch, 1, rows, columns) > 0.3
    keep[..., 0] = True
    return {
        "none": {},
        "causal": {"is_causal": True},
        "scale": {"scale": 0.3},
        "bool": {"attn_mask": keep},
        "bool of two dimensions": {"attn_mask": keep[0, 0]},
        "float": {"attn_mask": torch.randn(batch, heads, rows, columns)},
        "float, one row": {"attn_mask": torch.randn(batch, 1, 1, columns)},
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", masks(1, 1, 1, 1))
def test_output_and_gradients(kind: str, dtype: torch.dtype, enabled: None, calls: list) -> None:
    tensors = [draw(2, 4, n, 24, dtype=dtype) for n in (33, 47, 47)]
    options = masks(2, 4, 33, 47)[kind]
    if "float" in kind:
        options = {"attn_mask": options["attn_mask"].to(dtype)}
    got = run(tensors, **options)
    assert len(calls) == 1
    expected = on_torch(lambda: run(tensors, **options))
    precise = {k: v.double() if torch.is_tensor(v) and "float" in kind else v
               for k, v in options.items()}  # fmt: skip
    exact = on_torch(lambda: run([t.double() for t in tensors], **precise))
    for ours, theirs, truth in zip(got, expected, exact, strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape
        error, allowed = (ours - truth).norm(), (theirs - truth).norm()
        assert error <= 2 * allowed + 8 * torch.finfo(dtype).eps * truth.norm() * (
            dtype == torch.float64
        )


@pytest.mark.parametrize(
    "shapes",
    [
        [(1, 6, 9, 16), (1, 2, 9, 16), (1, 2, 9, 16)],
        [(2, 4, 1, 64), (2, 1, 70, 64), (2, 1, 70, 64)],
    ],
)
def test_grouped_heads(shapes: list[tuple[int, ...]], enabled: None, calls: list) -> None:
    tensors = [draw(*shape) for shape in shapes]
    got = run(tensors, enable_gqa=True)
    assert len(calls) == 1
    for ours, theirs in zip(got, on_torch(lambda: run(tensors, enable_gqa=True)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("head_dim,value_dim", [(12, 12), (5, 9), (16, 24), (64, 7)])
def test_head_dims(head_dim: int, value_dim: int, enabled: None, calls: list) -> None:
    tensors = [draw(2, 2, 7, head_dim), draw(2, 2, 11, head_dim), draw(2, 2, 11, value_dim)]
    got = run(tensors, is_causal=True)
    assert len(calls) == 1
    for ours, theirs in zip(got, on_torch(lambda: run(tensors, is_causal=True)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("head_dim", [20, 36, 100])
def test_results_are_laid_out_as_torchs(head_dim: int, enabled: None, calls: list) -> None:
    query = draw(2, 9, 4, head_dim).transpose(1, 2)
    got = F.scaled_dot_product_attention(query, query, query)
    want = on_torch(lambda: F.scaled_dot_product_attention(query, query, query))
    assert len(calls) == 1 and got.stride() == want.stride()
    got.transpose(1, 2).view(2, 9, 4 * head_dim)


def test_strided_and_expanded_tensors(enabled: None, calls: list, backend: str) -> None:
    query = draw(2, 9, 4, 16).transpose(1, 2)
    key = draw(2, 1, 16, 13).transpose(2, 3).expand(2, 4, 13, 16)
    value = draw(1, 4, 13, 32)[..., ::2].expand(2, 4, 13, 16)
    got = F.scaled_dot_product_attention(query, key, value)
    assert len(calls) == 1
    torch.testing.assert_close(
        got, on_torch(lambda: F.scaled_dot_product_attention(query, key, value))
    )


def test_tensors_of_three_dimensions(enabled: None, calls: list) -> None:
    tensors = [draw(4, 9, 16), draw(2, 9, 16), draw(2, 9, 16)]
    for options in ({"is_causal": True}, {"attn_mask": torch.rand(4, 9, 9) > 0.2}):
        assert fks.reason_for_torch(*tensors) is None
        got = run(tensors, enable_gqa=True, **options)
        for ours, theirs in zip(
            got, on_torch(lambda o=options: run(tensors, enable_gqa=True, **o)), strict=True
        ):
            torch.testing.assert_close(ours, theirs)
    assert len(calls) == 2


def test_a_row_that_sees_nothing_is_zero(enabled: None) -> None:
    keep = torch.ones(5, 6, dtype=torch.bool)
    keep[2] = False
    out, *grads = run([draw(1, 2, n, 8) for n in (5, 6, 6)], attn_mask=keep)
    assert torch.equal(out[:, :, 2], torch.zeros(1, 2, 8))
    assert all(grad.isfinite().all() for grad in grads)


def test_the_gradient_of_a_float_mask(enabled: None, calls: list) -> None:
    tensors = [draw(2, 3, 6, 8), draw(2, 3, 7, 8), draw(2, 3, 7, 8)]

    def mask_gradient() -> Tensor:
        mask = torch.arange(7.0).repeat(1, 1, 6, 1).requires_grad_()
        F.scaled_dot_product_attention(*tensors, attn_mask=mask).square().sum().backward()
        assert mask.grad is not None
        return mask.grad

    got = mask_gradient()
    assert len(calls) == 1
    torch.testing.assert_close(got, on_torch(mask_gradient))


def test_dropout_of_everything_is_torchs(enabled: None, calls: list) -> None:
    query = torch.randn(1, 2, 4, 32)
    assert not F.scaled_dot_product_attention(query, query, query, dropout_p=1.0).any()
    assert not calls


def test_dropout_follows_the_seed_and_keeps_the_mean(enabled: None, calls: list) -> None:
    query, key = draw(1, 1, 1, 8), draw(1, 1, 64, 8)
    value = torch.ones(1, 1, 64, 8)

    def sample(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return F.scaled_dot_product_attention(query, key, value, dropout_p=0.25)

    assert torch.equal(sample(1), sample(1))
    mean = torch.stack([sample(seed) for seed in range(400)]).mean()
    assert abs(mean.item() - 1) < 0.1
    assert all(call["dropout_p"] == 0.25 for call in calls)


@pytest.mark.parametrize(
    "shape,options,reason",
    [
        ((1, 2, 4, 264), {}, "head_dim is 264, above 256"),
        ((2, 1, 2, 4, 8), {}, "query, key and value do not have 4 (or 3) dimensions"),
        ((1, 2, 0, 8), {}, "a tensor is empty"),
    ],
)
def test_what_stays_on_torch(
    shape: tuple[int, ...],
    options: dict[str, Any],
    reason: str,
    enabled: None,
    calls: list,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = draw(*shape)
    monkeypatch.setattr(fks, "_said", set())
    with caplog.at_level(logging.DEBUG, "flashkern"):
        got, _ = (F.scaled_dot_product_attention(x, x, x, **options) for _ in range(2))
    assert not calls
    assert reason in caplog.text
    first, *others = (record.levelno for record in caplog.records)
    assert first == logging.WARNING and set(others) == {logging.DEBUG}
    assert fks.reason_for_torch(x, x, x) == reason
    expected = on_torch(lambda: F.scaled_dot_product_attention(x, x, x, **options))
    assert torch.equal(got, expected)


def test_bad_calls_get_torchs_own_error(enabled: None) -> None:
    x = draw(1, 2, 4, 8)
    with pytest.raises(RuntimeError, match="same dtype"):
        F.scaled_dot_product_attention(x, x.double(), x)
    with pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(x, draw(1, 3, 4, 8), draw(1, 3, 4, 8))


def test_sdpa_kernel_contexts_are_obeyed(enabled: None, calls: list) -> None:
    x = draw(1, 2, 4, 8)
    with torch_attention.sdpa_kernel([torch_attention.SDPBackend.MATH]):
        F.scaled_dot_product_attention(x, x, x)
    assert not calls
    with torch_attention.sdpa_kernel([torch_attention.SDPBackend.FLASH_ATTENTION]):
        F.scaled_dot_product_attention(x, x, x)
    assert len(calls) == 1


def test_modules_of_torch_use_it(enabled: None, calls: list, backend: str) -> None:
    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    x = draw(2, 5, 32)

    def forward() -> Tensor:
        return layer(x, x, x, need_weights=False)[0]

    got = forward()
    assert calls
    torch.testing.assert_close(got, on_torch(forward))


def test_autocast(enabled: None, calls: list) -> None:
    tensors = [draw(1, 2, 9, 16) for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        got = F.scaled_dot_product_attention(*tensors)
    assert got.dtype == torch.bfloat16 and len(calls) == 1


def test_inference_mode(enabled: None, calls: list) -> None:
    with torch.inference_mode():
        x = draw(1, 2, 9, 16)
        got = F.scaled_dot_product_attention(x, x, x)
    assert len(calls) == 1 and got.is_inference()


def test_functorch_gradients(enabled: None) -> None:
    x = draw(1, 2, 9, 16)

    def loss(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, x, x, is_causal=True).square().sum()

    got = torch.func.grad(loss)(x)
    torch.testing.assert_close(got, on_torch(lambda: torch.func.grad(loss)(x)))


def test_compiled_code_follows_the_switch(calls: list) -> None:
    tensors = [draw(2, 4, 9, 16) for _ in range(3)]
    keep = torch.rand(2, 1, 9, 9) > 0.3
    keep[..., 0] = True
    fks.disable()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        causal = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return causal + F.scaled_dot_product_attention(query, key, value, attn_mask=keep)

    def forward_and_backward() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = function(*leaves)
        out.square().sum().backward()
        return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    expected = forward_and_backward()
    assert not calls
    fks.enable()
    got = forward_and_backward()
    assert len(calls) == 2
    fks.disable()
    again = forward_and_backward()
    assert len(calls) == 2
    for theirs, ours, back in zip(expected, got, again, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert torch.equal(back, theirs)


def test_gradients_across_the_switch() -> None:
    """A graph recorded on one side may run its backward pass on the other."""
    tensors = [draw(2, 2, 9, 16) for _ in range(3)]
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    fks.disable()
    expected = run(tensors)[1:]
    for first, second in ((fks.enable, fks.disable), (fks.disable, fks.enable)):
        leaves = [t.clone().requires_grad_() for t in tensors]
        first()
        out = operator(*leaves)[0]
        second()
        out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape))
        for leaf, truth in zip(leaves, expected, strict=True):
            torch.testing.assert_close(leaf.grad, truth)
    fks.disable()


def test_the_fused_operator_keeps_torchs_layouts_and_lse(enabled: None) -> None:
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    query, key, value = (draw(2, n, 4, 12).transpose(1, 2) for n in (9, 13, 13))
    out, lse = operator(query, key, value, is_causal=True)
    theirs, their_lse = on_torch(lambda: operator(query, key, value, is_causal=True))
    torch.testing.assert_close(out, theirs)
    torch.testing.assert_close(lse, their_lse)
    assert out.stride() == theirs.stride() and lse.stride() == their_lse.stride()


def test_registry_and_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "flashkern"):
        fks.enable()
        assert torch_attention.current_flash_attention_impl() == "flashkern"
        assert "flashkern" in torch_attention.list_flash_attention_impls()
        fks.disable()
        fks.disable()
    assert torch_attention.current_flash_attention_impl() is None
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]


def test_enabling_twice_and_by_the_registry(calls: list) -> None:
    x = draw(1, 1, 3, 8)
    fks.enable()
    fks.enable()
    fks.disable()
    F.scaled_dot_product_attention(x, x, x)
    assert not calls
    torch_attention.activate_flash_attention_impl("flashkern")
    F.scaled_dot_product_attention(x, x, x)
    torch_attention.restore_flash_attention_impl()
    F.scaled_dot_product_attention(x, x, x)
    assert len(calls) == 1


def test_restoring_leaves_torch_bit_for_bit_as_it_was() -> None:
    tensors = [draw(2, 4, 65, 32) for _ in range(3)]
    before = run(tensors, is_causal=True)
    fks.enable()
    run(tensors, is_causal=True)
    fks.disable()
    after = run(tensors, is_causal=True)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_importing_changes_nothing() -> None:
    code = (
        "import torch, flashkern.integrations.torch_sdpa;"
        "from torch.nn.attention import list_flash_attention_impls as impls;"
        "assert 'flashkern' not in impls()"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
