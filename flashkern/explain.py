"""Which kernel a call would run, and why: its tile, its FLOPs and bytes, and the limit it meets."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch._subclasses import FakeTensorMode

from flashkern import _host, _ops

_PLANNERS: dict[str, Callable[..., dict[str, Any]]] = {}


@dataclass(frozen=True)
class Plan:
    """What a call would do. ``str(plan)`` is a few readable lines.

    Attributes:
        operator: the operator's name.
        kernel: the kernel that would run.
        why: why that one.
        isa: CPU instruction set; threads: how many would share the work.
        tile: block sizes, counts of tasks and whatever else the kernel's plan decides.
        flops: multiply-adds counted as two.
        bytes: each input read once, each output written once.
        peak_flops, peak_bytes: this machine's limits per second, measured once in a process.
    """

    operator: str
    kernel: str
    why: str
    isa: str
    threads: int
    flops: float
    bytes: float
    peak_flops: float
    peak_bytes: float
    tile: dict[str, Any] = field(default_factory=dict)

    @property
    def compute_seconds(self) -> float:
        """Time at the machine's multiply-add peak."""
        return self.flops / self.peak_flops

    @property
    def memory_seconds(self) -> float:
        """Time at the machine's read bandwidth."""
        return self.bytes / self.peak_bytes

    @property
    def limit(self) -> str:
        """``"compute"`` or ``"memory"``, whichever takes longer."""
        return "compute" if self.compute_seconds >= self.memory_seconds else "memory"

    def __str__(self) -> str:
        tile = ", ".join(f"{name} {value}" for name, value in self.tile.items())
        return "\n".join(
            [
                f"{self.operator}: {self.kernel} on cpu/{self.isa}, {self.threads} threads",
                f"  why    {self.why}",
                f"  tile   {tile}",
                f"  work   {self.flops / 1e6:.4g} MFLOP, {self.bytes / 1e6:.4g} MB",
                f"  limit  {self.limit}: {1e3 * self.compute_seconds:.3g} ms at "
                f"{self.peak_flops / 1e9:.3g} GFLOP/s, {1e3 * self.memory_seconds:.3g} ms at "
                f"{self.peak_bytes / 1e9:.3g} GB/s",
            ]
        )


def planner(operator: str) -> Callable[[Callable[..., dict[str, Any]]], Callable[..., Any]]:
    """Registers the function that plans ``operator``; it takes the operator's own arguments.

    It returns a dictionary with ``kernel``, ``why``, ``flops``, ``bytes``; all else is the tile.
    """

    def register(function: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        _PLANNERS[operator] = function
        return function

    return register


@cache
def machine_limits(threads: int) -> tuple[float, float]:
    """This machine's float32 FLOP/s and bytes read per second, measured for a tenth of a second."""
    flops = _host.fma_peak(threads, 0.05)
    return flops, _host.read_peak(128 << 20, threads, 0.05)


def explain(op: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Plan:
    """Says which kernel a call would run and how near to the machine's limit it could come.

    Args:
        op: attention, attention_kvcache, scaled_dot_product_attention, lora_linear, beam_topk, or
            one of these names.
        *args, **kwargs: the call's arguments, checked as the call would; nothing is computed.

    Returns:
        A :class:`Plan`; print it.

    Raises:
        ValueError: ``op`` is not one of these.

    Example:
        >>> import torch, flashkern as fk
        >>> q = torch.randn(1, 8, 1024, 64)
        >>> plan = fk.explain(fk.attention, q, q, q, causal=True)
        >>> plan.limit
        'compute'
        >>> print(plan)
        attention: ...
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", str(op))
    import flashkern
    import flashkern._plans  # registers the planners

    if name not in _PLANNERS:
        known = ", ".join(sorted(_PLANNERS))
        raise ValueError(f"explain: op must be one of {known}, got {name}")
    with FakeTensorMode(allow_non_fake_inputs=True):  # the call's own checks, on shapes alone
        getattr(flashkern, name)(*args, **kwargs)
    facts = _PLANNERS[name](*args, **kwargs)
    threads = torch.get_num_threads()
    peak_flops, peak_bytes = machine_limits(threads)
    return Plan(
        operator=name,
        kernel=facts.pop("kernel"),
        why=facts.pop("why"),
        isa=_ops.cpu_isa(),
        threads=threads,
        flops=facts.pop("flops"),
        bytes=facts.pop("bytes"),
        peak_flops=peak_flops,
        peak_bytes=peak_bytes,
        tile=facts,
    )
