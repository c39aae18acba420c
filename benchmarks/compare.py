"""What moved between two result files, beyond noise.

A machine is never twice the same. The peers tell how it differs: their code did not change, so the
median ratio of their times is the machine's drift, which is taken off, and the 90th percentile of
what is left of them is the noise between the two files. A case has moved when its ratio, with the
drift taken off, is beyond that noise, beyond each run's own noise, and beyond three standard errors
of its two medians.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.cells import duration
from benchmarks.results import Row, Run, percentile
from benchmarks.sampler import FLASHKERN


@dataclass
class Moved:
    """One case of both files: seconds before and after, ratio without drift, and its threshold."""

    case: str
    before: float
    after: float
    ratio: float  # after / before with the drift taken off: above 1 is slower
    noise: float  # a ratio within 1 / (1 + noise) .. 1 + noise has not moved

    @property
    def moved(self) -> bool:
        return abs(math.log(self.ratio)) > math.log1p(self.noise)


@dataclass
class Comparison:
    cases: list[Moved]
    drift: float  # how much slower the machine was in the second file, by the peers: 1 is equal
    only_before: list[str]
    only_after: list[str]


def _standard_error(row: Row) -> float:
    """Of flashkern's median, relative to it, for a bell-shaped spread: 0.93 IQR / sqrt(n)."""
    return 0.93 * row.spread[FLASHKERN] / math.sqrt(max(1, row.rounds[FLASHKERN]))


def compare(before: Run, after: Run) -> Comparison:
    """Compares the cases that both files hold."""
    old, new = ({row.case: row for row in run.rows} for run in (before, after))
    shared = [case for case in old if case in new]
    peers = [
        new[case].seconds[name] / seconds
        for case in shared
        for name, seconds in old[case].seconds.items()
        if old[case].roles[name] in ("peer", "limit") and name in new[case].seconds
    ]
    drift = median(peers) if peers else 1.0
    between = percentile([abs(math.log(ratio / drift)) for ratio in peers], 0.9, 0.0)
    least = max(between, before.noise, after.noise)
    cases = []
    for case in shared:
        error = 3 * math.hypot(_standard_error(old[case]), _standard_error(new[case]))
        times = old[case].seconds[FLASHKERN], new[case].seconds[FLASHKERN]
        cases.append(Moved(case, *times, times[1] / times[0] / drift, max(least, error)))
    return Comparison(
        cases, drift, [c for c in old if c not in new], [c for c in new if c not in old]
    )


def show(result: Comparison, console: Console) -> None:
    """Prints what moved, the largest change first, and how much did not."""
    percent = 100 * (result.drift - 1)
    console.print(
        f"machine: {abs(percent):.1f}% {'slower' if percent > 0 else 'faster'} in the second file "
        "by its peers; taken off below",
        highlight=False,
    )
    moved = sorted((c for c in result.cases if c.moved), key=lambda c: -abs(math.log(c.ratio)))
    if moved:
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for column in ("case", "before", "after", "change", "noise"):
            table.add_column(column, justify="left" if column == "case" else "right")
        for c in moved:
            word, colour = ("slower", "red") if c.ratio > 1 else ("faster", "green")
            factor = c.ratio if c.ratio > 1 else 1 / c.ratio
            table.add_row(
                c.case,
                duration(c.before),
                duration(c.after),
                f"[{colour}]{factor:.2f}x {word}[/]",
                f"{100 * c.noise:.1f}%",
            )
        console.print(table)
    console.print(f"{len(moved)} of {len(result.cases)} cases moved beyond noise", highlight=False)
    for name, cases in (("first", result.only_before), ("second", result.only_after)):
        if cases:
            console.print(f"{len(cases)} cases are in the {name} file only", highlight=False)
