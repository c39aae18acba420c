"""TMA, wgmma, stmatrix and clusters, against the PTX ISA restated in numpy."""

from __future__ import annotations

import numpy as np
import pytest
from machine import HERE, EmulatorError, Kernels, bfloat16, decode, encode, from_bfloat16
from test_layouts import LANES, G, T, fragment_a

SPANS = {0: 16, 1: 128, 2: 64, 3: 32}  # bytes of a row that a swizzle mode turns


def turned(offset: np.ndarray, swizzle: int) -> np.ndarray:
    """Swizzle<B, 4, 3>: address bits 4.. are turned by bits 7.., B of them."""
    bits = {0: 0, 1: 3, 2: 2, 3: 1}[swizzle]
    return offset ^ (((offset >> 7) & ((1 << bits) - 1)) << 4)


def box_of(x: np.ndarray, at: list[int], box: list[int]) -> np.ndarray:
    """The box at `at` (innermost first), zeros outside."""
    out = np.zeros(box[::-1], x.dtype)
    for index in np.ndindex(*out.shape):
        source = [i + o for i, o in zip(index, at[::-1], strict=True)]
        if all(0 <= s < e for s, e in zip(source, x.shape, strict=True)):
            out[index] = x[tuple(source)]
    return out


def map_shape(x: np.ndarray, box: list[int]) -> np.ndarray:
    return np.array([*x.shape[::-1], *box, *x.strides[::-1]], np.int32)


CASES = [
    ((40, 72), [8, 16], [5, 3], 0),
    ((40, 72), [64, 16], [0, 0], 1),
    ((40, 72), [64, 16], [32, 32], 1),
    ((40, 72), [64, 16], [-3, -2], 1),
    ((40, 72), [32, 8], [50, 37], 2),
    ((40, 72), [16, 24], [8, 1], 3),
    ((5, 40, 72), [64, 8, 2], [16, 36, 4], 1),
    ((3, 5, 24, 64), [64, 8, 1, 2], [0, 20, 2, 2], 1),
    ((3, 5, 24, 64), [32, 4, 2, 1], [40, -1, 4, 0], 2),
]


@pytest.mark.parametrize(("shape", "box", "at", "swizzle"), CASES)
def test_tma_load(hopper: Kernels, shape, box, at, swizzle) -> None:
    x = np.random.default_rng(0).integers(1, 60000, shape).astype(np.uint16)
    bytes_ = int(np.prod(box)) * 2
    out = np.zeros(bytes_, np.uint8)
    hopper.call("fk_tma_load", 0, x, len(box), map_shape(x, box), swizzle,
                np.array(at, np.int32), bytes_, out)  # fmt: skip
    straight = box_of(x, at, box).view(np.uint8).ravel()
    np.testing.assert_array_equal(out[turned(np.arange(bytes_), swizzle)], straight)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("shape", "box", "at", "swizzle"), CASES)
def test_tma_store(hopper: Kernels, shape, box, at, swizzle, add) -> None:
    rng = np.random.default_rng(0)
    before = rng.integers(0, 100, shape).astype(np.float32)
    x = bfloat16(before)
    tile = rng.integers(1, 50, box[::-1]).astype(np.float32)
    straight = bfloat16(tile).view(np.uint8).ravel()
    laid = np.zeros_like(straight)
    laid[turned(np.arange(laid.size), swizzle)] = straight
    hopper.call("fk_tma_store", 0, x, len(box), map_shape(x, box), swizzle,
                np.array(at, np.int32), laid.size, laid, int(add))  # fmt: skip
    expected = before.copy()
    for index in np.ndindex(*tile.shape):
        target = tuple(i + o for i, o in zip(index, at[::-1], strict=True))
        if all(0 <= t < e for t, e in zip(target, shape, strict=True)):
            expected[target] = tile[index] + (before[target] if add else 0)
    np.testing.assert_array_equal(from_bfloat16(x), expected)


def test_tensor_map_is_checked(hopper: Kernels) -> None:
    x = np.zeros((8, 72), np.uint16)
    at = np.zeros(2, np.int32)
    with pytest.raises(EmulatorError, match="as many bytes as its swizzle spans"):
        hopper.call("fk_tma_load", 0, x, 2, map_shape(x, [32, 8]), 1, at, 0, x)
    odd = np.array([72, 8, 64, 8, 2, 146], np.int32)
    with pytest.raises(EmulatorError, match="strides must be multiples of 16"):
        hopper.call("fk_tma_load", 0, x, 2, odd, 1, at, 0, x)


