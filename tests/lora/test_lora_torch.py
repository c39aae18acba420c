"""lora_linear among torch's machinery: opcheck, gradcheck, compile, autocast, vmap, checkpoints."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import flashkern as fk
from flashkern import reference
from flashkern._ops import ops


def make(dtype: torch.dtype = torch.float32, rows: int = 6):
    x = torch.randn(rows, 12, dtype=dtype)
    weight = torch.randn(10, 12, dtype=dtype)
    a = torch.randn(3, 12, dtype=dtype)
    b = torch.randn(10, 3, dtype=dtype)
    return x, weight, a, b, torch.randn(10, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_opcheck(dtype: torch.dtype, p: float) -> None:
    x, weight, a, b, bias = make(dtype)
    leaves = [t.requires_grad_() for t in (x, a, b, bias)]
    seed = torch.tensor([5]) if p else None
    args = (leaves[0], weight, *leaves[1:], None, None, 2.0, p, seed)
    torch.library.opcheck(ops.lora_linear.default, args)
    detached = [t.detach() for t in (x, weight, a, b)]
    y, h = ops.lora_linear(*detached, None, None, None, 2.0, p, seed)
    args = (y, *detached, h, None, None, 2.0, p, seed, True, False, True)
    torch.library.opcheck(ops.lora_linear_backward.default, args)


def test_opcheck_multi() -> None:
    x, weight, a, b, _ = make()
    leaves = [t.requires_grad_() for t in (x, torch.stack([a, -a]), torch.stack([b, b]))]
    ids = torch.tensor([0, 1, -1, 0, 0, 1])
    scalings = torch.tensor([1.0, 2.0], dtype=torch.float64)
    args = (leaves[0], weight, *leaves[1:], None, ids, scalings, 1.0, 0.0, None)
    torch.library.opcheck(ops.lora_linear.default, args)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradcheck(p: float) -> None:
    x, weight, a, b, bias = make(torch.float64)
    seed = torch.tensor([3])

    def fn(x, a, b, bias):
        return ops.lora_linear(x, weight, a, b, bias, None, None, 1.5, p, seed)[0]

    assert torch.autograd.gradcheck(fn, [t.requires_grad_() for t in (x, a, b, bias)])


def test_double_backward_is_refused() -> None:
    x, weight, a, b, _ = make(torch.float64)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(
        fk.lora_linear(x, weight, a, b.requires_grad_()).square().sum(), x, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="must not itself be differentiated"):
        gradient.sum().backward()


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_compile_fullgraph(p: float) -> None:
    x, weight, a, b, bias = make(rows=20)
    a.requires_grad_()

    def fn(x, a):
        return fk.lora_linear(x, weight, a, b, bias=bias, scaling=0.5, dropout_p=p).relu()

    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    expected = fn(x, a)
    (expected_grad,) = torch.autograd.grad(expected.sum(), a)
    torch.manual_seed(1)
    got = compiled(x, a)
    (got_grad,) = torch.autograd.grad(got.sum(), a)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(got_grad, expected_grad)


def test_autocast() -> None:
    x, weight, a, b, bias = make(rows=40)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    with torch.autocast("cpu", torch.bfloat16):
        y = fk.lora_linear(leaves[0], weight, leaves[1], leaves[2], bias=bias)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in leaves)
    exact = reference.lora_linear(x, weight, a, b, bias=bias)
    assert (y - exact).norm() < 0.02 * exact.norm()
    x, weight, a, b, bias = make(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert fk.lora_linear(x, weight, a, b).dtype == torch.float64


def test_vmap() -> None:
    _, weight, a, b, bias = make()
    x = torch.randn(5, 4, 12)

    def fn(x, a):
        return fk.lora_linear(x, weight, a, b, bias=bias)

    torch.testing.assert_close(torch.vmap(fn, (0, None))(x, a), fn(x, a))
    torch.testing.assert_close(torch.vmap(fn, (1, None), 1)(x, a), fn(x, a))
    several = torch.randn(5, 3, 12)
    expected = torch.stack([fn(x[i], several[i]) for i in range(5)])
    torch.testing.assert_close(torch.vmap(fn)(x, several), expected)


def test_checkpoint_with_dropout() -> None:
    x, weight, a, b, _ = make(rows=30)
    leaves = [t.requires_grad_() for t in (x, a, b)]

    def fn(x, a, b):
        return fk.lora_linear(x, weight, a, b, dropout_p=0.4).tanh()

    torch.manual_seed(2)
    plain = torch.autograd.grad(fn(*leaves).sum(), leaves)
    torch.manual_seed(2)
    again = torch.autograd.grad(checkpoint(fn, *leaves, use_reentrant=False).sum(), leaves)
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def test_nothing_the_size_of_x_is_kept() -> None:
    """Backward keeps x itself, the weights and h: rows x rank floats. No mask, no copy."""
    x, weight, a, b, _ = make(rows=64)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fk.lora_linear(leaves[0], weight, leaves[1], leaves[2], dropout_p=0.5)
    own = {t.data_ptr() for t in (x, weight, a, b)}
    extra = [t for t in kept if t.data_ptr() not in own]
    assert sum(t.numel() for t in extra) == 64 * 3 + 1  # h and the seed


GOOD = dict(x=(4, 12), weight=(10, 12), lora_a=(3, 12), lora_b=(10, 3))
BAD = [
    (dict(x=()), ValueError, "x must have at least one dimension"),
    (dict(x=(4, 13)), ValueError, "x must have 12 columns as weight has, got shape (4, 13)"),
    (dict(weight=(10,)), ValueError, "weight must have shape (out, in), got (10,)"),
    (dict(lora_a=(3, 11)), ValueError, "lora_a must have shape (rank, in) with in = 12"),
    (dict(lora_a=(1, 3, 12)), ValueError, "lora_a must have shape (rank, in) with in = 12"),
    (dict(lora_b=(10, 4)), ValueError, "lora_b must have shape (10, 3), got (10, 4)"),
    (dict(bias=(9,)), ValueError, "bias must have shape (10,), got (9,)"),
    (dict(scaling=float("nan")), ValueError, "scaling must be a finite number, got nan"),
    (dict(scaling="1"), ValueError, "scaling must be a finite number, got '1'"),
    (dict(dropout_p=1.5), ValueError, "dropout_p must lie in [0, 1], got 1.5"),
    (dict(dropout_p=float("nan")), ValueError, "dropout_p must lie in [0, 1], got nan"),
    (dict(x=None), TypeError, "x must be a tensor, got NoneType"),
    (dict(x=torch.int32), TypeError, "x must have dtype float32, bfloat16, float16, float64"),
    (dict(weight=torch.float16), TypeError, "weight must have dtype float32, got float16"),
    (dict(lora_a=torch.bfloat16), TypeError, "lora_a must have dtype float32, got bfloat16"),
    (dict(lora_b=torch.float64), TypeError, "lora_b must have dtype float32, got float64"),
]


@pytest.mark.parametrize("change,error,message", BAD, ids=lambda v: None if v is dict else str(v))
def test_bad_arguments(change: dict, error: type[Exception], message: str) -> None:
    kwargs = {}
    for name, value in {**GOOD, **change}.items():
        if isinstance(value, tuple):
            value = torch.zeros(value)
        elif isinstance(value, torch.dtype):
            value = torch.zeros(GOOD[name]).to(value)
        kwargs[name] = value
    with pytest.raises(error) as raised:
        fk.lora_linear(**kwargs)
    assert str(raised.value).startswith("lora_linear: ") and message in str(raised.value)


def test_bad_arguments_of_multi() -> None:
    x, weight, a, b, _ = make()
    a, b, ids = a.expand(2, -1, -1), b.expand(2, -1, -1), torch.zeros(6, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"lora_a must have shape \(n, rank, in\)"):
        fk.lora_linear_multi(x, weight, a[0], b[0], ids)
    with pytest.raises(ValueError, match=r"adapter_ids must have shape \(6,\)"):
        fk.lora_linear_multi(x, weight, a, b, ids[:5])
    with pytest.raises(TypeError, match="adapter_ids must have dtype int64"):
        fk.lora_linear_multi(x, weight, a, b, ids.float())
    with pytest.raises(ValueError, match=r"scaling must have shape \(2,\)"):
        fk.lora_linear_multi(x, weight, a, b, ids, scaling=torch.ones(3))
    with pytest.raises(ValueError, match="scaling must be a finite number"):
        fk.lora_linear_multi(x, weight, a, b, ids, scaling=float("inf"))
    with pytest.raises(ValueError, match="scaling must not require grad"):
        fk.lora_linear_multi(x, weight, a, b, ids, scaling=torch.ones(2, requires_grad=True))


def test_the_weight_must_be_frozen() -> None:
    x, weight, a, b, _ = make()
    weight.requires_grad_()
    with pytest.raises(ValueError, match="weight must be frozen"):
        fk.lora_linear(x, weight, a, b)
    with torch.no_grad():
        fk.lora_linear(x, weight, a, b)


def test_forward_mode_is_refused_and_meta_tensors_have_shapes() -> None:
    x, w, a, b = (torch.randn(n, 16) for n in (3, 8, 4, 8))
    b = b[:, :4].contiguous()
    with pytest.raises(NotImplementedError, match="lora_linear.*jvp"):
        torch.func.jvp(lambda x: fk.lora_linear(x, w, a, b), (x,), (x,))
    with torch.device("meta"):
        shapes = [torch.empty(t.shape) for t in (x, w, a, b)]
    assert fk.lora_linear(*shapes).shape == (3, 8)


@pytest.mark.parametrize("name", ["weight", "lora_a", "lora_b", "bias"])
def test_every_tensor_is_on_one_device(name: str) -> None:
    x, weight, lora_a, lora_b, bias = (torch.randn(s) for s in ((3, 8), (5, 8), (2, 8), (5, 2), 5))
    call = {"weight": weight, "lora_a": lora_a, "lora_b": lora_b, "bias": bias}
    call[name] = call[name].to("meta")
    with pytest.raises(ValueError, match=f"lora_linear: {name} must be on device cpu, got meta"):
        fk.lora_linear(x, **call)
