"""lora_linear_multi: an adapter for each row, forward and backward."""

import pytest
import torch

import flashkern as fk
from flashkern import reference

pytestmark = pytest.mark.kernels("lora_linear", "lora_linear_backward")


def make(rows: int, adapters: int, dtype: torch.dtype = torch.float32):
    x = torch.randn(rows, 70).to(dtype)
    weight = (torch.randn(50, 70) / 8).to(dtype)
    a = torch.randn(adapters, 6, 70) / 8
    b = torch.randn(adapters, 50, 6)
    ids = torch.randint(-1, adapters, (rows,))
    return x, weight, a, b, ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "rows,adapters", [(0, 2), (1, 1), (9, 3), (17, 2), (350, 2), (512, 9), (64, 64)]
)
def test_against_the_definition(
    backend: str, base: str, rows: int, adapters: int, dtype: torch.dtype
) -> None:
    if backend in ("emulated", "cuda") and dtype == torch.float64:
        pytest.skip("the GPU kernels know no float64")
    x, weight, a, b, ids = make(rows, adapters, dtype)
    if dtype == torch.float64:
        a, b = a.double(), b.double()
    scaling = torch.rand(adapters) + 0.5
    bias = torch.randn(50).to(dtype)
    leaves = [t.clone().requires_grad_() for t in (x, a, b, bias)]
    y = fk.lora_linear_multi(
        leaves[0], weight, leaves[1], leaves[2], ids, bias=leaves[3], scaling=scaling
    )
    grad = torch.randn_like(y)
    y.backward(grad)
    exact = [t.double().requires_grad_() for t in (x, a, b, bias)]
    expected = reference.lora_linear_multi(
        exact[0], weight.double(), exact[1], exact[2], ids, bias=exact[3], scaling=scaling.double()
    )
    expected.backward(grad.double())
    eps = torch.finfo(dtype).eps
    pairs = [(y, expected), *[(g.grad, e.grad) for g, e in zip(leaves, exact, strict=True)]]
    for got, want in pairs:
        assert (got.double() - want).norm() <= 8 * eps * want.norm() + 1e-12


def test_is_the_single_operator_where_all_rows_agree(backend: str, base: str) -> None:
    x, weight, a, b, _ = make(130, 3)
    for n in range(3):
        one = fk.lora_linear(x, weight, a[n], b[n], scaling=0.3)
        ids = torch.full((130,), n, dtype=torch.int32)
        assert torch.equal(fk.lora_linear_multi(x, weight, a, b, ids, scaling=0.3), one)


@pytest.mark.parametrize("rows", [7, 40])
def test_rows_without_an_adapter_are_the_base_product(backend: str, base: str, rows: int) -> None:
    x, weight, a, b, ids = make(rows, 2)
    y = fk.lora_linear_multi(x, weight, a, b, ids)
    plain = torch.nn.functional.linear(x, weight)
    torch.testing.assert_close(y[ids == -1], plain[ids == -1])
    assert (y[ids == 0] - plain[ids == 0]).norm() > 0.01 * plain[ids == 0].norm()


def test_an_unused_adapter_gets_a_zero_gradient(backend: str) -> None:
    x, weight, a, b, _ = make(20, 3)
    a.requires_grad_()
    b.requires_grad_()
    ids = torch.tensor([0, 2] * 10)
    fk.lora_linear_multi(x, weight, a, b, ids).sum().backward()
    assert a.grad[1].eq(0).all() and b.grad[1].eq(0).all()
    assert a.grad[0].ne(0).any() and b.grad[2].ne(0).any()


def test_every_row_has_an_adapter_of_its_own(backend: str, base: str) -> None:
    """As many adapters as fill the last line of what the GPU kernels note of them."""
    x, weight, a, b, _ = make(64, 64)
    a.requires_grad_(), b.requires_grad_()
    ids = torch.arange(64).flip(0)
    y = fk.lora_linear_multi(x, weight, a, b, ids)
    grad = torch.randn_like(y)
    y.backward(grad)
    h = torch.einsum("ni,nri->nr", x, a.detach()[ids])
    dh = torch.einsum("no,nor->nr", grad, b.detach()[ids])
    torch.testing.assert_close(b.grad[ids], grad[:, :, None] * h[:, None], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(a.grad[ids], dh[:, :, None] * x[:, None], rtol=1e-4, atol=1e-4)


def test_ids_in_the_shape_of_the_leading_dimensions(backend: str) -> None:
    x, weight, a, b, ids = make(24, 3)
    flat = fk.lora_linear_multi(x, weight, a, b, ids)
    deep = fk.lora_linear_multi(x.view(2, 3, 4, 70), weight, a, b, ids.view(2, 3, 4))
    mixed = fk.lora_linear_multi(x.view(2, 3, 4, 70), weight, a, b, ids)
    assert torch.equal(deep.view(24, 50), flat) and torch.equal(mixed, deep)
    per_sequence = torch.tensor([2, -1]).view(2, 1).expand(2, 12)
    y = fk.lora_linear_multi(x.view(2, 12, 70), weight, a, b, per_sequence)
    torch.testing.assert_close(y[0], fk.lora_linear(x[:12], weight, a[2], b[2]))


def test_same_bits_at_any_number_of_threads(threads: None) -> None:
    x, weight, a, b, ids = make(600, 5)
    a.requires_grad_()
    runs = []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        y = fk.lora_linear_multi(x, weight, a, b, ids)
        (gradient,) = torch.autograd.grad(y.square().sum(), a)
        runs.append((y, gradient))
    assert all(torch.equal(runs[0][i], run[i]) for run in runs[1:] for i in range(2))


def test_an_id_out_of_range_is_refused(isa: str) -> None:
    x, weight, a, b, ids = make(8, 2)
    for bad in (2, -2):
        ids[5] = bad
        with pytest.raises(RuntimeError, match=rf"adapter_ids must lie in \[-1, 2\), got {bad}"):
            fk.lora_linear_multi(x, weight, a, b, ids)


@pytest.mark.parametrize("rows", [64, 65, 129])
def test_an_adapter_begins_beside_a_tiles_start(backend: str, base: str, rows: int) -> None:
    """Tiles have 64 rows: the second adapter's first row is a tile's first or second."""
    x, weight, a, b, _ = make(rows + 70, 2)
    ids = torch.arange(rows + 70).ge(rows).long()
    y = fk.lora_linear_multi(x, weight, a, b, ids)
    expected = reference.lora_linear_multi(
        *(t.double() for t in (x, weight, a, b)), ids, scaling=torch.ones(2).double()
    )
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
