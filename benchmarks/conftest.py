"""pytest's side of a run: options, the session, progress, and the record in the JSON."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch

from benchmarks.clock import CLOCKS
from benchmarks.profiles import PROFILES
from benchmarks.progress import Progress
from benchmarks.session import Bench

_BENCH = pytest.StashKey[Bench]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("flashkern")
    group.addoption("--bench-profile", default="quick", choices=sorted(PROFILES))
    group.addoption("--bench-clock", default="wall", choices=sorted(CLOCKS))
    group.addoption("--bench-threads", type=int, default=0, help="0: one for each core")
    group.addoption("--bench-scale", type=float, default=1.0, help="of the seconds for a case")


def thread_count(config: pytest.Config) -> int:
    """The threads of a run: one for each core unless asked otherwise."""
    return config.getoption("--bench-threads") or len(os.sched_getaffinity(0))


def pytest_configure(config: pytest.Config) -> None:
    threads = thread_count(config)
    clock = config.getoption("--bench-clock")
    if clock == "cpu" and threads != 1:
        raise pytest.UsageError("--bench-clock cpu needs --bench-threads 1: it adds up threads")
    torch.set_num_threads(threads)
    name = config.getoption("--bench-profile")
    profile = PROFILES[name]
    bench = Bench(name, profile, CLOCKS[clock](), threads, config.getoption("--bench-scale"))
    config.stash[_BENCH] = bench


def pytest_collection_finish(session: pytest.Session) -> None:
    """Knows what will be measured: sets up the progress bar and finds the machine's limits."""
    bench = session.config.stash[_BENCH]
    cases = {name for item in session.items if (name := _case_name(item))}
    bench.listener = Progress(len(cases), sys.__stderr__)
    if cases and not session.config.option.collectonly:
        bench.listener.note("measuring the machine's limits")
        bench.measure_roofs()


def _case_name(item: pytest.Item) -> str | None:
    callspec = getattr(item, "callspec", None)
    return callspec.id.split("|")[0] if callspec else None


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        line = str(report.longrepr).strip().splitlines()[-1]
        print(f"FAILED {report.nodeid}: {line}", file=sys.__stderr__)


def pytest_sessionfinish(session: pytest.Session) -> None:
    listener = session.config.stash[_BENCH].listener
    if listener is not None:
        listener.stop()


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest) -> Bench:
    return request.config.stash[_BENCH]


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    bench = config.stash[_BENCH]
    bench.measure_roofs()
    output_json["flashkern"] = bench.record()
