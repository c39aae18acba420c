"""What the CUDA kernels of lora_linear do that no CPU kernel does: few rows, unchecked ids."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import flashkern as fk
from flashkern import reference
from flashkern._ops import ops

pytestmark = pytest.mark.kernels("lora_linear", "lora_linear_backward")


def problem(rows: int, adapters: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, weight, a, b, ids; rows of whole 16-byte chunks, as a decoding step has them."""
    a, b = torch.randn(adapters, rank, 136) / 11, torch.randn(adapters, 72, rank) / rank**0.5
    ids = torch.randint(-1, adapters, (rows,))
    return torch.randn(rows, 136).to(dtype), (torch.randn(72, 136) / 11).to(dtype), a, b, ids


@pytest.fixture
def own_base(backend: str) -> Iterator[None]:
    """On a CPU with AMX, torch's bfloat16 product reads what lies behind a row and adds 0 * NaN."""
    if backend not in ("emulated", "cuda"):
        ops.lora_base("own")
    yield
    ops.lora_base("auto")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(
    "rows,rank", [(1, 8), (8, 33), (16, 16), (17, 32), (32, 17), (33, 20), (40, 70), (64, 64)]
)
def test_few_rows(backend: str, rows: int, rank: int, wide: bool, dtype: torch.dtype) -> None:
    """One launch for one adapter; a shrink before it for several, for dropout, for high ranks."""
    x, weight, a, b, ids = problem(rows, 3, rank, dtype)
    if not wide:
        a, b = a.to(dtype), b.to(dtype)
    bias = torch.randn(72).to(dtype)
    exact = [t.double() for t in (x, weight, a, b, bias)]
    eps = torch.finfo(dtype).eps
    several = fk.lora_linear_multi(x, weight, a, b, ids, bias=bias, scaling=0.7)
    want = reference.lora_linear_multi(*exact[:4], ids, bias=exact[4], scaling=0.7)
    assert (several - want).norm() <= eps * want.norm()
    for p in (0.0, 0.4):
        torch.manual_seed(5)
        seed = torch.randint(0, 2**63 - 1, (1,))
        torch.manual_seed(5)
        one = fk.lora_linear(x, weight, a[1], b[1], bias=bias, scaling=0.7, dropout_p=p)
        want = reference.lora_linear(
            *(exact[0], exact[1], exact[2][1], exact[3][1]),
            **dict(bias=exact[4], scaling=0.7, dropout_p=p, seed=seed),
        )
        assert (one - want).norm() <= eps * want.norm()


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("offset", [0, 1])
def test_few_rows_keep_h(backend: str, wide: bool, offset: int) -> None:
    """To float32's error, whoever computes it: an adapter that starts in a chunk is read apart."""
    x, weight, a, b, _ = problem(24, 1, 12, torch.bfloat16)
    a, b = (t[0] if wide else t[0].bfloat16() for t in (a, b))
    a = torch.cat((a.new_full((offset,), torch.nan), a.flatten()))[offset:].view(12, 136)
    h = ops.lora_linear(x, weight, a, b, None, None, None, 0.7, 0.0, None)[1]
    want = 0.7 * x.double() @ a.double().T
    assert (h - want).norm() <= 1e-6 * want.norm()


def forward_and_backward(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, ids: Tensor, grad: Tensor
) -> tuple[Tensor, ...]:
    scalings = torch.linspace(0.5, 1.5, a.shape[0], dtype=torch.float64)
    y, h = ops.lora_linear(x, weight, a, b, None, ids, scalings, 1.0, 0.0, None)
    back = ops.lora_linear_backward(
        grad, x, weight, a, b, h, ids, scalings, 1.0, 0.0, None, True, True, True
    )
    return y, h, *back


@pytest.mark.parametrize("rows", [20, 200])
def test_same_bits_in_any_order_of_blocks(
    backend: str, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    x, weight, a, b, ids = problem(rows, 4, 12, torch.bfloat16)
    grad = torch.randn(rows, 72).bfloat16()
    first = forward_and_backward(x, weight, a, b, ids, grad)
    assert not any(t.isnan().any() for t in first)
    for seed in range(3):  # of the order in which the emulator takes blocks; a GPU has its own
        monkeypatch.setenv("FLASHKERN_EMULATOR_SEED", str(seed))
        again = forward_and_backward(x, weight, a, b, ids, grad)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("rows", [20, 200])
def test_an_id_out_of_range_is_no_adapter(backend: str, rows: int) -> None:
    """Ids on a GPU are not read by the host, and must not lead a kernel out of bounds."""
    if backend not in ("emulated", "cuda"):
        pytest.skip("a CPU refuses such ids")
    x, weight, a, b, ids = problem(rows, 4, 12, torch.bfloat16)
    grad = torch.randn(rows, 72).bfloat16()
    bad = ids.clone()
    bad[3], bad[7], bad[11] = 4, -2, 2**40
    ids[[3, 7, 11]] = -1
    got = forward_and_backward(x, weight, a, b, bad, grad)
    want = forward_and_backward(x, weight, a, b, ids, grad)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("rows,rank", [(70, 12), (300, 20), (150, 64), (90, 70)])
def test_a_split_shrink(backend: str, rows: int, rank: int, wide: bool, dtype: torch.dtype) -> None:
    """A row's h is the same alone and among others' rows, run after run, to float32's error."""
    adapter = torch.float32 if wide else dtype
    x, weight = torch.randn(rows, 701).to(dtype), torch.randn(8, 701).to(dtype)
    a, b = torch.randn(5, rank, 701).to(adapter), torch.randn(5, 8, rank).to(adapter)
    ids = torch.randint(-1, 4, (rows,))
    ids[ids == 1] = 3  # adapters 1 and 4 have no rows
    scalings = torch.linspace(0.5, 1.5, 5, dtype=torch.float64)
    several = [ops.lora_linear(x, weight, a, b, None, ids, scalings, 1.0, 0.0, None)[1]
               for _ in range(2)]  # fmt: skip
    assert torch.equal(*several) and (several[0][ids < 0] == 0).all()
    for n in (0, 2, 3):
        scale = float(scalings[n])
        h = ops.lora_linear(x, weight, a[n], b[n], None, None, None, scale, 0.0, None)[1]
        want = scale * x.double() @ a[n].double().T
        assert (h - want).norm() <= 1e-6 * want.norm()
        if backend in ("emulated", "cuda"):
            assert torch.equal(several[0][ids == n], h[ids == n])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [12, 31, 64])
