"""Lane layouts of a warp's matrix instructions, against the PTX ISA's tables restated in numpy."""

from __future__ import annotations

import numpy as np
import pytest
from machine import EmulatorError, Kernels, decode, encode

LANES = np.arange(32)
G, T = LANES // 4, LANES % 4  # "groupID" and "threadID_in_group" of the ISA


def fragment_a(a: np.ndarray) -> np.ndarray:
    """(32, 4) registers of a 16 x k matrix of 16-bit elements (pairs along k) or 32-bit ones."""
    wide = a.dtype.itemsize == 4
    registers = np.zeros((32, 4), np.uint32)
    for r, (row, half) in enumerate([(0, 0), (8, 0), (0, 1), (8, 1)]):
        if wide:
            registers[:, r] = a[G + row, T + 4 * half]
        else:
            low, high = a[G + row, 2 * T + 8 * half], a[G + row, 2 * T + 8 * half + 1]
            registers[:, r] = low.astype(np.uint32) | high.astype(np.uint32) << 16
    return registers


def fragment_b(b: np.ndarray) -> np.ndarray:
    """(32, 2) registers of a k x 8 matrix."""
    wide = b.dtype.itemsize == 4
    registers = np.zeros((32, 2), np.uint32)
    for r in range(2):
        if wide:
            registers[:, r] = b[T + 4 * r, G]
        else:
            low, high = b[2 * T + 8 * r, G], b[2 * T + 8 * r + 1, G]
            registers[:, r] = low.astype(np.uint32) | high.astype(np.uint32) << 16
    return registers


def fragment_d(d: np.ndarray) -> np.ndarray:
    """(32, 4) registers of a 16 x 8 float32 matrix."""
    return np.stack([d[G + 8 * (r // 2), 2 * T + r % 2] for r in range(4)], axis=1)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_ldmatrix(primitives: Kernels, n: int, transposed: bool) -> None:
    rng = np.random.default_rng(n)
    memory = rng.integers(0, 256, 4096, np.uint8)
    rows = (rng.permutation(256)[:32] * 16).astype(np.int32)
    out = np.zeros((32, n), np.uint32)
    primitives.call("fk_ldmatrix", n, int(transposed), memory, rows, out)
    for i in range(n):
        matrix = np.stack([memory[o : o + 16].view(np.uint16) for o in rows[8 * i : 8 * i + 8]])
        matrix = matrix.T if transposed else matrix
        expected = matrix[G, 2 * T].astype(np.uint32) | matrix[G, 2 * T + 1].astype(np.uint32) << 16
        np.testing.assert_array_equal(out[:, i], expected)


def test_ldmatrix_checks_its_addresses(primitives: Kernels) -> None:
    memory, out = np.zeros(4096, np.uint8), np.zeros((32, 4), np.uint32)
    rows = np.arange(32, dtype=np.int32) * 16
    rows[5] = 8
    with pytest.raises(EmulatorError, match=r"\(5,0,0\).*shared \+ 8 is not a multiple of 16"):
        primitives.call("fk_ldmatrix", 4, 0, memory, rows, out)
    rows[5] = 4096 - 8
    with pytest.raises(EmulatorError, match=r"shared \+ 4088 is outside the block's 4096 bytes"):
        primitives.call("fk_ldmatrix", 4, 0, memory, rows, out)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mma(primitives: Kernels, dtype: str) -> None:
    rng = np.random.default_rng(0)
    a, b = (encode(rng.standard_normal(s), dtype) for s in [(16, 16), (16, 8)])
    c = rng.standard_normal((16, 8)).astype(np.float32)
    d = fragment_d(c)
    kind = ["bfloat16", "float16"].index(dtype)
    primitives.call("fk_mma", kind, fragment_a(a), fragment_b(b), d)
    expected = decode(a, dtype) @ decode(b, dtype) + c
    np.testing.assert_allclose(d, fragment_d(expected), rtol=1e-5, atol=1e-5)


def test_mma_tf32_drops_the_low_bits(primitives: Kernels) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(s).astype(np.float32).view(np.uint32) for s in [(16, 8), (8, 8)])
    d = np.zeros((32, 4), np.float32)
    primitives.call("fk_mma", 2, fragment_a(a), fragment_b(b), d)
    cut = [(x & np.uint32(0xFFFFE000)).view(np.float32) for x in (a, b)]
    np.testing.assert_allclose(d, fragment_d(cut[0] @ cut[1]), rtol=1e-5, atol=1e-5)


def test_mma_tf32_cuts_its_sums(primitives: Kernels) -> None:
    """What does not fit a float32 is dropped, where a float's own sum would be rounded up."""
    a, b = (np.full(s, x, np.float32) for s, x in (((16, 8), 2.0**-13), ((8, 8), 1.5 * 2**-14)))
    d = fragment_d(np.ones((16, 8), np.float32))
    primitives.call("fk_mma", 2, fragment_a(a.view(np.uint32)), fragment_b(b.view(np.uint32)), d)
    assert (d == 1).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_pack_and_unpack(primitives: Kernels, dtype: str) -> None:
    rng = np.random.default_rng(0)
    edges = [0, -0.0, 1, 65504, 65519, 65520, 1e-8, 6e-8, np.inf, -np.inf, 3.3895e38, 1.0039062]
    x = np.concatenate([edges, rng.standard_normal(500) * 10.0 ** rng.integers(-8, 5, 500)])
    x = x.astype(np.float32)
    pairs, back = np.zeros(256, np.uint32), np.zeros(512, np.float32)
    with np.errstate(over="ignore"):
        expected = encode(x, dtype)
    kind = ["bfloat16", "float16"].index(dtype)
    primitives.call("fk_convert", kind, x, pairs, back, 512)
    np.testing.assert_array_equal(pairs.view(np.uint16), expected)
    np.testing.assert_array_equal(back, decode(expected, dtype))


def test_approximations(primitives: Kernels) -> None:
    edges = [0, 1, -1, 0.5, 10, -140, -np.inf, np.inf, 1e-40, 3.14159, -20.7, 1.000977]
    x = np.array(edges, np.float32)
    exp2, tf32 = (np.zeros(12, np.float32) for _ in range(2))
    primitives.call("fk_approximate", x, exp2, tf32, 12)
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(exp2, np.where(x < -126, 0, np.exp2(x)), rtol=1e-6)
    ten_bits = np.abs(tf32[:5] - x[:5]) <= np.abs(x[:5]) * 2.0**-11
    assert ten_bits.all()
    assert not (tf32.view(np.uint32) & 0x1FFF).any()


@pytest.mark.parametrize("size", [4, 8, 16])
def test_copy_async_zero_fill(primitives: Kernels, size: int) -> None:
    rng = np.random.default_rng(0)
    memory = rng.integers(1, 256, 32 * size, np.uint8)
    for taken in {0, 1, size // 2, size}:
        out = np.full(32 * size, 99, np.uint8)
        primitives.call("fk_copy", size, memory, taken, out)
        expected = memory.reshape(32, size).copy()
        expected[:, taken:] = 0
        np.testing.assert_array_equal(out, expected.ravel())
