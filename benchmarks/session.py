"""One benchmark run: clock, threads, roofs, and one measured case at a time."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks import machine, providers, roof
from benchmarks.clock import Clock
from benchmarks.problem import Problem, relative_error
from benchmarks.profiles import Case, Profile, label
from benchmarks.providers.lora import ERROR_SEED
from benchmarks.roof import Roof
from benchmarks.sampler import CONTROL, Contender, sample


@dataclass
class Measured:
    """What one case gave: samples, and what the JSON says beside each contender's statistics."""

    group: str
    seconds: dict[str, list[float]]
    info: dict[str, dict[str, Any]]
    missing: dict[str, str]


def judge_one(
    problem: Problem, contender: Contender, shared: dict[str, Sequence[torch.Tensor]]
) -> dict[str, Any]:
    """Runs a contender once: its error against float64, and its quality if the case has one.

    Contenders that the exact result does not depend on share it: `shared` keeps it.
    """
    facts: dict[str, Any] = {}
    torch.manual_seed(ERROR_SEED)
    contender.prepare()
    result = contender.call()
    if problem.quality is not None:
        facts["quality"] = problem.quality(contender.name, result)
    if problem.exact is None:
        return facts
    results = contender.unpack(result)
    if problem.own_exact or contender.role == "limit":
        exact = problem.exact(contender.name)
    else:
        if not shared:
            shared["exact"] = problem.exact(contender.name)
        exact = shared["exact"]
    if results:
        facts["error"] = relative_error(results, exact)
    return facts


def judge(problem: Problem) -> dict[str, dict[str, Any]]:
    """What `judge_one` finds for each contender but the control."""
    shared: dict[str, Sequence[torch.Tensor]] = {}
    judged = [c for c in problem.contenders if c.name != CONTROL]
    return {c.name: judge_one(problem, c, shared) for c in judged}


def describe(
    name: str, problem: Problem, facts: dict[str, Any], clock: str, judged: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """What a result file says beside the times of each contender of a case."""
    return {
        contender.name: {
            **facts,
            **problem.facts,
            "case": name,
            "provider": contender.name,
            "role": contender.role,
            "flops": problem.flops,
            "bytes": problem.bytes,
            "units": problem.units,
            "clock": clock,
            **judged.get(contender.name, {}),
        }
        for contender in problem.contenders
    }


@dataclass
class Bench:
    """The state of a run; `measure` is called by every test of benchmarks/."""

    profile_name: str
    profile: Profile
    clock: Clock
    threads: int
    scale: float = 1.0  # of the seconds that the profile gives to a case
    roofs: dict[int, Roof] = field(default_factory=dict)
    missing: dict[str, dict[str, str]] = field(default_factory=dict)
    beam_search: dict[str, Any] | None = None  # models/beam_parts.py
    started: float = field(default_factory=time.time)
    listener: Any = None  # told of each case: begin(label), end(label, medians)
    _last: tuple[str, Measured] | None = None

    def thread_counts(self) -> list[int]:
        found = {case.threads or self.threads for case in self.profile.cases}
        return sorted(count for count in found if count <= self.threads)

    def measure_roofs(self) -> None:
        """Measures the limits; a second call keeps the better of the two."""
        for threads in self.thread_counts():
            seen = roof.measure(threads)
            known = self.roofs.get(threads)
            self.roofs[threads] = seen if known is None else roof.best(known, seen)

    def measure(self, case: Case) -> Measured:
        """The measurements of `case`: taken when first asked for, kept until another case comes."""
        name = label(case)
        if self._last is None or self._last[0] != name:
            self._last = None  # frees the memory of the case before
            threads = case.threads or self.threads
            self._tell("begin", name)
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                problem, missing = providers.problem(case)
                facts = {"operator": case.operator, "mode": case.mode, "shape": case.shape}
                facts |= {"dtype": case.dtype, "threads": threads, "scaling": bool(case.threads)}
                seconds = self.profile.seconds * self.scale
                measured = self._run(name, problem, facts, seconds, 5)
            finally:
                torch.set_num_threads(before)
            measured.missing = missing
            self._keep(name, measured)
        assert self._last is not None
        return self._last[1]

    def measure_problem(
        self, name: str, build: Callable[[], Problem], facts: dict[str, Any]
    ) -> Measured:
        """The same for a problem that is no case of an operator, with the models' budget."""
        if self._last is None or self._last[0] != name:
            self._last = None
            self._tell("begin", name)
            facts = facts | {"threads": self.threads, "scaling": False}
            seconds = self.profile.model_seconds * self.scale
            measured = self._run(name, build(), facts, seconds, 3)
            self._keep(name, measured)
        assert self._last is not None
        return self._last[1]

    def _run(
        self, name: str, problem: Problem, facts: dict[str, Any], budget: float, least: int
    ) -> Measured:
        judged = judge(problem)  # also a warm-up
        samples = sample(problem.contenders, self.clock, budget, least)
        info = describe(name, problem, facts, self.clock.name, judged)
        return Measured(name, samples.seconds, info, {})

    def _keep(self, name: str, measured: Measured) -> None:
        self._last = (name, measured)
        if measured.missing:
            self.missing[name] = measured.missing
        self._tell("end", name, measured)

    def _tell(self, event: str, *arguments: Any) -> None:
        if self.listener is not None:
            getattr(self.listener, event)(*arguments)

    def record(self) -> dict[str, Any]:
        """What the JSON says about the run as a whole."""
        return {
            "profile": self.profile_name,
            "seconds": round(time.time() - self.started, 1),
            "machine": machine.describe(self.threads, self.clock.name),
            "roofs": [r.as_dict() for r in self.roofs.values()],
            "missing": self.missing,
            "beam_search": self.beam_search,
            "command": "python -m benchmarks " + " ".join(sys.argv[1:]),
        }
