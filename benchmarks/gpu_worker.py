"""Measures cases of the profile gpu-quick and writes each one's numbers down at once.

python -m benchmarks.gpu_worker FILE FIRST SECONDS ONLY [--rehearse]
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import providers, roof
from benchmarks.clock import Clock, EventClock, WallClock
from benchmarks.nvml import Nvml, Watch
from benchmarks.problem import Problem
from benchmarks.profiles import Case, label
from benchmarks.profiles_gpu import quick, rehearsal
from benchmarks.sampler import CONTROL, FLASHKERN, sample
from benchmarks.session import describe, judge_one

_SLOWEST, _QUICKEST = 1.0, 0.15  # seconds for the samples of a case
_SAMPLING = 0.4  # of a case's time; the rest makes inputs, compiles and judges


class Worker:
    """The state of one process: where it writes, what it measures by."""

    def __init__(self, path: Path, seconds: float, rehearse: bool) -> None:
        self._file = path.open("a")
        self._end = time.monotonic() + seconds
        self._device = "cpu" if rehearse else "cuda"
        self._clock: Clock = WallClock() if rehearse else EventClock()
        self._limits = (256, 1 << 22) if rehearse else (8192, 1 << 31)
        self._nvml = None if rehearse else Nvml.open()

    def say(self, **line: Any) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def roof(self) -> None:
        found = roof.measure_gpu(self._clock, self._device, *self._limits)
        self.say(roof=found.as_dict())

    def left(self) -> float:
        return self._end - time.monotonic()

    def alive(self) -> bool:
        """Whether kernels still run: behind a fault none does."""
        if self._device == "cpu":
            return True
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            return False
        return True

    def _judge(self, problem: Problem, missing: dict[str, str]) -> dict[str, dict[str, Any]]:
        """Each contender's error; a peer that cannot run this case is taken out, and why."""
        judged: dict[str, dict[str, Any]] = {}
        shared: dict[str, Any] = {}
        for contender in list(problem.contenders):
            if contender.name == CONTROL:
                continue
            try:
                judged[contender.name] = judge_one(problem, contender, shared)
            except Exception as reason:
                if contender.name == FLASHKERN or not self.alive():
                    raise
                missing[contender.name] = _first_line(reason)
                problem.contenders.remove(contender)
        return judged

    def measure(self, case: Case, seconds: float) -> None:
        name = label(case)
        with torch.device(self._device):
            problem, missing = providers.problem(case)
            judged = self._judge(problem, missing)
        with Watch(self._nvml) as watch:
            samples = sample(problem.contenders, self._clock, seconds)
        facts = {"operator": case.operator, "mode": case.mode, "shape": case.shape}
        facts |= {"dtype": case.dtype, "threads": 0, "scaling": False}
        info = describe(name, problem, facts, self._clock.name, judged)
        info[FLASHKERN]["gpu"] = watch.summary()
        entries = [
            {"group": name, "extra_info": info[provider], "stats": _statistics(times)}
            for provider, times in samples.seconds.items()
        ]
        self.say(case=name, entries=entries, missing=missing)

    def run(self, cases: list[Case]) -> int:
        self.roof()
        for index, case in enumerate(cases):
            if self.left() <= 0:
                break
            self.say(begin=label(case))
            share = _SAMPLING * self.left() / (len(cases) - index)
            try:
                self.measure(case, min(_SLOWEST, max(_QUICKEST, share)))
            except Exception as reason:
                self.say(failed=label(case), why=_first_line(reason))
            if not self.alive():
                return 3
        self.roof()
        self.say(done=True)
        return 0


def _first_line(reason: Exception) -> str:
    text = str(reason).strip().splitlines()
    return f"{type(reason).__name__}: {text[0][:200] if text else ''}"


def _statistics(times: list[float]) -> dict[str, Any]:
    """The part of pytest-benchmark's statistics that reports read."""
    ordered = sorted(times)
    quarters = statistics.quantiles(ordered, n=4) if len(ordered) > 1 else [ordered[0]] * 3
    return {
        "median": statistics.median(ordered),
        "iqr": quarters[2] - quarters[0],
        "min": ordered[0],
        "max": ordered[-1],
        "rounds": len(ordered),
        "data": [float(f"{t:.6g}") for t in times],
    }


def main() -> int:
    path, first, seconds, only = sys.argv[1:5]
    rehearse = "--rehearse" in sys.argv[5:]
    cases = [case for case in (rehearsal() if rehearse else quick()) if only in label(case)]
    return Worker(Path(path), float(seconds), rehearse).run(cases[int(first) :])


if __name__ == "__main__":
    sys.exit(main())
