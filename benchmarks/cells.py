"""A run's numbers as text: what every report shows, with no library beside Python's own."""

from __future__ import annotations

import csv
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.problem import same
from benchmarks.results import Row, Run
from benchmarks.roof import Roof
from benchmarks.sampler import FLASHKERN

COLUMNS = (
    "shape", "dtype", "flashkern", "best peer", "speed-up", "rate", "of limit", "error / torch"
)  # fmt: skip
_MUCH_NOISE = 0.1
RIGHT = ("flashkern", "speed-up", "rate", "of limit")  # columns of numbers


def duration(seconds: float) -> str:
    """Three digits and a unit: "12.3 ms"."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        value = seconds * factor
        if value >= 1 or unit == "us":
            return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
    raise AssertionError


def verdict(row: Row, noise: float) -> str:
    """ "faster", "tie" (inside the run's noise) or "slower"."""
    speedup = row.speedup
    if speedup is None or abs(speedup - 1) <= noise:
        return "tie"
    return "faster" if speedup > 1 else "slower"


def short(number: float) -> str:
    """Three significant digits, without an exponent from a thousandth up."""
    if number >= 100:
        return f"{number:,.0f}"
    return f"{number:.3g}"


def percent(share: float) -> str:
    """A share of one as a percentage: whole from 10% up, one decimal below."""
    return f"{100 * share:.0f}%" if share >= 0.0995 else f"{100 * share:.1f}%"


def _errors(row: Row) -> str:
    own, torch_error = row.errors.get(FLASHKERN), row.torch_error
    if own is None:
        return ""
    return f"{own:.1e}" if torch_error is None else f"{own:.1e} / {torch_error:.1e}"


def _rate(amount: float, unit: str) -> str:
    if unit == "GFLOP/s" and amount >= 1e4:
        amount, unit = amount / 1e3, "TFLOP/s"
    return f"{short(amount)} {unit}"


def cells(row: Row, noise: float) -> dict[str, str]:
    """A row's cells as text, by column."""
    best, rate = row.best_peer, row.rate()
    limit = row.limit[1] if row.limit else ""
    tie = " =" if verdict(row, noise) == "tie" and best else ""
    return {
        "shape": f"{row.info['mode']} {row.info['shape']}"
        + (f" {row.info['threads']}t" if row.info["scaling"] else ""),
        "dtype": row.info["dtype"],
        "flashkern": duration(row.seconds[FLASHKERN]),
        "best peer": f"{duration(row.seconds[best])} {best}" if best else "none here",
        "speed-up": f"{row.speedup:.2f}x{tie}" if row.speedup else "",
        "rate": _rate(*rate) if rate else "",
        "of limit": f"{percent(row.share)} {limit}" if row.share is not None else "",
        "error / torch": _errors(row),
    }


def quality_cells(row: Row) -> str:
    """What a model computed, flashkern's beside torch's: "perplexity 12.34 = torch's"."""
    own = row.quality.get(FLASHKERN, {})
    peers = sorted(row.peers, key=row.peers.__getitem__)
    other: dict[str, Any] = next((row.quality[n] for n in peers if row.quality.get(n)), {})
    parts = []
    for key, value in own.items():
        shown = f"{key} {value:.4g}" if isinstance(value, float) else key
        sign = "=" if key in other and same(value, other[key]) else "!="
        parts.append(f"{shown} {sign} torch's" if key in other else shown)
    return ", ".join(parts)


def headline(run: Run) -> list[str]:
    """The run in a few sentences."""
    lines = []
    for name, rows in (("operator shapes", run.operators), ("model tasks", run.models)):
        judged = [row for row in rows if row.speedup is not None]
        if not judged:
            continue
        verdicts = [verdict(row, run.noise) for row in judged]
        middle = median(row.speedup or 0.0 for row in judged)
        lines.append(
            f"{len(judged)} {name}: faster than the best peer on {verdicts.count('faster')}, "
            f"level on {verdicts.count('tie')}, slower on {verdicts.count('slower')}; "
            f"median speed-up {middle:.2f}x"
        )
    errors = [(row.errors[FLASHKERN], row.torch_error) for row in run.operators]
    kept = [own <= 2 * torch_error for own, torch_error in errors if torch_error]
    if kept:
        lines.append(
            f"error against float64: at most twice torch's on {sum(kept)} of {len(kept)} shapes"
        )
    lines.append(f"noise of this run: {100 * run.noise:.1f}% (flashkern against itself)")
    if run.noise > _MUCH_NOISE:
        lines.append(
            "the machine was busy: on such a one, --threads 1 --clock cpu measures CPU time instead"
        )
    return lines


def threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def limits(roof: Roof) -> str:
    """The machine's limits in one line."""
    sizes = sorted(roof.read)
    if roof.gpu:
        return (
            f"GPU: {roof.gemm / 1e12:.0f} TFLOP/s in cuBLAS's bfloat16 product, "
            f"{roof.memory / 1e9:.0f} GB/s in a copy of {sizes[-1] / 2**30:.2g} GiB (read and "
            f"written), {1e6 * roof.call:.1f} us for a call of nothing"
        )
    pairs = f" ({roof.bf16 / 1e9:.0f} of bfloat16)" if roof.bf16 > roof.fma else ""
    return (
        f"{threads(roof.threads)}: {roof.fma / 1e9:.0f} GFLOP/s of multiply-adds{pairs}, "
        f"{roof.gemm / 1e9:.0f} GFLOP/s in torch's "
        f"matrix product, {roof.read[sizes[-1]] / 1e9:.1f} GB/s read from memory, "
        f"{roof.read[sizes[0]] / 1e9:.0f} GB/s from cache"
    )


def write_csv(run: Run, path: Path) -> None:
    """One line for each case and provider, for a spreadsheet."""
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(
            ["operator", "mode", "shape", "dtype", "threads", "provider", "role", "median_s",
             "iqr_over_median", "rounds", "gflops", "gbytes_per_s", "limit_s", "limit", "error"]
        )  # fmt: skip
        for row in run.rows:
            info = row.info
            for name, seconds in row.seconds.items():
                out.writerow(
                    [info["operator"], info["mode"], info["shape"], info["dtype"], info["threads"],
                     name, row.roles[name], f"{seconds:.6g}", f"{row.spread[name]:.3f}",
                     row.rounds[name], f"{info['flops'] / seconds / 1e9:.4g}",
                     f"{info['bytes'] / seconds / 1e9:.4g}", *(row.limit or ("", "")),
                     row.errors.get(name, "")]
                )  # fmt: skip
