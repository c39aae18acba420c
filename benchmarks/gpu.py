"""The benchmarks on a GPU: one process that measures, one that watches it and keeps what it found.

A kernel's fault ends a process, and one that hangs never comes back. So each case's numbers are
written down at once, and the watcher starts again behind the case that was lost; a lost case is in
the report by name. The file is that of ``python -m benchmarks run``, and the same reports read it.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import machine, markdown, results, roof
from benchmarks.cells import duration
from benchmarks.profiles import label
from benchmarks.profiles_gpu import quick, rehearsal
from benchmarks.sampler import CONTROL, FLASHKERN

ROOT = Path(__file__).resolve().parent.parent
LATE = "out of time"
WORKER = (sys.executable, "-m", "benchmarks.gpu_worker")
_HUNG = 120.0  # seconds without a word
_MOST_STARTS = 12
_REPORT = 20.0  # seconds kept for the report


def profile(rehearse: bool) -> str:
    """What the run and its files are called."""
    return "gpu-rehearsal" if rehearse else "gpu-quick"


class Log:
    """The lines that workers wrote: {"begin": case}, {"case": ..., "entries": ...}, ..."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        self.missing: dict[str, dict[str, str]] = {}
        self.roof: roof.Roof | None = None
        self.begun: list[str] = []
        self.ended: set[str] = set()
        self.done = False
        self._read = 0

    def poll(self) -> bool:
        """Takes in what is new; True if there was anything. A line cut short waits for its end."""
        with self.path.open() as file:
            file.seek(self._read)
            text = file.read()
        whole = text[: text.rfind("\n") + 1]
        self._read += len(whole.encode())
        for line in whole.splitlines():
            self._take(json.loads(line))
        return bool(whole)

    def cut(self) -> None:
        """Takes off the line that a worker did not finish."""
        self.poll()
        os.truncate(self.path, self._read)

    def _take(self, line: dict[str, Any]) -> None:
        if "begin" in line:
            self.begun.append(line["begin"])
        elif "case" in line:
            self.ended.add(line["case"])
            self.entries += line["entries"]
            if line["missing"]:
                self.missing[line["case"]] = line["missing"]
            print(_line(line), flush=True)
        elif "failed" in line:
            self.lose(line["failed"], line["why"])
        elif "roof" in line:
            seen = roof.Roof.from_dict(line["roof"])
            self.roof = seen if self.roof is None else roof.best(self.roof, seen)
        self.done = self.done or "done" in line

    def lose(self, name: str, why: str) -> None:
        self.ended.add(name)
        self.missing.setdefault(name, {})[FLASHKERN] = why
        print(f"LOST {name}: {why}", flush=True)


def _line(line: dict[str, Any]) -> str:
    times = {e["extra_info"]["provider"]: e["stats"]["median"] for e in line["entries"]}
    peers = {n: t for n, t in times.items() if n not in (FLASHKERN, CONTROL)}
    others = "  ".join(f"{n} {duration(t)}" for n, t in sorted(peers.items(), key=lambda p: p[1]))
    return f"{line['case']:58} {duration(times[FLASHKERN]):>8}  {others}"


def _watch(log: Log, process: subprocess.Popen[bytes], end: float) -> str | None:
    """Until the worker is gone: None, or why it was ended."""
    heard = time.monotonic()
    while process.poll() is None:
        if log.poll():
            heard = time.monotonic()
        now = time.monotonic()
        if now - heard > _HUNG or now > end + 30:
            process.kill()
            process.wait()
            log.cut()
            return f"no word for {now - heard:.0f} s"
        time.sleep(0.1)
    log.cut()
    return None


def _measure(log: Log, names: list[str], seconds: float, only: str, rehearse: bool) -> None:
    end = time.monotonic() + seconds
    for _ in range(_MOST_STARTS):
        first = max([names.index(name) + 1 for name in log.ended if name in names], default=0)
        left = f"{end - time.monotonic():.0f}"
        command = [*WORKER, str(log.path), str(first), left, only, *(["--rehearse"] * rehearse)]
        process = subprocess.Popen(command, cwd=ROOT)
        why = _watch(log, process, end)
        if log.done:
            return
        lost = [name for name in log.begun if name not in log.ended]
        if not lost:
            print(f"benchmarks: the worker ended by itself with {process.returncode}")
            return
        log.lose(lost[-1], why or f"the process ended with {process.returncode}")
        if time.monotonic() > end:
            return


def _file(log: Log, names: list[str], seconds: float, rehearse: bool) -> dict[str, Any]:
    for name in names:
        if name not in log.ended:
            log.missing.setdefault(name, {})[FLASHKERN] = LATE
    clock = "wall" if rehearse else "cuda events"
    command = f"python -m benchmarks gpu --seconds={seconds:.0f}" + " --rehearse" * rehearse
    return {
        "flashkern": {
            "profile": profile(rehearse),
            "device": "cpu" if rehearse else "cuda",
            "seconds": round(seconds, 1),
            "machine": machine.describe(0, clock),
            "roofs": [] if log.roof is None else [log.roof.as_dict()],
            "missing": log.missing,
            "command": command,
        },
        "benchmarks": log.entries,
        "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(),
    }


def _pictures(run: results.Run, out: Path) -> str:
    """The page with plots, if the libraries for it are there; what became of it, in words."""
    try:
        from benchmarks import page, plots
    except ImportError as reason:
        return f"left out: plots and index.html ({reason})"
    out.mkdir(parents=True, exist_ok=True)
    page.write(run, plots.draw(run, out), out / "index.html")
    return f"page: {out / 'index.html'}"


def run(seconds: float, out: Path | None, only: str, rehearse: bool) -> int:
    """Measures, reports, and says 0 if flashkern ran on every case that there was time for."""
    import torch

    if not rehearse and not torch.cuda.is_available():
        print(f"benchmarks: torch {torch.__version__} sees no GPU", file=sys.stderr)
        return 2
    start = time.monotonic()
    cases = [label(case) for case in (rehearsal() if rehearse else quick())]
    names = [name for name in cases if only in name]
    folder = out or machine.results_folder()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{profile(rehearse)}.lines"
    path.write_text("")
    log = Log(path)
    _measure(log, names, seconds - _REPORT, only, rehearse)
    data = _file(log, names, time.monotonic() - start, rehearse)
    target = folder / f"{profile(rehearse)}.json"
    target.write_text(json.dumps(data))
    path.unlink()
    if not log.entries:
        print("benchmarks: nothing was measured", file=sys.stderr)
        return 1
    found = results.load(target)
    text = markdown.markdown(found, target.name)
    target.with_suffix(".md").write_text(text + "\n")
    print("\n" + text)
    print(_pictures(found, ROOT / "reports" / "gpu"))
    print(f"written: {target}")
    own = [why[FLASHKERN] for why in log.missing.values() if FLASHKERN in why]
    return int(any(why != LATE for why in own))
