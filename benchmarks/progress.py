"""What a person sees while a run goes on: a bar, and one line for each finished case."""

from __future__ import annotations

from statistics import median
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from benchmarks.cells import duration
from benchmarks.sampler import FLASHKERN


class Progress:
    """A listener of `Bench`: begin(label) and end(label, measured) for each case."""

    def __init__(self, cases: int, stream: TextIO) -> None:
        self._console = Console(file=stream, highlight=False)
        columns = (
            BarColumn(40),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
        )
        self._bar = Bar(*columns, console=self._console, transient=True)
        self._task = self._bar.add_task("", total=cases)
        self._done, self._cases = 0, cases
        self._bar.start()

    def note(self, text: str) -> None:
        self._bar.update(self._task, description=text)

    def begin(self, name: str) -> None:
        self.note(name)

    def end(self, name: str, measured: Any) -> None:
        self._done += 1
        self._bar.advance(self._task)
        roles = {n: info["role"] for n, info in measured.info.items()}
        times = {n: median(s) for n, s in measured.seconds.items()}
        peers = {n: t for n, t in times.items() if roles[n] == "peer"}
        line = f"[dim]{self._done:3}/{self._cases}[/] {name:58} {duration(times[FLASHKERN]):>8}"
        if peers:
            best = min(peers, key=peers.__getitem__)
            ratio = peers[best] / times[FLASHKERN]
            colour = "green" if ratio >= 1 else "red"
            line += f"  {best} {duration(peers[best])}  [{colour}]{ratio:.2f}x[/]"
        self._console.print(line, soft_wrap=True)

    def stop(self) -> None:
        self._bar.stop()
