"""What torch asks of an operator: opcheck, gradcheck, compile, autocast, vmap; and refusals."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import flashkern as fk
from flashkern._attention_ops import APPEND, FORWARD

BOTH_PASSES = pytest.mark.kernels("attention_forward", "attention_backward")


def tensors(dtype: torch.dtype = torch.float32, rows: int = 9, **options: Any) -> list[Any]:
    return [torch.randn(2, 2, rows, 16, dtype=dtype, **options) for _ in range(3)]


@BOTH_PASSES
def test_opcheck(backend: str) -> None:
    q, k, v = tensors(requires_grad=True)
    bias, sinks = torch.randn(1, 2, 9, 9, requires_grad=True), torch.randn(2, requires_grad=True)
    none = (None,) * 5
    opcheck(FORWARD, (q, k, v, bias, None, sinks, *none, 9, 9, 1, -1, 0, 0.25, 0.0, 0.0))
    cache, new = torch.zeros(2, 2, 16, 16), torch.randn(2, 2, 3, 16)
    lengths = torch.tensor([0, 5], dtype=torch.int32)
    opcheck(APPEND, (cache, cache.clone(), new, new.clone(), lengths, None))


def test_gradcheck() -> None:
    q, k, v = tensors(torch.float64, rows=5, requires_grad=True)
    bias = torch.randn(2, 1, 5, 5, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def call(q: Any, k: Any, v: Any, bias: Any, sinks: Any) -> Any:
        return fk.attention(
            q, k, v, causal=True, bias=bias, sinks=sinks, softcap=2.0, return_lse=True
        )

    assert torch.autograd.gradcheck(call, (q, k, v, bias, sinks))


@BOTH_PASSES
def test_compile_fullgraph(backend: str) -> None:
    q, k, v = tensors(requires_grad=True)
    compiled = torch.compile(
        lambda q, k, v: fk.attention(q, k, v, causal=True) * 2, fullgraph=True, backend="aot_eager"
    )
    output = compiled(q, k, v)
    want = fk.attention(q, k, v, causal=True) * 2
    assert torch.equal(output, want)
    direction = torch.randn_like(output)
    mine, theirs = (torch.autograd.grad(o, (q, k, v), direction) for o in (output, want))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert fk.attention(*tensors()).dtype == torch.bfloat16


def test_vmap(backend: str) -> None:
    q, k, v = (torch.randn(3, 2, 2, 9, 16) for _ in range(3))
    got = torch.vmap(lambda *t: fk.attention(*t, causal=True))(q, k, v)
    want = torch.stack([fk.attention(*t, causal=True) for t in zip(q, k, v, strict=True)])
    assert torch.equal(got, want)


@BOTH_PASSES
def test_double_backward_is_refused(backend: str) -> None:
    q, k, v = tensors(requires_grad=True)
    (grad,) = torch.autograd.grad(fk.attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad.sum().backward()


def test_forward_mode_and_func_grad_are_refused() -> None:
    q, k, v = tensors()
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda q: fk.attention(q, k, v), (q,), (q,))
    with pytest.raises(NotImplementedError, match="torch.func.grad"):
        torch.func.grad(lambda q: fk.attention(q, k, v).sum())(q)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, q)
        with pytest.raises(NotImplementedError, match="jvp"):
            fk.attention(dual, k, v)
        assert torch.equal(fk.attention(q, k, v), fk.attention(q, k, v))


@pytest.mark.parametrize("shape", [(3, 5, 16), (5, 16), (2, 3, 2, 5, 16), (2, 2, 5, 13)])
@pytest.mark.parametrize("causal", [False, True])
def test_sdpa_takes_what_torch_takes(backend: str, shape: tuple[int, ...], causal: bool) -> None:
    q, k, v = (torch.randn(shape) for _ in range(3))
    got = fk.scaled_dot_product_attention(q, k, v, is_causal=causal)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dims", [(20, 20), (36, 20), (24, 20), (100, 100)])
def test_sdpa_lays_out_its_result_as_query_is(dims: tuple[int, int]) -> None:
    """Callers view (batch, rows, heads, head_dim) as (batch, rows, heads * head_dim)."""
    dim, value_dim = dims
    q, v = torch.randn(2, 9, 4, dim), torch.randn(2, 9, 4, value_dim)
    for layout in (lambda t: t.transpose(1, 2), lambda t: t.transpose(1, 2).contiguous()):
        out = fk.scaled_dot_product_attention(layout(q), layout(q), layout(v))
        assert out.stride() == layout(v).stride()
        want = F.scaled_dot_product_attention(layout(q), layout(q), layout(v))
        torch.testing.assert_close(out, want)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: fk.scaled_dot_product_attention(x, x, x),
        lambda x: fk.attention(x[..., :16], x[..., :16], x[..., :16], scale=x.shape[-1] ** -0.5),
    ],
)
def test_compile_with_a_scale_made_of_a_symbolic_size(call: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="eager")
    for dim in (17, 21):
        x = torch.randn(1, 2, 5, dim)
        torch.testing.assert_close(compiled(x), call(x))


def far_below(number: float, rows: int = 8) -> tuple[torch.Tensor, ...]:
    query, key, value = torch.randn(3, 1, 2, rows, 16).unbind()
    return query, key, value, torch.full((rows, rows), number)


def test_the_definition_of_rows_far_below_zero() -> None:
    """Its weights go by lse, which float64 can hold."""
    *qkv, bias = far_below(-1e9)
    want = F.scaled_dot_product_attention(*qkv, attn_mask=bias)
    torch.testing.assert_close(fk.attention(*qkv, bias=bias), want)
    tensors = [t.double() for t in (*qkv, bias)]
    output, _ = fk.reference.attention(*tensors[:3], bias=tensors[3])
    want = F.scaled_dot_product_attention(*tensors[:3], attn_mask=tensors[3])
    torch.testing.assert_close(output, want)


@BOTH_PASSES
def test_where_a_bias_begins_to_hide(backend: str) -> None:
    """In units of log 2: docs/attention.md."""
    for number, hides in ((-2.3e38, False), (-2.4e38, True)):
        *qkv, bias = far_below(number)
        output, lse = fk.attention(*qkv, bias=bias, return_lse=True)
        assert ((output == 0).all(), (lse == -torch.inf).all()) == (hides, hides)


BAD: list[tuple[type[Exception], str, Any]] = [
    (TypeError, "query must be a tensor", lambda q, k, v: fk.attention([1], k, v)),
    (TypeError, "query must have dtype", lambda q, k, v: fk.attention(q.int(), k, v)),
    (TypeError, "key must have the dtype of query", lambda q, k, v: fk.attention(q, k.half(), v)),
    (ValueError, "query must have 4 dimensions", lambda q, k, v: fk.attention(q[0], k, v)),
    (ValueError, "key must have query's batch", lambda q, k, v: fk.attention(q, k[:1], v[:1])),
    (ValueError, "head_dim", lambda q, k, v: fk.attention(q, k[..., :8], v)),
    (ValueError, "multiple of 8", lambda q, k, v: fk.attention(q[..., :7], k[..., :7], v)),
    (ValueError, "value must have the shape", lambda q, k, v: fk.attention(q, k, v[:, :, :3])),
    (ValueError, "causal must be", lambda q, k, v: fk.attention(q, k, v, causal="left")),
    (ValueError, "window must", lambda q, k, v: fk.attention(q, k, v, window=(-2, 0))),
    (ValueError, "scale must be finite", lambda q, k, v: fk.attention(q, k, v, scale=float("nan"))),
    (ValueError, "softcap must be", lambda q, k, v: fk.attention(q, k, v, softcap=-1.0)),
    (ValueError, "dropout_p must be", lambda q, k, v: fk.attention(q, k, v, dropout_p=1.5)),
    (ValueError, "bias must be broad", lambda q, k, v: fk.attention(q, k, v, bias=v[:, :, :, :3])),
    (ValueError, "sinks must have", lambda q, k, v: fk.attention(q, k, v, sinks=torch.ones(3))),
    (
        ValueError,
        "alibi_slopes must have",
        lambda q, k, v: fk.attention(q, k, v, alibi_slopes=torch.ones(5)),
    ),
    (
        TypeError,
        "kv_lengths must have dtype",
        lambda q, k, v: fk.attention(q, k, v, kv_lengths=torch.ones(2)),
    ),
]


@pytest.mark.parametrize(("error", "message", "call"), BAD, ids=[b[1] for b in BAD])
def test_bad_arguments(error: type[Exception], message: str, call: Any) -> None:
    with pytest.raises(error, match=message):
        call(*tensors())
