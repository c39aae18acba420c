"""The harness on a clock that the test controls: what is measured is what took time."""

import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

from benchmarks.clock import CpuClock, Replay, WallClock
from benchmarks.problem import with_control
from benchmarks.sampler import CONTROL, FLASHKERN, Contender, sample

ROOT = Path(__file__).resolve().parents[2]


class FakeClock(WallClock):
    """Time passes only inside calls."""

    name = "fake"

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def _now(self) -> float:  # type: ignore[override]
        return self.now

    def contender(self, name: str, seconds: float, role: str = "peer", scale: float = 1.0):
        def call() -> None:
            self.now += seconds
            self.calls.append(name)

        return Contender(name, call, role, scale=scale)


def test_every_contender_gets_its_own_time():
    clock = FakeClock()
    contenders = [clock.contender(FLASHKERN, 0.001, FLASHKERN), clock.contender("slow", 0.003)]
    result = sample(with_control(contenders), clock, budget=0.0)
    assert set(result.seconds) == {FLASHKERN, "slow", CONTROL}
    assert result.seconds[FLASHKERN] == pytest.approx([0.001] * 5)
    assert result.seconds[CONTROL] == pytest.approx([0.001] * 5)
    assert all(t == pytest.approx(0.003) for t in result.seconds["slow"])


def test_contenders_alternate():
    clock = FakeClock()
    contenders = [clock.contender(name, 0.1) for name in "abc"]
    sample(contenders, clock, budget=1e9, least=6)
    rounds = ["".join(clock.calls[i : i + 3]) for i in range(0, 18, 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({names[0] for names in rounds}) == 3  # nobody always runs first
    assert len(set(rounds)) == 6  # nobody always runs behind the same neighbour


def test_a_short_call_is_measured_behind_itself():
    clock = FakeClock()
    sample([clock.contender(name, 0.01) for name in "abc"], clock, budget=0.0, least=4)
    rounds = clock.calls[3:]  # the first round estimates
    assert len(rounds) == 2 * 3 * 3 and rounds[::2] == rounds[1::2]


def test_a_slow_contender_is_measured_less_often():
    clock = FakeClock()
    contenders = [clock.contender("fast", 0.001), clock.contender("slow", 10.0)]
    result = sample(contenders, clock, budget=0.0, least=6)
    assert len(result.seconds["fast"]) == 6
    assert len(result.seconds["slow"]) == 2


def test_short_calls_are_repeated_inside_a_sample():
    clock = FakeClock()
    result = sample([clock.contender("tiny", 1e-6)], clock, budget=0.0)
    assert len(clock.calls) >= 4 * 500
    assert result.seconds["tiny"] == pytest.approx([1e-6] * 4)


def test_scale_counts_the_part_that_a_case_asks_for():
    clock = FakeClock()
    result = sample([clock.contender("double", 0.002, scale=0.5)], clock, budget=0.0)
    assert result.seconds["double"] == pytest.approx([0.001] * 5)


def test_replay_shows_recorded_durations():
    replay = Replay()
    replay.load([0.25, 0.5])
    seen = []
    for _ in range(2):
        start = replay()
        replay.step()
        seen.append(replay() - start)
    assert seen == [0.25, 0.5]
    with pytest.raises(StopIteration):
        replay.step()


def test_pytest_benchmark_computes_the_replayed_median(tmp_path):
    pytest.importorskip("pytest_benchmark")
    samples = [0.3, 0.1, 0.2, 0.9, 0.15]
    (tmp_path / "test_replay.py").write_text(f"""
import pytest
from benchmarks.clock import Replay
replay = Replay()

@pytest.mark.benchmark(timer=replay)
def test_it(benchmark):
    replay.load({samples})
    benchmark.pedantic(replay.step, rounds={len(samples)})
    assert benchmark.stats.stats.median == pytest.approx({median(samples)})
    assert benchmark.stats.stats.max == pytest.approx({max(samples)})
""")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize("clock", [WallClock(), CpuClock()], ids=lambda c: c.name)
def test_real_clocks_see_work(clock):
    assert 0 < clock.seconds(lambda: sum(range(10000)), 3) < 1
