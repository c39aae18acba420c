"""lora_linear: values and gradients against the definition in float64, on every back end."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import flashkern as fk
from flashkern import reference
from flashkern._ops import ops

pytestmark = pytest.mark.kernels("lora_linear", "lora_linear_backward")

GPU = ("emulated", "cuda")
NAMES = ("y", "x", "lora_a", "lora_b", "bias")
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float64, torch.float64),
]
# rows, in, out, rank: 0, 1, tile - 1, tile, tile + 1, primes; 96 rows and 256 columns are a tile
SHAPES = [
    (0, 16, 8, 4),
    (5, 16, 8, 0),
    (70, 16, 8, 0),
    (70, 0, 8, 4),
    (70, 16, 0, 4),
    (1, 1, 1, 1),
    (1, 512, 256, 16),
    (4, 130, 97, 20),
    (16, 64, 47, 1),
    (17, 300, 129, 8),
    (5, 37, 53, 3),
    (7, 255, 257, 8),
    (5, 40, 24, 3),
    (97, 40, 64, 4),  # rows of whole 16-byte chunks, of less than a block
    (97, 100, 64, 4),  # and of one matrix alone
    (97, 256, 512, 16),
    (96, 300, 31, 64),
    (211, 97, 101, 13),
    (256, 64, 256, 4),  # whole blocks of the GPU kernels, two by two
    (257, 24, 40, 4),  # two parts of rows, and one row more
    (400, 64, 48, 8),
    (700, 513, 300, 5),
    (1100, 16, 128, 4),  # more than one band of blocks
    (3300, 24, 40, 4),  # segments of more than one block
]


def problem(
    rows: int, n_in: int, n_out: int, rank: int, dtype: torch.dtype, adapter: torch.dtype
) -> tuple[Tensor, ...]:
    """x, weight, lora_a, lora_b, bias, and a gradient of y."""
    return (
        torch.randn(rows, n_in).to(dtype),
        (torch.randn(n_out, n_in) / n_in**0.5).to(dtype),
        (torch.randn(rank, n_in) / n_in**0.5).to(adapter),
        (torch.randn(n_out, rank) / rank**0.5).to(adapter),
        torch.randn(n_out).to(dtype),
        torch.randn(rows, n_out).to(dtype),
    )


def with_grads(fn, tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
    x, weight, a, b, bias, grad = tensors
    leaves = [t.detach().clone().requires_grad_() for t in (x, a, b, bias)]
    y = fn(leaves[0], weight, leaves[1], leaves[2], leaves[3])
    y.backward(grad)
    return dict(zip(NAMES, [y.detach(), *[t.grad for t in leaves]], strict=True))


def as_peft_does(scaling: float):
    """The layer in PyTorch's own operators, with the casts that PEFT makes."""

    def fn(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        y = torch.nn.functional.linear(x, weight, bias)
        return (y + ((x.to(a.dtype) @ a.T) @ b.T) * scaling).to(y.dtype)

    return fn


def close(got: Tensor, peer: Tensor, exact: Tensor, what: str) -> None:
    """At most twice PyTorch's error in that dtype, with room for a rounding of both products."""
    assert got.dtype == peer.dtype and got.shape == peer.shape, what
    if exact.numel() == 0:
        return
    error, allowed = ((t.double() - exact).norm().item() for t in (got, peer))
    roundings = 16 if got.dtype == torch.float64 else 2  # float64 has no finer peer
    floor = roundings * torch.finfo(got.dtype).eps * exact.norm().item()
    assert error <= 2 * allowed + floor, f"{what}: error {error:.3g}, PyTorch's {allowed:.3g}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(t)[6:] for t in d))
def test_against_float64(
    backend: str, base: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    if backend in GPU and dtypes[0] == torch.float64:
        pytest.skip("the GPU kernels know no float64")
    tensors = problem(*shape, *dtypes)

    def run(*args: Tensor) -> Tensor:
        return fk.lora_linear(*args[:4], bias=args[4], scaling=1.6875)

    def define(*args: Tensor) -> Tensor:
        return reference.lora_linear(*args[:4], bias=args[4], scaling=1.6875)

    got, peer = with_grads(run, tensors), with_grads(as_peft_does(1.6875), tensors)
    exact = with_grads(define, tuple(t.double() for t in tensors))
    for name in NAMES:
        close(got[name], peer[name], exact[name], name)


@pytest.mark.parametrize("p", [0.1, 0.75, 1.0])
@pytest.mark.parametrize("dtypes", DTYPES[:2] + DTYPES[-1:], ids=lambda d: str(d[0])[6:])
@pytest.mark.parametrize("rows", [3, 103])
def test_dropout_is_the_philox_mask(
    backend: str, base: str, rows: int, p: float, dtypes: tuple[torch.dtype, ...]
) -> None:
    if backend in GPU and dtypes[0] == torch.float64:
        pytest.skip("the GPU kernels know no float64")
    tensors = problem(rows, 301, 67, 8, *dtypes)
    torch.manual_seed(7)
    seed = torch.randint(0, 2**63 - 1, (1,))

    def run(*args: Tensor) -> Tensor:
        torch.manual_seed(7)
        return fk.lora_linear(*args[:4], bias=args[4], scaling=0.5, dropout_p=p)

    def define(*args: Tensor) -> Tensor:
        return reference.lora_linear(*args[:4], bias=args[4], scaling=0.5, dropout_p=p, seed=seed)

    got = with_grads(run, tensors)
    exact = with_grads(define, tuple(t.double() for t in tensors))
    eps = torch.finfo(dtypes[0]).eps
    for name in NAMES:
        size = exact[name].norm()
        assert (got[name].double() - exact[name]).norm() <= 8 * eps * size, name


def test_dropout_follows_torchs_generator(backend: str) -> None:
    x, weight, a, b, *_ = problem(9, 64, 32, 4, torch.float32, torch.float32)
    torch.manual_seed(3)
    first = fk.lora_linear(x, weight, a, b, dropout_p=0.5)
    second = fk.lora_linear(x, weight, a, b, dropout_p=0.5)
    torch.manual_seed(3)
    again = fk.lora_linear(x, weight, a, b, dropout_p=0.5)
    assert torch.equal(first, again) and not torch.equal(first, second)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(0, 130),
    n_in=st.integers(1, 300),
    n_out=st.integers(1, 300),
    rank=st.integers(1, 40),
    scaling=st.floats(-4, 4, width=32),
)
def test_any_shape(
    backend: str, rows: int, n_in: int, n_out: int, rank: int, scaling: float
) -> None:
    tensors = problem(rows, n_in, n_out, rank, torch.float32, torch.float32)

    def run(*args: Tensor) -> Tensor:
        return fk.lora_linear(*args[:4], bias=args[4], scaling=scaling)

    def define(*args: Tensor) -> Tensor:
        return reference.lora_linear(*args[:4], bias=args[4], scaling=scaling)

    got, peer = with_grads(run, tensors), with_grads(as_peft_does(scaling), tensors)
    exact = with_grads(define, tuple(t.double() for t in tensors))
    for name in NAMES:
        size = tensors[4].norm() if name == "y" else 1.0  # sums that cancel: an absolute floor
        error = (got[name].double() - exact[name]).norm()
        allowed = (peer[name].double() - exact[name]).norm()
        assert error <= 2 * allowed + 1e-5 * (exact[name].norm() + size), name


@pytest.mark.parametrize("leading", [(), (3,), (2, 5), (2, 0, 4), (2, 1, 3, 2)], ids=str)
def test_leading_dimensions(backend: str, leading: tuple[int, ...]) -> None:
    _, weight, a, b, bias, _ = problem(1, 24, 16, 4, torch.float32, torch.float32)
    x = torch.randn(*leading, 24, requires_grad=True)
    y = fk.lora_linear(x, weight, a, b, bias=bias)
    assert y.shape == (*leading, 16)
    torch.testing.assert_close(y, reference.lora_linear(x, weight, a, b, bias=bias))
    y.sum().backward()
    expected = (weight + b @ a).sum(0).expand(*leading, 24)
    torch.testing.assert_close(x.grad, expected)


def test_strided_views(backend: str, base: str) -> None:
    _, weight, a, b, _, _ = problem(1, 24, 16, 4, torch.float32, torch.float32)
    wide = torch.randn(30, 100)
    views = [
        wide[:, 3:27],  # rows far apart
        wide[::3, :24],
        wide[:, :48:2],  # strided columns
        torch.randn(24, 30).T,
        torch.randn(24).expand(5, 24),
        torch.randn(4, 7, 24).transpose(0, 1),
    ]
    for x in views:
        exact = reference.lora_linear(x, weight, a, b)
        torch.testing.assert_close(fk.lora_linear(x, weight, a, b), exact)
        torch.testing.assert_close(
            fk.lora_linear(x, weight.T.contiguous().T, a.T.contiguous().T, b), exact
        )
    x = views[0].clone().requires_grad_()
    y = fk.lora_linear(x, weight, a, b)
    y.backward(torch.ones(16).expand(30, 16))  # a gradient without memory of its own
    torch.testing.assert_close(x.grad, (weight + b @ a).sum(0).expand(30, 24))


def test_only_what_is_needed(backend: str, base: str) -> None:
    x, weight, a, b, _, grad = problem(130, 64, 32, 8, torch.float32, torch.float32)
    a.requires_grad_()
    b.requires_grad_()
    y, h = ops.lora_linear(x, weight, a, b, None, None, None, 1.0, 0.0, None)
    assert h.shape == (130, 8) and not h.requires_grad
    needs = [(True, False, False), (False, True, False), (False, False, True), (False,) * 3]
    full = ops.lora_linear_backward(
        grad, x, weight, a, b, h, None, None, 1.0, 0.0, None, True, True, True
    )
    for need in needs:
        part = ops.lora_linear_backward(grad, x, weight, a, b, h, None, None, 1.0, 0.0, None, *need)
        for all_of_it, got, wanted in zip(full, part, need, strict=True):
            assert torch.equal(got, all_of_it) if wanted else got.numel() == 0
    y.backward(grad)
    assert x.grad is None and weight.grad is None and torch.equal(a.grad, full[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [9, 900])
@pytest.mark.parametrize("base", ["own"], indirect=True)  # BLAS's bits may follow the threads
def test_same_bits_at_any_number_of_threads(
    threads: None, isa: str, base: str, rows: int, dtype: torch.dtype
) -> None:
    x, weight, a, b, _, grad = problem(rows, 64, 300, 8, dtype, torch.float32)
    h = ops.lora_linear(x, weight, a, b, None, None, None, 0.5, 0.0, None)[1]
    seed = torch.tensor([11])
    runs = []
    for count in (1, 2, 1, 2):
        torch.set_num_threads(count)
        forward = ops.lora_linear(x, weight, a, b, None, None, None, 0.5, 0.2, seed)
        backward = ops.lora_linear_backward(
            grad, x, weight, a, b, h, None, None, 0.5, 0.2, seed, True, True, True
        )
        runs.append((*forward, *backward))
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(runs[0], run, strict=True))


def test_special_values(backend: str, base: str) -> None:
    x, weight, a, b, *_ = problem(4, 32, 16, 4, torch.float32, torch.float32)
    x[1, 3] = torch.nan
    x[2, 5] = torch.inf
    y = fk.lora_linear(x, weight, a, b)
    assert y[1].isnan().all() and not y[2].isfinite().any() and y[[0, 3]].isfinite().all()
    huge = fk.lora_linear(torch.full((2, 32), 1e30), weight, a * 1e-20, b)
    assert huge.isfinite().all()
    alone = torch.nn.functional.linear(x[[0]], weight)
    torch.testing.assert_close(fk.lora_linear(x[[0]], weight, a, b, scaling=0.0), alone)
