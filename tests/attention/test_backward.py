"""The backward pass where its tiles of keys and rows begin, end and meet, on every back end."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from test_attention import HALF, check, draw, run
from torch import Tensor

import flashkern as fk
from flashkern import reference

pytestmark = pytest.mark.kernels("attention_forward", "attention_backward")

DTYPES = [torch.float32, torch.bfloat16]
STARTS_Q = torch.tensor([0, 0, 70, 71, 71, 200], dtype=torch.int32)
STARTS_K = torch.tensor([0, 40, 41, 300, 310, 310], dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        pytest.param((1, 1, 1, 150, 16), {}, id="one block of keys"),
        pytest.param((1, 1, 1, 5, 520), {}, id="few rows, many blocks of keys"),
        pytest.param((2, 1, 1, 129, 257), {"causal": True}, id="a tile and one more"),
        pytest.param((1, 1, 1, 260, 260), {"window": (20, 0)}, id="a window within a block"),
        pytest.param((1, 6, 2, 45, 140), {"causal": True}, id="group of 3"),
        pytest.param((1, 8, 1, 21, 140), {"window": (40, 9)}, id="group of 8"),
        pytest.param((1, 1, 1, 40, 300), {"causal": "top_left"}, id="keys that nobody sees"),
        pytest.param((1, 1, 1, 300, 40), {"causal": True}, id="rows that see nothing"),
        pytest.param((1, 2, 1, 70, 140), {"softcap": 3.0, "causal": True}, id="softcap"),
    ],
)
def test_tiles(
    backend: str, shape: tuple[int, int, int, int, int], options: Any, dim: int, dtype: Any
) -> None:
    check(draw(shape, dim, dtype), few_keys=True, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (30, 0)}])
def test_ragged_batches(backend: str, options: Any, heads: int, dtype: torch.dtype) -> None:
    """Sequences without rows, without keys, of one row, and of many tiles."""
    query = torch.randn(200, heads, 64).to(dtype).requires_grad_()
    key, value = (torch.randn(310, 2, 64).to(dtype).requires_grad_() for _ in range(2))
    tensors, starts = (query, key, value), [t.to(query.device) for t in (STARTS_Q, STARTS_K)]
    output = fk.attention_varlen(*tensors, *starts, 129, 259, **options)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    want, _ = reference.attention_varlen(*wide, *starts, **options)
    direction = torch.randn(output.shape).to(dtype)
    mine = torch.autograd.grad(output, tensors, direction)
    theirs = torch.autograd.grad(want, wide, direction.double())
    close = 3e-2 if dtype in HALF else 1e-4
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=close, atol=close)
    assert (mine[1][:40] == 0).all() and (mine[2][300:] == 0).all()


def gradients(tensors: list[Tensor], **options: Any) -> list[Tensor]:
    return run(lambda *t, **o: fk.attention(*t, return_lse=True, **o), tensors, **options)[2:]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (100, 30), "softcap": 5.0}])
def test_same_bits_run_after_run(backend: str, options: Any, dtype: torch.dtype) -> None:
    tensors = draw((3, 4, 2, 90, 400), 64, dtype)
    first, *others = (gradients(tensors, **options) for _ in range(3))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


SCHEDULED = """
import hashlib, torch, flashkern as fk
torch.manual_seed(0)
shapes = (2, 4, 70, 64), (2, 2, 600, 64), (2, 2, 600, 64)
q, k, v = (torch.randn(shape).bfloat16().requires_grad_() for shape in shapes)
grads = torch.autograd.grad(fk.attention(q, k, v).float().square().sum(), (q, k, v))
print(hashlib.sha256(b"".join(g.float().numpy().tobytes() for g in grads)).hexdigest())
"""


def test_same_bits_in_any_schedule(backend: str) -> None:
    if backend != "emulated":
        pytest.skip("the emulator alone can be told how to schedule")
    bits = set()
    for seed in ("1", "2", "3"):
        environment = {**os.environ, "FLASHKERN_EMULATOR_SEED": seed}
        command = [sys.executable, "-c", SCHEDULED]
        bits.add(subprocess.check_output(command, env=environment, text=True))
    assert len(bits) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rest_of_the_batch_is_no_matter(backend: str, dtype: torch.dtype) -> None:
    tensors = draw((3, 4, 2, 70, 300), 64, dtype)
    output = fk.attention(*tensors, causal=True)
    direction = torch.randn(output.shape).to(dtype)
    whole = torch.autograd.grad(output, tensors, direction)
    one = [t.detach()[1:2].requires_grad_() for t in tensors]
    alone = torch.autograd.grad(fk.attention(*one, causal=True), one, direction[1:2])
    assert all(torch.equal(a[1:2], b) for a, b in zip(whole, alone, strict=True))


def test_nan_stays_in_its_rows(backend: str) -> None:
    """A row of dO that is NaN spoils its own dQ, and the keys that it sees."""
    tensors = draw((1, 2, 2, 150, 150), 32, torch.float32)
    output = fk.attention(*tensors, causal=True)
    direction = torch.randn(output.shape)
    direction[:, :, 100] = torch.nan
    query, key, value = torch.autograd.grad(output, tensors, direction)
    assert query[:, :, 100].isnan().all() and query[:, :, :100].isfinite().all()
    for grad in (key, value):
        assert grad[:, :, :101].isnan().all()


def among_nan(x: Tensor, offset: int) -> Tensor:
    """The same values as a view; all around it, and between its rows and heads, are NaN."""
    batch, heads, rows, dim = x.shape
    around = torch.full((batch, heads + 1, rows + 64, dim + 32), torch.nan, dtype=x.dtype)
    inside = around[:, :heads, 3 : 3 + rows, offset : offset + dim]
    return inside.copy_(x.detach()).requires_grad_(x.requires_grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(40, 72), (136, 136)])
@pytest.mark.parametrize(("rows", "offset"), [(1, 16), (45, 16), (45, 1), (150, 16)])
@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 5.0}])
def test_nothing_around_the_tensors_counts(
    backend: str, options: Any, rows: int, offset: int, dims: tuple[int, int], dtype: torch.dtype
) -> None:
    """Behind the last row and column of a tile lie other tensors, here NaN; aligned or not."""
    tensors = draw((1, 4, 2, rows, 150), dims[0], dtype, dims[1])
    output = fk.attention(*tensors, **options)
    direction = torch.randn(output.shape).to(dtype)
    alone = (output, *torch.autograd.grad(output, tensors, direction))
    views = [among_nan(t, offset) for t in tensors]
    output = fk.attention(*views, **options)
    among = (output, *torch.autograd.grad(output, views, among_nan(direction, offset)))
    assert all(torch.equal(a, b) for a, b in zip(alone, among, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "dim"), [(1, 64), (3, 40), (1, 256)])
def test_nan_in_the_first_row_stays_there(
    backend: str, heads: int, dim: int, dtype: torch.dtype
) -> None:
    """What lies behind the last row of the last tile is not the first row either."""
    tensors = [t.detach() for t in draw((1, heads, 1, 150, 150), dim, dtype)]
    direction = torch.randn(tensors[0].shape).to(dtype)
    for t in (*tensors, direction):
        t[:, :, 0] = torch.nan
    tensors = [t.requires_grad_() for t in tensors]
    output = fk.attention(*tensors, window=(0, 0))
    assert output[:, :, 0].isnan().all()
    for x in (output, *torch.autograd.grad(output, tensors, direction)):
        assert x[:, :, 140:].isfinite().all()


def test_no_heads(backend: str) -> None:
    """And sinks: of no heads either."""
    query, key, value = (torch.randn(2, n, 9, 32, requires_grad=True) for n in (0, 1, 1))
    sinks = torch.randn(0, requires_grad=True)
    output = fk.attention(query, key, value, sinks=sinks)
    grads = torch.autograd.grad(output.sum(), (query, key, value, sinks))
    assert grads[0].shape == query.shape and grads[3].shape == (0,)
    assert all((grad == 0).all() for grad in grads)
