"""The operators: one benchmark for each case and provider, all providers of a case interleaved."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import providers
from benchmarks.clock import Replay
from benchmarks.conftest import thread_count
from benchmarks.profiles import PROFILES, Case, label
from benchmarks.session import Bench

REPLAY = Replay()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    profile = PROFILES[metafunc.config.getoption("--bench-profile")]
    threads = thread_count(metafunc.config)
    cases = [case for case in profile.cases if case.threads < threads]
    pairs = [(case, name) for case in cases for name in providers.names(case)]
    ids = [f"{label(case)}|{name}" for case, name in pairs]
    metafunc.parametrize(("case", "provider"), pairs, ids=ids)


@pytest.mark.benchmark(timer=REPLAY)
def test_operator(benchmark: Any, bench: Bench, case: Case, provider: str) -> None:
    measured = bench.measure(case)
    if provider in measured.missing:
        pytest.skip(measured.missing[provider])
    REPLAY.load(measured.seconds[provider])
    benchmark.group = measured.group
    benchmark.extra_info.update(measured.info[provider])
    benchmark.pedantic(REPLAY.step, rounds=len(measured.seconds[provider]))
