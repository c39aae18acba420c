"""From a result file (pytest-benchmark's JSON) to one row for each case: what the reports show.

The rules of judgement live here. A speed-up is the best peer's median over flashkern's. Noise is
how far flashkern's median lies from its own control's in the same rounds: the run's noise is the
90th percentile over its cases, and a difference smaller than that is called a tie.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.roof import Roof
from benchmarks.sampler import CONTROL, FLASHKERN

LEAST_NOISE = 0.01  # no clock here is better than that


@dataclass
class Row:
    """One case: `seconds`, `spread` (interquartile range over median) and `errors` by provider."""

    case: str
    info: dict[str, Any]  # of flashkern's entry: operator, mode, shape, dtype, threads, ...
    seconds: dict[str, float]
    spread: dict[str, float]
    rounds: dict[str, int]
    roles: dict[str, str]
    errors: dict[str, float]
    quality: dict[str, dict[str, Any]]
    missing: dict[str, str] = field(default_factory=dict)
    limit: tuple[float, str] | None = None  # the least seconds possible, and what sets it

    @property
    def peers(self) -> dict[str, float]:
        return {n: t for n, t in self.seconds.items() if self.roles[n] == "peer"}

    @property
    def best_peer(self) -> str | None:
        return min(self.peers, key=self.peers.__getitem__, default=None)

    @property
    def speedup(self) -> float | None:
        best = self.best_peer
        return None if best is None else self.seconds[best] / self.seconds[FLASHKERN]

    @property
    def noise(self) -> float:
        """How far flashkern is from itself, as a fraction."""
        again = self.seconds.get(CONTROL)
        return 0.0 if again is None else abs(again / self.seconds[FLASHKERN] - 1)

    @property
    def share(self) -> float | None:
        """How much of the machine's limit flashkern reaches: 1 is all of it."""
        return None if self.limit is None else self.limit[0] / self.seconds[FLASHKERN]

    def rate(self, provider: str = FLASHKERN) -> tuple[float, str] | None:
        """Work per second and its unit: GFLOP/s where there are FLOPs to count, else GB/s."""
        if self.info["units"]:
            unit, amount = next(iter(self.info["units"].items()))
            return amount / self.seconds[provider], f"{unit}/s"
        if self.info["flops"] and self.info["mode"] not in ("decode", "paged"):
            return self.info["flops"] / self.seconds[provider] / 1e9, "GFLOP/s"
        if self.info["bytes"]:
            return self.info["bytes"] / self.seconds[provider] / 1e9, "GB/s"
        return None

    @property
    def torch_error(self) -> float | None:
        """The error of the most exact peer that computes in the same dtype."""
        errors = [e for n, e in self.errors.items() if self.roles[n] == "peer"]
        return min(errors, default=None)


@dataclass
class Run:
    """A result file."""

    path: str
    record: dict[str, Any]  # profile, machine, roofs, ...
    rows: list[Row]
    date: str

    @property
    def noise(self) -> float:
        """The run's noise: the 90th percentile of its cases' noise, and at least LEAST_NOISE."""
        return percentile([row.noise for row in self.rows], 0.9, LEAST_NOISE)

    @property
    def gpu(self) -> dict[str, Any] | None:
        """What was measured, if it was a GPU."""
        return self.record["machine"]["gpu"] if self.record.get("device") == "cuda" else None

    @property
    def beam_search(self) -> dict[str, Any] | None:
        """What models/beam_parts.py measured, if it ran."""
        return self.record.get("beam_search")

    @property
    def processor(self) -> str:
        """The name of what was measured."""
        return self.gpu["name"] if self.gpu else self.record["machine"]["cpu"]["model"]

    @property
    def operators(self) -> list[Row]:
        return [r for r in self.rows if r.info["operator"] != "model" and not r.info["scaling"]]

    @property
    def models(self) -> list[Row]:
        return [r for r in self.rows if r.info["operator"] == "model"]

    @property
    def scaling(self) -> list[Row]:
        return [r for r in self.rows if r.info["scaling"]]

    @property
    def roofs(self) -> dict[int, Roof]:
        return {r["threads"]: Roof.from_dict(r) for r in self.record["roofs"]}


def percentile(values: list[float], part: float, least: float) -> float:
    """The value below which `part` of `values` lie, and at least `least`."""
    if not values:
        return least
    ordered = sorted(values)
    return max(least, ordered[min(len(ordered) - 1, int(part * len(ordered)))])


def _row(case: str, entries: list[dict[str, Any]], roofs: dict[int, Roof]) -> Row | None:
    by_name = {e["extra_info"]["provider"]: e for e in entries}
    if FLASHKERN not in by_name:
        return None
    infos = {name: e["extra_info"] for name, e in by_name.items()}
    stats = {name: e["stats"] for name, e in by_name.items()}
    row = Row(
        case,
        infos[FLASHKERN],
        {n: s["median"] for n, s in stats.items()},
        {n: s["iqr"] / s["median"] if s["median"] else 0.0 for n, s in stats.items()},
        {n: s["rounds"] for n, s in stats.items()},
        {n: i["role"] for n, i in infos.items()},
        {n: i["error"] for n, i in infos.items() if "error" in i},
        {n: i["quality"] for n, i in infos.items() if "quality" in i},
    )
    roof = roofs.get(row.info["threads"])
    if roof is not None and row.info["bytes"]:
        row.limit = roof.least_seconds(row.info["flops"], row.info["bytes"], row.info["dtype"])
    return row


def load(path: str | Path) -> Run:
    """Reads a result file.

    Raises:
        ValueError: the file was not written by ``python -m benchmarks run``.
    """
    data = json.loads(Path(path).read_text())
    if not isinstance(data, dict) or "flashkern" not in data:
        raise ValueError(f"results: {path} must be a file that `python -m benchmarks run` wrote")
    record = data["flashkern"]
    roofs = {r["threads"]: Roof.from_dict(r) for r in record["roofs"]}
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in data["benchmarks"]:
        groups.setdefault(entry["extra_info"]["case"], []).append(entry)
    rows = []
    for case, entries in groups.items():
        row = _row(case, entries, roofs)
        if row is not None:
            row.missing = record["missing"].get(case, {})
            rows.append(row)
    return Run(str(path), record, rows, data["datetime"])