@pytest.mark.parametrize("width", [300, 301])
def test_gradients_of_16_bit_adapters(
    backend: str, width: int, rank: int, dtype: torch.dtype
) -> None:
    x, grad = torch.randn(90, 72).to(dtype), torch.randn(90, width).to(dtype)
    weight, a = torch.randn(width, 72).to(dtype), torch.randn(rank, 72).to(dtype)
    b = torch.randn(width, rank).to(dtype)
    h = 0.7 * x.float() @ a.float().T
    dx, da, db = ops.lora_linear_backward(
        grad, x, weight, a, b, h, None, None, 0.7, 0.0, None, True, True, True
    )
    dh = 0.7 * grad.double() @ b.double()
    wants = dh @ a.double() + grad.double() @ weight.double(), dh.T @ x.double()
    for got, want in zip((dx, da, db), (*wants, grad.double().T @ h.double()), strict=True):
        assert (got - want).norm() <= torch.finfo(dtype).eps * want.norm()


def among_nan(x: Tensor, offset: int) -> Tensor:
    """The same values as a view; all around it, and between its rows, are NaN."""
    rows, width = x.shape
    around = torch.full((rows + 64, width + 64), torch.nan, dtype=x.dtype)
    return around[3 : 3 + rows, offset : offset + width].copy_(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [8, 20, 200])
@pytest.mark.parametrize("offset", [16, 1])
def test_nothing_around_the_tensors_counts(
    backend: str, own_base: None, rows: int, offset: int, dtype: torch.dtype
) -> None:
    """Behind the last row and column of a tile lie other tensors, here NaN; aligned or not."""
    x, weight, a, b, ids = problem(rows, 2, 12, dtype)
    grad = torch.randn(rows, 72).to(dtype)
    alone = forward_and_backward(x, weight, a, b, ids, grad)
    views = among_nan(x, offset), among_nan(grad, offset)
    among = forward_and_backward(views[0], weight, a, b, ids, views[1])
    for one, other in zip(alone, among, strict=True):
        assert (one - other).norm() <= torch.finfo(dtype).eps * one.norm()  # of another kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [8, 20, 200])
def test_nan_stays_in_its_row_and_column(
    backend: str, own_base: None, rows: int, dtype: torch.dtype
) -> None:
    x, weight, a, b, ids = problem(rows, 2, 12, dtype)
    grad = torch.randn(rows, 72).to(dtype)
    x[4], weight[40] = torch.nan, torch.nan
    y = forward_and_backward(x, weight, a, b, ids, grad)[0]
    spoilt = torch.zeros(rows, 72, dtype=torch.bool)
    spoilt[4], spoilt[:, 40] = True, True
    assert torch.equal(y.isnan(), spoilt)
    x, weight, a, b, ids = problem(rows, 2, 12, dtype)
    grad[6] = torch.nan
    dx = forward_and_backward(x, weight, a, b, ids, grad)[2]
    assert dx[6].isnan().all() and dx.isnan().sum() == dx.shape[1]


@pytest.mark.parametrize("dtype,width", [(torch.float32, 211), (torch.bfloat16, 413)])
def test_many_steps_of_rows_that_are_not_aligned(
    backend: str, dtype: torch.dtype, width: int
) -> None:
    """Such rows are not copied behind the multiplication's back: nothing may reach its tile."""
    x, weight = torch.randn(100, width).to(dtype), (torch.randn(40, width) / 20).to(dtype)
    a, b = torch.randn(16, width) / 20, torch.randn(40, 16)
    leaves = [t.clone().requires_grad_() for t in (x, a, b)]
    y = fk.lora_linear(leaves[0], weight, leaves[1], leaves[2])
    y.sum().backward()
    exact = [t.double().requires_grad_() for t in (x, a, b)]
    expected = reference.lora_linear(exact[0], weight.double(), exact[1], exact[2])
    expected.sum().backward()
    eps = torch.finfo(dtype).eps
    pairs = [(y, expected), *[(g.grad, e.grad) for g, e in zip(leaves, exact, strict=True)]]
    for got, want in pairs:
        assert (got.double() - want).norm() <= 8 * eps * want.norm()
