"""Real models end to end: one benchmark for each task and contender, and equal results."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.clock import Replay
from benchmarks.models import beam_parts
from benchmarks.models.tasks import TASKS
from benchmarks.problem import same
from benchmarks.profiles import PROFILES
from benchmarks.sampler import CONTROL, FLASHKERN
from benchmarks.session import Bench, Measured

REPLAY = Replay()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    profile = PROFILES[metafunc.config.getoption("--bench-profile")]
    pairs = [(t, name) for t in profile.models for name in (*TASKS[t].contenders, CONTROL)]
    ids = [f"model {TASKS[task].title}|{name}" for task, name in pairs]
    metafunc.parametrize(("task", "provider"), pairs, ids=ids)


def _measure(bench: Bench, name: str) -> Measured:
    task = TASKS[name]
    reason = task.why_missing()
    if reason is not None:
        bench.missing[task.title] = {task.title: reason}
        pytest.skip(reason)
    facts = {"operator": "model", "mode": name, "shape": task.title, "dtype": "f32"}
    full = bench.profile_name == "full"
    return bench.measure_problem(f"model {task.title}", lambda: task.build(full), facts)


@pytest.mark.benchmark(timer=REPLAY)
def test_model(benchmark: Any, bench: Bench, task: str, provider: str) -> None:
    measured = _measure(bench, task)
    if provider not in measured.seconds:
        pytest.skip(f"{provider} is not installed")
    REPLAY.load(measured.seconds[provider])
    benchmark.group = measured.group
    benchmark.extra_info.update(measured.info[provider])
    benchmark.pedantic(REPLAY.step, rounds=len(measured.seconds[provider]))
    if provider == FLASHKERN:
        results = {n: info["quality"] for n, info in measured.info.items() if n != CONTROL}
        if task == "beams":
            bench.beam_search = beam_parts.measure(bench.profile_name == "full")
        for key, own in results[FLASHKERN].items():
            others = [other[key] for other in results.values() if key in other]
            assert all(same(own, other) for other in others), results
