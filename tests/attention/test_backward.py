"""The backward pass where its tiles of keys and rows begin, end and meet, on every back end."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from test_attention import GPU, HALF, check, draw, run
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
    if dtype in HALF and backend not in GPU:
        pytest.skip("a CPU is held to one rounding, and delta is made of an output already rounded")
    check(draw(shape, dim, dtype), **options)


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
