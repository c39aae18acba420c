"""Which kernel a call would run, and why: its tile, its FLOPs and bytes, and the limit it meets."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch._guards import detect_fake_mode
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
        device: ``"cpu"``, ``"cuda"``, or ``"emulated"``: the CUDA kernels' sources on a CPU.
        isa: the CPU instruction set, or ``"sm_80"``: what the GPU kernels are written for.
        threads: of the CPU, how many would share the work; 0 on a GPU.
        built: whether this build has the kernel.
        tile: block sizes, counts of tasks and whatever else the kernel's plan decides.
        flops: multiply-adds counted as two.
        bytes: each input read once, each output written once.
        peak_flops, peak_bytes: this CPU's limits per second, measured once in a process; None
            elsewhere: a plan needs no GPU, and says nothing of the speed of one.
    """

    operator: str
    kernel: str
    why: str
    device: str
    isa: str
    threads: int
    flops: float
    bytes: float
    peak_flops: float | None
    peak_bytes: float | None
    built: bool = True
    tile: dict[str, Any] = field(default_factory=dict)

    @property
    def compute_seconds(self) -> float | None:
        """Time at the machine's multiply-add peak; None where that is not known."""
        return None if self.peak_flops is None else self.flops / self.peak_flops

    @property
    def memory_seconds(self) -> float | None:
        """Time at the machine's read bandwidth; None where that is not known."""
        return None if self.peak_bytes is None else self.bytes / self.peak_bytes

    @property
    def limit(self) -> str:
        """``"compute"`` or ``"memory"``, whichever takes longer; ``"unknown"`` without peaks."""
        compute, memory = self.compute_seconds, self.memory_seconds
        if compute is None or memory is None:
            return "unknown"
        return "compute" if compute >= memory else "memory"

    def _limit_line(self) -> str:
        if self.peak_flops is None or self.peak_bytes is None:
            intensity = self.flops / self.bytes if self.bytes else 0.0
            return f"unknown on {self.device}: {intensity:.3g} FLOP for each byte"
        return (
            f"{self.limit}: {1e3 * self.flops / self.peak_flops:.3g} ms at "
            f"{self.peak_flops / 1e9:.3g} GFLOP/s, {1e3 * self.bytes / self.peak_bytes:.3g} ms at "
            f"{self.peak_bytes / 1e9:.3g} GB/s"
        )

    def __str__(self) -> str:
        cut = {name: value for name, value in self.tile.items() if name != "backward_flops"}
        tile = ", ".join(f"{name} {value}" for name, value in cut.items())
        threads = f", {self.threads} threads" if self.threads else ""
        absent = "" if self.built else ": no kernel in this build"
        back = self.tile.get("backward_flops")
        backward = f"; backward {back / 1e6:.4g} MFLOP" if back else ""
        return "\n".join(
            [
                f"{self.operator}: {self.kernel} on {self.device}/{self.isa}{threads}{absent}",
                f"  why    {self.why}",
                f"  tile   {tile}",
                f"  work   {self.flops / 1e6:.4g} MFLOP, {self.bytes / 1e6:.4g} MB{backward}",
                f"  limit  {self._limit_line()}",
            ]
        )


def planner(operator: str) -> Callable[[Callable[..., dict[str, Any]]], Callable[..., Any]]:
    """Registers the function that plans ``operator``; it takes the operator's own arguments.

    It returns a dictionary with ``kernel``, ``why``, ``flops``, ``bytes``, perhaps ``pairs`` (it
    multiplies bfloat16 in pairs); all else is the tile.
    """

    def register(function: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        _PLANNERS[operator] = function
        return function

    return register


@cache
def machine_limits(threads: int, pairs: bool = False) -> tuple[float, float]:
    """This machine's FLOP/s and bytes read per second, measured for a tenth of a second.

    ``pairs``: of bfloat16 in pairs, in place of float32.
    """
    flops = _host.fma_peak(threads, 0.05, pairs=pairs)
    return flops, _host.read_peak(128 << 20, threads, 0.05)


def explain(op: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Plan:
    """Says which kernel a call would run and how near to the machine's limit it could come.

    Args:
        op: attention, attention_varlen, attention_kvcache, scaled_dot_product_attention,
            lora_linear, lora_linear_multi, beam_topk, or one of these names.
        *args, **kwargs: the call's arguments, checked as the call would; nothing is computed.
            Fake tensors will do, such as those of a GPU that is not there.

    Returns:
        A :class:`Plan`; print it.

    Raises:
        ValueError: ``op`` is not one of these.
        TypeError: float64 on a GPU, and whatever else the call would raise.

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
    mode = detect_fake_mode((args, kwargs)) or FakeTensorMode(allow_non_fake_inputs=True)
    with mode:  # the call's own checks, on shapes alone
        getattr(flashkern, name)(*args, **kwargs)
    first = next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
    if first.is_cuda and first.dtype == torch.float64 and name != "beam_topk":
        raise TypeError(f"{name}: tensors must not be float64 on a GPU, got {first.dtype}")
    facts = _PLANNERS[name](*args, **kwargs)
    device = "cuda" if first.is_cuda else _ops.BACKEND or "cpu"
    threads = torch.get_num_threads() if device == "cpu" else 0
    peak_flops = peak_bytes = None
    pairs = facts.pop("pairs", False)
    if device == "cpu":
        peak_flops, peak_bytes = machine_limits(threads, pairs)
    return Plan(
        operator=name,
        kernel=facts.pop("kernel"),
        why=facts.pop("why"),
        device=device,
        isa=_ops.cpu_isa() if device == "cpu" else "sm_80",
        threads=threads,
        flops=facts.pop("flops"),
        bytes=facts.pop("bytes"),
        peak_flops=peak_flops,
        peak_bytes=peak_bytes,
        built=device != "cuda" or _ops.has_kernel("attention_forward", "cuda"),
        tile=facts,
    )
