"""The results as one table in the terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.cells import COLUMNS, RIGHT, cells, headline, limits, quality_cells, verdict
from benchmarks.results import Run

_COLOURS = {"faster": "green", "tie": "yellow", "slower": "red"}


def _plain(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD,
                  pad_edge=False, padding=(0, 1, 0, 0))  # fmt: skip


def _operators(run: Run) -> Table:
    table = _plain("Operators")
    for column in ("operator", *COLUMNS):
        table.add_column(column, justify="right" if column in RIGHT else "left", no_wrap=True)
    before = None
    for row in [*run.operators, *run.scaling]:
        section = (row.info["operator"], row.info["scaling"])
        name = row.info["operator"] if section != before else ""
        if before is not None and section != before:
            table.add_section()
        before = section
        shown = cells(row, run.noise)
        style = _COLOURS[verdict(row, run.noise)]
        texts = (Text(shown[c], style=style if c == "speed-up" else "") for c in COLUMNS)
        table.add_row(Text(name, style="bold"), *texts)
    return table


def _models(run: Run) -> Table:
    table = _plain("Real models")
    for column in ("task", "flashkern", "best peer", "speed-up", "rate", "result"):
        table.add_column(column, no_wrap=column != "result")
    for row in run.models:
        shown = cells(row, run.noise)
        style = _COLOURS[verdict(row, run.noise)]
        table.add_row(
            row.info["shape"],
            shown["flashkern"],
            shown["best peer"],
            Text(shown["speed-up"], style=style),
            shown["rate"],
            quality_cells(row),
        )
    return table


def show(run: Run, console: Console) -> None:
    """Prints the report."""
    record, machine = run.record, run.record["machine"]
    console.print()
    console.print(
        f"[bold]flashkern {machine['versions']['flashkern']}[/] on {machine['cpu']['model']}, "
        f"{machine['cores']} cores, {machine['isa']}, torch {machine['versions']['torch']}; "
        f"profile {record['profile']}, {record['seconds']:.0f} s"
    )
    for roof in run.roofs.values():
        console.print(limits(roof), highlight=False)
    if run.operators:
        console.print(_operators(run))
    if run.models:
        console.print(_models(run))
    for line in headline(run):
        console.print(line, highlight=False)
    missing = {item for found in record["missing"].values() for item in found.items()}
    for reason in sorted(f"{name}: {why.splitlines()[0]}" for name, why in missing):
        console.print(f"[yellow]left out[/] {reason}", highlight=False)
