"""tests/lora's bodies over the emulator: the sm_80 kernels' own source, without a GPU."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "lora")]

import emulated_lora  # noqa: E402
import test_lora  # noqa: E402
import test_multi  # noqa: E402
import torch  # noqa: E402

import flashkern as fk  # noqa: E402
from flashkern import reference  # noqa: E402

LIBRARY = os.environ.get("FLASHKERN_EMULATED_LORA", "")
pytestmark = pytest.mark.skipif(not LIBRARY, reason="FLASHKERN_EMULATED_LORA names no library")


@pytest.fixture(scope="session")
def emulated() -> emulated_lora.EmulatedLora:
    return emulated_lora.EmulatedLora(LIBRARY)


@pytest.fixture(autouse=True)
def in_place(emulated: emulated_lora.EmulatedLora, monkeypatch: pytest.MonkeyPatch) -> None:
    emulated.base = "own"
    emulated.put_in_place(monkeypatch, test_lora, test_multi)


@pytest.fixture
def isa() -> str:
    return "emulated"


@pytest.fixture(params=["blas", "own"])
def base(request: pytest.FixtureRequest, emulated: emulated_lora.EmulatedLora) -> Iterator[str]:
    emulated.base = request.param
    yield request.param
    emulated.base = "own"


# The bodies, each with its own parameters; the fixtures above stand in for the CPU's.
SINGLE = [name for name in dir(test_lora) if name.startswith("test_")]
MULTI = [name for name in dir(test_multi) if name.startswith("test_")]
ON_THE_HOST = {"test_an_id_out_of_range_is_refused"}
globals().update({name: getattr(test_lora, name) for name in SINGLE})
globals().update(
    {f"test_multi_{n[5:]}": getattr(test_multi, n) for n in MULTI if n not in ON_THE_HOST}
)


# ---- what the bodies do not reach ----


def problem(rows: int, adapters: int, rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x, weight, a, b, ids; rows of whole 16-byte chunks, as a decoding step has them."""
    a, b = torch.randn(adapters, rank, 128) / 11, torch.randn(adapters, 72, rank) / rank**0.5
    ids = torch.randint(-1, adapters, (rows,))
    return torch.randn(rows, 128).to(dtype), (torch.randn(72, 128) / 11).to(dtype), a, b, ids


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows,rank", [(1, 8), (7, 33), (16, 64), (40, 20), (64, 70)])
def test_few_rows(rows: int, rank: int, dtype: torch.dtype) -> None:
    """One launch for one adapter; a shrink before it for several, for dropout, for high ranks."""
    x, weight, a, b, ids = problem(rows, 3, rank, dtype)
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


@pytest.mark.parametrize("rows", [20, 200])
def test_same_bits_in_any_order_of_blocks(emulated: emulated_lora.EmulatedLora, rows: int) -> None:
    x, weight, a, b, ids = problem(rows, 4, 12, torch.bfloat16)
    scalings, grad = torch.rand(4, dtype=torch.float64), torch.randn(rows, 72).bfloat16()
    runs = []
    for seed in range(3):
        emulated.set_seed(seed)
        y, h = emulated.lora_linear(x, weight, a, b, None, ids, scalings, 1.0, 0.0, None)
        back = emulated.lora_linear_backward(
            grad, x, weight, a, b, h, ids, scalings, 1.0, 0.0, None, True, True, True
        )
        runs.append((y, h, *back))
    emulated.set_seed(1)
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(runs[0], run, strict=True))
    assert not any(t.isnan().any() for t in runs[0])
