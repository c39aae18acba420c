"""What each primitive with a lane layout does to given inputs: cases for the emulator and a GPU.

Operands of products are small integers, whose sums float32 holds exactly in any order: so every
case is compared bit for bit, and a layout that is off by one lane cannot hide behind a tolerance.
The inputs are drawn from fixed seeds; a GPU's outputs are kept in golden/<architecture>.npz.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from machine import HERE, Argument, encode
from test_hopper import CASES, SPANS, lay, layout, map_shape
from test_layouts import fragment_a, fragment_b, fragment_d

FOLDER = HERE / "golden"
DTYPES = ("bfloat16", "float16")


class Callable(Protocol):
    def call(self, name: str, *arguments: Argument) -> None: ...


@dataclass
class Case:
    """An entry point of a .cu file, its arguments, and which of them it writes."""

    name: str
    source: str
    entry: str
    arguments: tuple[Argument, ...]
    outputs: tuple[int, ...]

    def run(self, kernels: Callable) -> list[np.ndarray]:
        """The outputs; the inputs stay as they are."""
        own = [a.copy() if isinstance(a, np.ndarray) else a for a in self.arguments]
        kernels.call(self.entry, *own)
        return [a for i in self.outputs if isinstance(a := own[i], np.ndarray)]

    def key(self) -> str:
        """Tells whether vectors were recorded from these very inputs."""
        digest = hashlib.sha1(self.entry.encode())
        for argument in self.arguments:
            digest.update(np.ascontiguousarray(argument).tobytes())
        return digest.hexdigest()[:12]


def _integers(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(-8, 9, shape).astype(np.float32)


def _rows(rng: np.random.Generator) -> np.ndarray:
    return (rng.permutation(256)[:32] * 16).astype(np.int32)


def _ampere() -> Iterator[Case]:
    rng = np.random.default_rng(11)
    file = "primitives.cu"
    for n in (1, 2, 4):
        for turned in (0, 1):
            memory = rng.integers(0, 256, 4096, np.uint8)
            arguments = (n, turned, memory, _rows(rng), np.zeros((32, n), np.uint32))
            name = f"ldmatrix x{n}{' trans' * turned}"
            yield Case(name, file, "fk_ldmatrix", arguments, (4,))
    for kind, dtype in enumerate(DTYPES):
        a, b = (encode(_integers(rng, *s), dtype) for s in ((16, 16), (16, 8)))
        d = fragment_d(_integers(rng, 16, 8))
        arguments = (kind, fragment_a(a), fragment_b(b), d)
        yield Case(f"mma m16n8k16 {dtype}", file, "fk_mma", arguments, (3,))
    a, b = (_integers(rng, *s).view(np.uint32) for s in ((16, 8), (8, 8)))
    arguments = (2, fragment_a(a), fragment_b(b), fragment_d(_integers(rng, 16, 8)))
    yield Case("mma m16n8k8 tf32", file, "fk_mma", arguments, (3,))
    low = (rng.standard_normal((16, 8)).astype(np.float32).view(np.uint32), b)
    one = np.eye(8, dtype=np.float32).view(np.uint32)
    arguments = (2, fragment_a(low[0]), fragment_b(one), np.zeros((32, 4), np.float32))
    yield Case("mma tf32 drops low bits", file, "fk_mma", arguments, (3,))
    edges = [0, -0.0, 1, 65504, 65519, 65520, 1e-8, 6e-8, np.inf, -np.inf, 3.3895e38, 1.0039062]
    x = np.concatenate([edges, rng.standard_normal(500) * 10.0 ** rng.integers(-8, 5, 500)])
    for kind, dtype in enumerate(DTYPES):
        arguments = (kind, x.astype(np.float32), np.zeros(256, np.uint32),
                     np.zeros(512, np.float32), 512)  # fmt: skip
        yield Case(f"convert {dtype}", file, "fk_convert", arguments, (2, 3))
    for size in (4, 8, 16):
        for taken in sorted({0, 1, size // 2, size}):
            memory = rng.integers(1, 256, 32 * size, np.uint8)
            out = np.full(32 * size, 99, np.uint8)
            name = f"cp.async {size} bytes, {taken} taken"
            yield Case(name, file, "fk_copy", (size, memory, taken, out), (3,))


def _tma() -> Iterator[Case]:
    rng = np.random.default_rng(12)
    for index, (shape, box, at, swizzle) in enumerate(CASES):
        x = rng.integers(1, 60000, shape).astype(np.uint16)
        size = int(np.prod(box)) * 2
        where = np.array(at, np.int32)
        head = (0, x, len(box), map_shape(x, box), swizzle, where, size)
        arguments = (*head, np.zeros(size, np.uint8))
        yield Case(
            f"tma load {index} swizzle {swizzle}", "hopper.cu", "fk_tma_load", arguments, (7,)
        )
        tile = encode(rng.integers(1, 50, size // 2).astype(np.float32), "bfloat16")
        there = encode(rng.integers(0, 100, shape).astype(np.float32), "bfloat16")
        head = (0, there, len(box), map_shape(there, box), swizzle, where, size)
        for add in (0, 1):
            name = f"tma {'add' if add else 'store'} {index} swizzle {swizzle}"
            arguments = (*head, tile.view(np.uint8), add)
            yield Case(name, "hopper.cu", "fk_tma_store", arguments, (1,))


def _wgmma() -> Iterator[Case]:
    rng = np.random.default_rng(13)
    for dtype, n in (("bfloat16", 8), ("bfloat16", 64), ("bfloat16", 256), ("float16", 64)):
        for majors in range(4):
            for swizzle in SPANS:
                if majors >= 2 and n == 8 and swizzle != 0:
                    continue  # 8 columns are narrower than the swizzle's span
                memory = np.zeros(64 << 10, np.uint8)
                layouts = [
                    layout(majors & 1, swizzle, 64, 0),
                    layout(majors >> 1, swizzle, n, 32768),
                ]
                for rows, major, where in (
                    (64, majors & 1, layouts[0]),
                    (n, majors >> 1, layouts[1]),
                ):
                    lay(memory, encode(_integers(rng, rows, 16), dtype), major, where)
                arguments = (int(dtype == "float16"), n, majors, memory,
                             np.array(layouts, np.int32), _integers(rng, 128, n // 2))  # fmt: skip
                name = f"wgmma m64n{n}k16 {dtype} majors {majors} swizzle {swizzle}"
                yield Case(name, "hopper.cu", "fk_wgmma", arguments, (5,))
    memory, where = np.zeros(64 << 10, np.uint8), layout(0, 1, 64, 0)
    lay(memory, encode(_integers(rng, 64, 16), "bfloat16"), 0, where)
    a = encode(_integers(rng, 64, 16), "bfloat16")
    left = np.concatenate([fragment_a(a[16 * w : 16 * w + 16]) for w in range(4)])
    arguments = (memory, left, np.array(where, np.int32), np.zeros((128, 32), np.float32))
    yield Case("wgmma, A in registers", "hopper.cu", "fk_wgmma_registers", arguments, (3,))


def _hopper() -> Iterator[Case]:
    yield from _tma()
    yield from _wgmma()
    rng = np.random.default_rng(14)
    for n in (1, 2, 4):
        for turned in (0, 1):
            registers = rng.integers(0, 2**32, (32, n), np.uint32)
            arguments = (n, turned, registers, _rows(rng), np.zeros(4096, np.uint8))
            name = f"stmatrix x{n}{' trans' * turned}"
            yield Case(name, "hopper.cu", "fk_stmatrix", arguments, (4,))
    for size in (1, 2, 4):
        x = np.arange(16 * 64, dtype=np.uint16).reshape(16, 64)
        ranks, tiles = np.zeros((8, size), np.int32), np.zeros((8, 2048), np.uint8)
        arguments = (x, map_shape(x, [64, 16]), ranks, tiles, 2048, 8, size)
        yield Case(f"cluster of {size}", "hopper.cu", "fk_cluster", arguments, (2, 3))


def cases(hopper: bool) -> list[Case]:
    """Every case: those of sm_80, and with `hopper` those of sm_90a."""
    return [*_ampere(), *(_hopper() if hopper else ())]


def save(path: Path, results: dict[str, list[np.ndarray]], keys: dict[str, str]) -> None:
    """One .npz: "<name>/<output>", and "<name>" for the key of the inputs."""
    arrays = {f"{name}/{i}": a for name, found in results.items() for i, a in enumerate(found)}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays, **{name: np.array(key) for name, key in keys.items()})


def compare(path: Path, case: Case, kernels: Callable) -> str | None:
    """How the kernels differ from the vectors in `path`; None where every bit is equal."""
    with np.load(path) as stored:
        if case.name not in stored:
            return "has no vectors"
        if str(stored[case.name]) != case.key():
            return "its vectors are of other inputs: record them again"
        for i, mine in enumerate(case.run(kernels)):
            theirs = stored[f"{case.name}/{i}"]
            differ = mine.view(np.uint8) != theirs.view(np.uint8)
            if differ.any():
                return f"{int(differ.sum())} of {differ.size} bytes of output {i} differ"
    return None