# ---- wgmma: where element (row, k) of an operand lies, by CUTLASS's canonical layouts ----


def k_major(row: np.ndarray, k: np.ndarray, swizzle: int, leading: int, stride: int) -> np.ndarray:
    """((8, m), (8, 2)) : ((x 8, SBO), (1, LBO or 8)), x = chunks of the swizzle's span."""
    span = SPANS[swizzle]
    between_chunks = leading if swizzle == 0 else 16
    offset = row % 8 * span + row // 8 * stride + k % 8 * 2 + k // 8 * between_chunks
    return turned(offset, swizzle)


def mn_major(row: np.ndarray, k: np.ndarray, swizzle: int, leading: int, stride: int) -> np.ndarray:
    """((8, x, m), (8, k)) : ((1, 8, LBO), (x 8, SBO)); unswizzled, LBO and SBO change places."""
    span = SPANS[swizzle]
    if swizzle == 0:
        leading, stride = stride, leading
    wide = span // 2  # elements of M or N in a row of the atom
    offset = row % wide * 2 + row // wide * leading + k % 8 * span + k // 8 * stride
    return turned(offset, swizzle)


def lay(memory: np.ndarray, x: np.ndarray, major: int, layout: list[int]) -> None:
    """Puts the (rows, 16) operand x into memory as `layout` = swizzle, leading, stride, start."""
    row, k = np.meshgrid(np.arange(x.shape[0]), np.arange(16), indexing="ij")
    where = (mn_major if major else k_major)(row, k, *layout[:3])
    memory.view(np.uint16)[(where + layout[3]) // 2] = x


def accumulator(d: np.ndarray) -> np.ndarray:
    """(64, n) from (128 lanes, n / 2)."""
    lanes, registers = d.shape
    out = np.zeros((64, registers * 2), np.float32)
    for lane in range(lanes):
        for r in range(registers):
            row = lane // 32 * 16 + lane % 32 // 4 + r // 2 % 2 * 8
            out[row, r // 4 * 8 + lane % 4 * 2 + r % 2] = d[lane, r]
    return out


def layout(major: int, swizzle: int, rows: int, start: int) -> list[int]:
    """Strides with gaps, so that each is told apart from the others."""
    span = SPANS[swizzle]
    atom = 8 * span
    if major == 0:
        return [swizzle, atom * (rows // 8) if swizzle == 0 else 16, atom, start]
    if swizzle == 0:
        return [swizzle, 128, 256, start]  # leading along k, stride along M or N
    return [swizzle, 2 * atom, atom, start]  # leading along M or N, stride along k


@pytest.mark.parametrize("swizzle", [0, 1, 2, 3])
@pytest.mark.parametrize("majors", [0, 1, 2, 3])
@pytest.mark.parametrize(("dtype", "n"), [("bfloat16", 8), ("bfloat16", 64), ("bfloat16", 256),
                                          ("float16", 64)])  # fmt: skip
def test_wgmma(hopper: Kernels, dtype: str, n: int, majors: int, swizzle: int) -> None:
    if majors >= 2 and n == 8 and swizzle != 0:
        pytest.skip("8 columns are narrower than the swizzle's span")
    rng = np.random.default_rng(n)
    a, b = (encode(rng.standard_normal(s), dtype) for s in [(64, 16), (n, 16)])
    memory = np.zeros(64 << 10, np.uint8)
    layouts = [layout(majors & 1, swizzle, 64, 0), layout(majors >> 1, swizzle, n, 32768)]
    lay(memory, a, majors & 1, layouts[0])
    lay(memory, b, majors >> 1, layouts[1])
    d = rng.standard_normal((128, n // 2)).astype(np.float32)
    before = accumulator(d)
    hopper.call("fk_wgmma", int(dtype == "float16"), n, majors, memory,
                np.array(layouts, np.int32), d)  # fmt: skip
    expected = decode(a, dtype) @ decode(b, dtype).T + before
    np.testing.assert_allclose(accumulator(d), expected, rtol=1e-4, atol=1e-4)


def test_wgmma_k_step_inside_the_swizzle(hopper: Kernels) -> None:
    """The third K step of a 128-byte row: the descriptor starts 64 bytes further."""
    rng = np.random.default_rng(1)
    a, b = (encode(rng.standard_normal((r, 64)), "bfloat16") for r in (64, 64))
    memory = np.zeros(64 << 10, np.uint8)
    for x, start in ((a, 0), (b, 32768)):
        row, column = np.meshgrid(np.arange(64), np.arange(64), indexing="ij")
        memory.view(np.uint16)[(turned(row * 128 + column * 2, 1) + start) // 2] = x
    d = np.zeros((128, 32), np.float32)
    layouts = np.array([[1, 16, 1024, 64], [1, 16, 1024, 32768 + 64]], np.int32)
    hopper.call("fk_wgmma", 0, 64, 0, memory, layouts, d)
    left, right = (from_bfloat16(x[:, 32:48]) for x in (a, b))
    np.testing.assert_allclose(accumulator(d), left @ right.T, rtol=1e-4, atol=1e-4)


def test_wgmma_from_registers(hopper: Kernels) -> None:
    rng = np.random.default_rng(1)
    a, b = (bfloat16(rng.standard_normal((64, 16))) for _ in range(2))
    memory = np.zeros(64 << 10, np.uint8)
    lay(memory, b, 0, layout(0, 1, 64, 0))
    registers = np.concatenate([fragment_a(a[16 * w : 16 * w + 16]) for w in range(4)])
    d = np.zeros((128, 32), np.float32)
    hopper.call("fk_wgmma_registers", memory, registers, np.array(layout(0, 1, 64, 0), np.int32), d)
    expected = from_bfloat16(a) @ from_bfloat16(b).T
    np.testing.assert_allclose(accumulator(d), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_stmatrix(hopper: Kernels, n: int, transposed: bool) -> None:
    rng = np.random.default_rng(n)
    s = rng.integers(0, 2**32, (32, n), np.uint32)
    rows = (rng.permutation(256)[:32] * 16).astype(np.int32)
    out = np.zeros(4096, np.uint8)
    hopper.call("fk_stmatrix", n, int(transposed), s, rows, out)
    expected = np.zeros(2048, np.uint16)
    for i in range(n):
        matrix = np.zeros((8, 8), np.uint16)
        for lane in LANES:
            first, second = (G[lane], 2 * T[lane]), (G[lane], 2 * T[lane] + 1)
            matrix[first], matrix[second] = s[lane, i] & 0xFFFF, s[lane, i] >> 16
        for r, offset in enumerate(rows[8 * i : 8 * i + 8]):
            line = matrix.T[r] if transposed else matrix[r]
            expected[offset // 2 : offset // 2 + 8] = line
    np.testing.assert_array_equal(out.view(np.uint16), expected)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_cluster(hopper: Kernels, size: int) -> None:
    """Distributed shared memory, the cluster's barrier, one load for all of its blocks."""
    x = np.arange(16 * 64, dtype=np.uint16).reshape(16, 64)
    blocks, bytes_ = 8, 16 * 64 * 2
    ranks, tiles = np.zeros((blocks, size), np.int32), np.zeros((blocks, bytes_), np.uint8)
    hopper.call("fk_cluster", x, map_shape(x, [64, 16]), ranks, tiles, bytes_, blocks, size)
    np.testing.assert_array_equal(ranks, np.tile(100 + np.arange(size), (blocks, 1)))
    np.testing.assert_array_equal(tiles, np.tile(x.view(np.uint8).ravel(), (blocks, 1)))


def test_the_async_proxy_needs_its_fence() -> None:
    """Ordinary stores that TMA or wgmma reads: the race detector misses fence_async."""
    text = (HERE / "hopper.cu").read_text().replace("ptx::fence_async();", "")
    kernels = Kernels(text, "race")
    told = r"reads through the async proxy, without fence_async since the write of"
    x, tile = np.zeros((16, 64), np.uint16), np.zeros(2048, np.uint8)
    at = np.zeros(2, np.int32)
    with pytest.raises(EmulatorError, match=told):
        kernels.call("fk_tma_store", 0, x, 2, map_shape(x, [64, 16]), 1, at, 2048, tile, 0)
    memory, d = np.zeros(64 << 10, np.uint8), np.zeros((128, 32), np.float32)
    layouts = np.array([layout(0, 1, 64, 0), layout(0, 1, 64, 32768)], np.int32)
    with pytest.raises(EmulatorError, match=told):
        kernels.call("fk_wgmma", 0, 64, 0, memory, layouts, d)
