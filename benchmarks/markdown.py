"""The results as Markdown, and README's part that is made of them."""

from __future__ import annotations

from pathlib import Path

from benchmarks import bars
from benchmarks.cells import cells, headline, limits, quality_cells
from benchmarks.results import Run
from benchmarks.sampler import FLASHKERN

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
_OPERATOR = ("shape", "dtype", "flashkern", "best peer", "speed-up", "of limit")
_MODEL = ("task", "flashkern", "best peer", "speed-up", "result")


def _table(columns: tuple[str, ...], lines: list[list[str]]) -> str:
    rows = [list(columns), ["---"] * len(columns), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _models(run: Run) -> str:
    lines = []
    for row in run.models:
        shown = cells(row, run.noise)
        lines.append(
            [row.info["shape"], shown["flashkern"], shown["best peer"], shown["speed-up"],
             quality_cells(row)]
        )  # fmt: skip
    return _table(_MODEL, lines)


def _operators(run: Run) -> str:
    lines = []
    for row in run.operators:
        shown = cells(row, run.noise)
        name = f"{row.info['operator']} {shown['shape']}"
        lines.append([name, *(shown[column] for column in _OPERATOR[1:])])
    return _table(_OPERATOR, lines)


def _lost(run: Run) -> list[str]:
    """Cases without a time of flashkern's."""
    missing = run.record["missing"].items()
    return [f"- not measured: {c}: {why[FLASHKERN]}" for c, why in missing if FLASHKERN in why]


def markdown(run: Run, source: str) -> str:
    """The report's tables; `source` is the file that they come from, as a reader would name it."""
    machine = run.record["machine"]
    where = f"{machine['cpu']['model']}, {machine['cores']} cores, {machine['isa']}"
    if run.gpu:
        where = f"{run.gpu['name']}, driver {run.gpu.get('driver')}, CUDA {run.gpu.get('cuda')}"
    parts = [
        f"On {where}, torch {machine['versions']['torch']}. " + "; ".join(headline(run)) + ".",
        *("- " + limits(roof) for roof in run.roofs.values()),
    ]
    if any(roof.gpu for roof in run.roofs.values()):
        parts += ["", _table(bars.COLUMNS, bars.lines(run))]
    if run.models:
        parts += ["", _models(run)]
    if run.operators:
        parts += [
            "", f"<details><summary>Every shape of profile {run.record['profile']}</summary>", "",
            _operators(run), "", "</details>",
        ]  # fmt: skip
    parts += _lost(run)
    parts += ["", f"From [{source}]({source}); `=` marks a difference inside the noise."]
    return "\n".join(parts)


def replace(readme: Path, text: str) -> None:
    """Puts `text` between README's two marks.

    Raises:
        ValueError: the marks are missing.
    """
    whole = readme.read_text()
    if whole.count(BEGIN) != 1 or whole.count(END) != 1:
        raise ValueError(f"{readme} must hold {BEGIN} and {END} once each")
    head, rest = whole.split(BEGIN)
    readme.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")
