"""What the project asks of a GPU's numbers, and whether a result file has it.

Each bar is a ratio that the numbers alone decide, case by case. A bar is met when every measured
case meets it; a case whose peer is missing is not measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.results import Row, Run
from benchmarks.sampler import FLASHKERN

LONG, LARGE = 16384, 100_000_000  # keys; bytes of logits


@dataclass(frozen=True)
class Bar:
    """`value` of a case must be at least `least`, or at most `most`; None: not this bar's case."""

    name: str
    value: Callable[[Run, Row], float | None]
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


BARS = (
    Bar("attention forward, speed over torch's flash", _forward, least=1.0),
    Bar("attention forward and backward, speed over torch's flash", _training, least=1.0),
    Bar("decode from 16k keys on, share of a copy's bandwidth", _decode("decode"), least=0.85),
    Bar("decode from pages, the same", _decode("paged"), least=0.85),
    Bar("LoRA forward, time over cuBLAS's product alone", _lora("forward"), most=1.10),
    Bar("LoRA forward and backward, time over cuBLAS's alone", _lora("training"), most=1.20),
    Bar("beam step above 100 MB, share of a copy's bandwidth", _beam_copy, least=0.8),
    Bar("beam step, speed over torch's chain", _beam_chain, least=5.0),
)


def judge(run: Run) -> list[Verdict]:
    """Every bar, from the numbers of `run` alone."""
    found = []
    for bar in BARS:
        values = {row.case: v for row in run.operators if (v := bar.value(run, row)) is not None}
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
