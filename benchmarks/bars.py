"""What the project asks of a GPU's and of a CPU's numbers, and whether a result file has it.

Each bar is a ratio that the numbers alone decide, case by case. A bar is met when every measured
case meets it; a case whose peer is missing is not measured.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.results import Row, Run
from benchmarks.sampler import FLASHKERN

LONG, LARGE = 16384, 100_000_000  # keys; bytes of logits

Check = Callable[[dict[str, Any]], bool]
Value = Callable[[Run, Row], float | None]


@dataclass(frozen=True)
class Bar:
    """`value` of a case must be at least `least`, or at most `most`; None: not this bar's case."""

    name: str
    value: Value
    least: float = 0.0
    most: float = float("inf")

    def met(self, value: float) -> bool:
        return self.least <= value <= self.most

    @property
    def asks(self) -> str:
        return f">= {self.least:g}" if self.least else f"<= {self.most:g}"


@dataclass(frozen=True)
class Verdict:
    """A bar over a run: how many cases met it, and the one that is farthest from it."""

    bar: Bar
    values: dict[str, float]

    @property
    def kept(self) -> int:
        return sum(self.bar.met(value) for value in self.values.values())

    @property
    def worst(self) -> str | None:
        pick = min if self.bar.least else max
        return pick(self.values, key=self.values.__getitem__, default=None)

    @property
    def word(self) -> str:
        if not self.values:
            return "not measured"
        return "met" if self.kept == len(self.values) else "not met"


def _against(row: Row, peer: str) -> float | None:
    """The peer's time over flashkern's."""
    return row.seconds[peer] / row.seconds[FLASHKERN] if peer in row.seconds else None


def _of_copy(run: Run, row: Row) -> float | None:
    """flashkern's bytes a second over those of a large copy."""
    roof = run.roofs.get(row.info["threads"])
    if roof is None or not roof.gpu:
        return None
    return row.info["bytes"] / row.seconds[FLASHKERN] / roof.memory


def _forward(run: Run, row: Row) -> float | None:
    return _against(row, "torch flash") if row.info["mode"] == "prefill" else None


def _training(run: Run, row: Row) -> float | None:
    attention = row.info["operator"] == "attention" and row.info["mode"] == "training"
    return _against(row, "torch flash") if attention else None


def _decode(mode: str) -> Callable[[Run, Row], float | None]:
    def value(run: Run, row: Row) -> float | None:
        fits = row.info["mode"] == mode and row.info.get("keys", 0) >= LONG
        return _of_copy(run, row) if fits else None

    return value


def _lora(mode: str) -> Callable[[Run, Row], float | None]:
    def value(run: Run, row: Row) -> float | None:
        if row.info["operator"] != "lora" or row.info["mode"] != mode:
            return None
        share = _against(row, "frozen linear")
        return None if share is None else 1 / share

    return value


def _beam_copy(run: Run, row: Row) -> float | None:
    fits = row.info["operator"] == "beam" and row.info["bytes"] > LARGE
    return _of_copy(run, row) if fits else None


def _beam_chain(run: Run, row: Row) -> float | None:
    return _against(row, "torch chain") if row.info["operator"] == "beam" else None


GPU_BARS = (
    Bar("attention forward, speed over torch's flash", _forward, least=1.0),
    Bar("attention forward and backward, speed over torch's flash", _training, least=1.0),
    Bar("decode from 16k keys on, share of a copy's bandwidth", _decode("decode"), least=0.85),
    Bar("decode from pages, the same", _decode("paged"), least=0.85),
    Bar("LoRA forward, time over cuBLAS's product alone", _lora("forward"), most=1.10),
    Bar("LoRA forward and backward, time over cuBLAS's alone", _lora("training"), most=1.20),
    Bar("beam step above 100 MB, share of a copy's bandwidth", _beam_copy, least=0.8),
    Bar("beam step, speed over torch's chain", _beam_chain, least=5.0),
)


# ---- a CPU's ----


def _attention(mode: str, least: int, most: int = 1 << 20, **facts: Any) -> Check:
    """Cases of `least` to `most` keys; facts: what else their description says."""

    def check(info: dict[str, Any]) -> bool:
        if info["operator"] != "attention" or info["mode"] != mode:
            return False
        return least <= info.get("keys", 0) <= most and all(
            info.get(n) == v for n, v in facts.items()
        )

    return check


def _of_peak(check: Check) -> Value:
    """FLOP/s over those of float32 multiply-adds in registers."""

    def value(run: Run, row: Row) -> float | None:
        roof = run.roofs.get(row.info["threads"])
        if roof is None or not check(row.info):
            return None
        return row.info["flops"] / row.seconds[FLASHKERN] / roof.fma

    return value


