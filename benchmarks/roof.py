"""The limits of this machine, measured in the run whose results they judge.

fma    multiply-adds in registers, nothing else: no float32 kernel can do more FLOP/s.
read   reading a working set of a given size and adding it up: what a kernel that reads every byte
       once can reach. A set that fits a cache is read at the cache's speed.
gemm   torch's float32 matrix product of 1536 x 1536: what a tuned library makes of the fma limit.

Each is the best of several tries at the start and at the end of a run.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

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

    def least_seconds(self, flops: float, size: float) -> tuple[float, str]:
        """The least time for that much work, and the limit that sets it: "fma" or "read"."""
        compute, memory = flops / self.fma, size / self.read_at(int(size))
        return (compute, "fma") if compute >= memory else (memory, "read")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Roof:
        read = {int(size): speed for size, speed in data["read"].items()}
        return Roof(data["threads"], data["fma"], data["gemm"], read)


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
    return Roof(threads, _host.fma_peak(threads, part), _gemm(threads, part), read)


def best(one: Roof, other: Roof) -> Roof:
    """The higher of two measurements of the same machine, limit by limit."""
    read = {size: max(one.read[size], other.read[size]) for size in one.read}
    return Roof(one.threads, max(one.fma, other.fma), max(one.gemm, other.gemm), read)
