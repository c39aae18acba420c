"""The limits of this machine, measured in the run whose results they judge.

fma    multiply-adds in registers, nothing else: no float32 kernel can do more FLOP/s.
bf16   the same with pairs of bfloat16, where the CPU multiplies those; else it is fma.
read   reading a working set of a given size and adding it up: what a kernel that reads every byte
       once can reach. A set that fits a cache is read at the cache's speed.
gemm   torch's float32 matrix product of 1536 x 1536: what a tuned library makes of the fma limit.

Each is the best of several tries at the start and at the end of a run. A GPU's (`measure_gpu`) are
cuBLAS's rate in a bfloat16 product and, for each size, what a copy reads and writes.
"""

from __future__ import annotations

import functools
import math
import time
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch

import flashkern
from benchmarks.clock import Clock
from flashkern import _host

READ_BYTES = tuple(1 << power for power in range(17, 29))  # 128 KiB to 256 MiB
_GEMM = 1536


@dataclass
class Roof:
    """FLOP/s and bytes/s on `threads` threads; `read` by working set in bytes."""

    threads: int
    fma: float
    gemm: float
    read: dict[int, float] = field(default_factory=dict)
    gpu: bool = False  # then `fma` is `gemm`, `read` is a copy's bandwidth, and `threads` is 0
    call: float = 0.0  # seconds that the clock shows for a call that does nothing
    bf16: float = 0.0  # of bfloat16 in pairs; 0 where that is no faster

    @property
    def memory(self) -> float:
        """Bytes/s of the largest working set."""
        return self.read[max(self.read)]

    def read_at(self, size: int) -> float:
        """Bytes/s for a working set of `size` bytes, interpolated between the measured sizes."""
        sizes = sorted(self.read)
        if size <= sizes[0]:
            return self.read[sizes[0]]
        for low, high in zip(sizes, sizes[1:], strict=False):
            if size <= high:
                part = math.log(size / low) / math.log(high / low)
                return self.read[low] ** (1 - part) * self.read[high] ** part
        return self.read[sizes[-1]]

    def least_seconds(self, flops: float, size: float, dtype: str = "f32") -> tuple[float, str]:
        """The least time for that much work, and the limit that sets it, by its name above."""
        pairs = dtype == "bf16" and self.bf16 > self.fma
        memory = size / self.read_at(int(size))
        compute = flops / (self.bf16 if pairs else self.fma)
        if self.gpu:
            return (compute, "gemm") if compute >= memory else (memory, "copy")
        return (compute, "bf16" if pairs else "fma") if compute >= memory else (memory, "read")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Roof:
        read = {int(size): speed for size, speed in data["read"].items()}
        more = {name: data[name] for name in ("gpu", "call", "bf16") if name in data}
        return Roof(data["threads"], data["fma"], data["gemm"], read, **more)


def _gemm(threads: int, seconds: float) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a, b = torch.randn(_GEMM, _GEMM), torch.randn(_GEMM, _GEMM)
        out, best = torch.mm(a, b), math.inf
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or best == math.inf:
            start = time.perf_counter()
            torch.mm(a, b, out=out)
            best = min(best, time.perf_counter() - start)
        return 2 * _GEMM**3 / best
    finally:
        torch.set_num_threads(before)


def measure(threads: int, seconds: float = 1.5) -> Roof:
    """Measures every limit on `threads` threads in about `seconds` seconds."""
    part = seconds / 4
    sizes = [size for size in READ_BYTES if size >= 1024 * threads]
    read = {size: _host.read_peak(size, threads, 2 * part / len(sizes)) for size in sizes}
    fma, pairs = (_host.fma_peak(threads, part / 2, pairs=pairs) for pairs in (False, True))
    bf16 = pairs if flashkern.cpu_isa().endswith("_bf16") else 0.0
    return Roof(threads, fma, _gemm(threads, part), read, bf16=bf16)


def _product(clock: Clock, device: str, n: int) -> float:
    """FLOP/s of torch's bfloat16 product of n x n."""
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    out = torch.mm(a, b)
    return 2 * n**3 / median(clock.seconds(lambda: torch.mm(a, b, out=out), 5) for _ in range(5))


def _copies(clock: Clock, device: str, most: int) -> dict[int, float]:
    """Bytes/s of copies, read and written bytes together, by their number."""
    source = torch.ones(most // 2, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    found = {}
    for size in (most >> shift for shift in range(11)):
        call = functools.partial(target[: size // 2].copy_, source[: size // 2])
        found[size] = size / min(clock.seconds(call, 5) for _ in range(4))
    return found


def measure_gpu(clock: Clock, device: str, gemm: int, most: int) -> Roof:
    """A GPU's limits by `clock`: a product of `gemm` cubed, copies that move up to `most` bytes."""
    rate, copies = _product(clock, device, gemm), _copies(clock, device, most)
    nothing = median(clock.seconds(lambda: None, 10) for _ in range(3))
    return Roof(0, rate, rate, copies, True, nothing)


def best(one: Roof, other: Roof) -> Roof:
    """The higher of two measurements of the same machine, limit by limit."""
    read = {size: max(one.read[size], other.read[size]) for size in one.read}
    fma, gemm = max(one.fma, other.fma), max(one.gemm, other.gemm)
    call, bf16 = min(one.call, other.call), max(one.bf16, other.bf16)
    return Roof(one.threads, fma, gemm, read, one.gpu, call, bf16)