def _over(peer: str, check: Check) -> Value:
    return lambda run, row: _against(row, peer) if check(row.info) else None


def _of_read(check: Check) -> Value:
    """The least time for the bytes, at the rate at which so many are read, over flashkern's."""
    return lambda run, row: row.share if check(row.info) else None


def _beside_frozen(mode: str, dropout: bool) -> Value:
    """Time over the frozen layer's and that of the rank's FLOPs at the frozen layer's rate."""

    def value(run: Run, row: Row) -> float | None:
        info, share = row.info, _against(row, "frozen linear")
        if share is None or (info["operator"], info["mode"]) != ("lora", mode):
            return None
        if (info["dropout"] > 0) != dropout:
            return None
        if mode == "decode":
            return 1 / share if info["rows"] == 1 else None
        return 4 * info["rows"] * info["inputs"] * info["outputs"] / info["flops"] / share

    return value


def _beam(**facts: Any) -> Check:
    return lambda info: info["operator"] == "beam" and all(info[n] == v for n, v in facts.items())


def _large(check: Check) -> Check:
    """More than any CPU's share of a cache."""
    return lambda info: info["bytes"] > LARGE and check(info)


_full = functools.partial(_attention, "prefill", causal=False)
_causal = functools.partial(_attention, "prefill", causal=True)

CPU_BARS = (
    Bar(
        "attention from 1024 tokens, head_dim 64, of the peak",
        _of_peak(_full(1024, head_dim=64)),
        0.78,
    ),
    Bar("the same, head_dim 128", _of_peak(_full(1024, head_dim=128)), 0.85),
    Bar("the same, speed over torch's SDPA", _over("torch sdpa", _full(1024)), 1.5),
    Bar(
        "causal from 1024 tokens, head_dim 64, of the peak",
        _of_peak(_causal(1024, head_dim=64)),
        0.70,
    ),
    Bar("the same, head_dim 128", _of_peak(_causal(1024, head_dim=128)), 0.76),
    Bar("the same, speed over torch's SDPA", _over("torch sdpa", _causal(1024)), 1.5),
    Bar("causal, 256 to 640 tokens, of the peak", _of_peak(_causal(256, 640)), 0.55),
    Bar("the same, speed over torch's SDPA", _over("torch sdpa", _causal(256, 640)), 2.0),
    Bar("head_dim 32, 128 to 512 tokens, of the peak", _of_peak(_full(128, 512, head_dim=32)), 0.6),
    Bar("training from 1024 tokens, of the peak", _of_peak(_attention("training", 1024)), 0.65),
    Bar(
        "training, float32, speed over torch's SDPA",
        _over("torch sdpa", _attention("training", 512, dtype="f32")),
        1.5,
    ),
    Bar(
        "training, bfloat16, speed over torch's SDPA",
        _over("torch sdpa", _attention("training", 512, dtype="bf16")),
        3.0,
    ),
    Bar("decode above 100 MB, of the read rate", _of_read(_large(_attention("decode", 4096))), 0.9),
    Bar(
        "LoRA training, time over the ideal beside the frozen layer",
        _beside_frozen("training", False),
        most=1.05,
    ),
    Bar("the same with dropout", _beside_frozen("training", True), most=1.10),
    Bar("LoRA, 1 row, time over the frozen layer's", _beside_frozen("decode", False), most=1.03),
    Bar(
        "beam step above 100 MB, float32, of the read rate",
        _of_read(_large(_beam(dtype="f32"))),
        0.85,
    ),
    Bar("the same, bfloat16", _of_read(_large(_beam(dtype="bf16"))), 0.6),
    Bar("beam step, speed over transformers' chain", _over("transformers", _beam()), 10.0),
    Bar("beam step, speed over beamgrad", _over("beamgrad", _beam()), 2.0),
)


def judge(run: Run) -> list[Verdict]:
    """Every bar of a GPU or of a CPU, from the numbers of `run` alone."""
    on_gpu = any(roof.gpu for roof in run.roofs.values())
    found = []
    for bar in GPU_BARS if on_gpu else CPU_BARS:
        rows = (*run.operators, *run.scaling)
        values = {row.case: v for row in rows if (v := bar.value(run, row)) is not None}
        found.append(Verdict(bar, values))
    return found


COLUMNS = ("bar", "asks", "verdict", "cases", "worst")


def lines(run: Run) -> list[list[str]]:
    """One line of text for each bar, under COLUMNS."""
    shown = []
    for v in judge(run):
        count = f"{v.kept} of {len(v.values)}"
        worst = f"{v.values[v.worst]:.2f} {v.worst}" if v.worst else ""
        shown.append([v.bar.name, v.bar.asks, v.word, count, worst])
    return shown
