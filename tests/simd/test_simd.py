"""csrc/simd against float64 and against torch, in every instruction set of this machine."""

import numpy as np
import pytest
import torch

from flashkern import _host, random


def ulps(got: np.ndarray, exact: np.ndarray) -> float:
    """Largest error in units of the last place of the exact value, for normal results."""
    rounded = exact.astype(np.float32)
    return float(np.max(np.abs(got.astype(np.float64) - exact) / np.spacing(np.abs(rounded))))


def sweep(low: float, high: float) -> np.ndarray:
    return np.random.default_rng(0).uniform(low, high, 400_003).astype(np.float32)


@pytest.mark.parametrize(
    ("function", "low", "high", "bound"),
    [("exp", -87.0, 88.0, 2.0), ("exp2_below_zero", -125.0, 0.0, 2.75), ("tanh", -10.0, 10.0, 4.0)],
)
def test_error_bound(isa: str, function: str, low: float, high: float, bound: float) -> None:
    near = [sweep(-1.0, min(high, 1.0)), sweep(-1e-3, min(high, 1e-3))]
    x = np.concatenate([sweep(low, high), *near])
    exact = getattr(np, function.removesuffix("_below_zero"))(x.astype(np.float64))
    assert ulps(_host.simd_map(isa, function, x), exact) <= bound


@pytest.mark.parametrize(
    ("function", "cases"),
    [
        ("exp", {-np.inf: 0.0, -200.0: 0.0, 0.0: 1.0, 89.0: np.inf, np.inf: np.inf}),
        ("exp2_below_zero", {-np.inf: 0.0, -1e30: 0.0, -125.1: 0.0, -10.0: 2.0**-10, 0.0: 1.0}),
        ("tanh", {-np.inf: -1.0, -100.0: -1.0, 0.0: 0.0, 100.0: 1.0, np.inf: 1.0}),
    ],
)
def test_limits(isa: str, function: str, cases: dict[float, float]) -> None:
    got = _host.simd_map(isa, function, np.array(list(cases), dtype=np.float32))
    assert got.tolist() == list(cases.values())
    quiet = np.array([0x7FC00000, 0xFFC00000, 0x7FC00001, 0x7FFFFFFF, 0xFFFFFFFF], dtype=np.uint32)
    assert np.isnan(_host.simd_map(isa, function, quiet.view(np.float32))).all()


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_rounding_is_torchs(isa: str, name: str) -> None:
    dtype = getattr(torch, name)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()
    between = torch.randn(100_000) * torch.logspace(-9, 6, 100_000)
    halfway = (every[1:] + every[:-1]) / 2
    x = torch.cat([every, between, halfway, torch.tensor([65519.0, 65520.0, 1e-8, 3.4e38])])
    got = torch.from_numpy(_host.simd_map(isa, name, x.numpy()))
    want = x.to(dtype).float()
    same = (got == want) | (got.isnan() & want.isnan())
    assert same.all(), x[~same][:5]


@pytest.mark.parametrize("count", [1, 4, 31, 32, 33, 64, 257])
def test_philox_is_the_definition(isa: str, count: int) -> None:
    key, begin = 0x0123456789ABCDEF, 12
    got = _host.simd_philox(isa, key, begin, count, 7, 0xFFFFFFFF, 3)
    quads = torch.arange(begin // 4, (begin + count + 3) // 4)
    fixed = [torch.tensor(c, dtype=torch.int64) for c in (7, 0xFFFFFFFF, 3)]
    assert got.tolist() == random.philox(key, quads, *fixed).flatten()[:count].tolist()


@pytest.mark.parametrize("accumulate", [False, True])
def test_gemm_of_bfloat16_pairs(isa: str, accumulate: bool) -> None:
    draw = np.random.default_rng(0)
    sizes = [1, 2, 5, 6, 7, 13, 14, 15, 33, 64, 71]
    two_steps = [[33, 40, 20], [16, 32, 32]]  # of a sum of tiles
    for rows, columns, half in draw.choice(sizes, (40, 3)).tolist() + [[3, 5, 0], *two_steps]:
        depth = 2 * half
        a = draw.standard_normal((rows, depth)).astype(np.float32)
        b = draw.standard_normal((depth, columns)).astype(np.float32)
        start = draw.standard_normal((rows, columns)).astype(np.float32)
        got = _host.simd_pairs(isa, a, b, start, 0.75, accumulate)
        a, b = (torch.from_numpy(x).bfloat16().double().numpy() for x in (a, b))
        exact = 0.75 * (a @ b) + (start if accumulate else 0)
        bound = np.abs(a) @ np.abs(b) + np.abs(start)
        assert np.all(np.abs(got - exact) <= (depth + 3) * 2.0**-24 * bound + 1e-30)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_gemm(isa: str, accumulate: bool, transposed: bool) -> None:
    draw = np.random.default_rng(0)
    sizes = [1, 2, 5, 6, 7, 13, 14, 15, 33, 64, 71]
    for rows, columns, depth in draw.choice(sizes, (60, 3)).tolist() + [[1, 1, 0], [7, 40, 0]]:
        a = draw.standard_normal((rows, depth)).astype(np.float32)
        b = draw.standard_normal((depth, columns)).astype(np.float32)
        start = draw.standard_normal((rows, columns)).astype(np.float32)
        given = np.ascontiguousarray(a.T) if transposed else a
        got = _host.simd_gemm(isa, given, b, start, transposed, accumulate)
        exact = a.astype(np.float64) @ b + (start if accumulate else 0)
        bound = np.abs(a) @ np.abs(b) + np.abs(start)
        assert np.all(np.abs(got - exact) <= (depth + 1) * 2.0**-24 * bound + 1e-30)
