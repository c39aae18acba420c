"""The machine's limits: plausible figures, and the arithmetic on them."""

import pytest

from benchmarks import machine, roof
from benchmarks.profiles import PROFILES, label
from benchmarks.roof import Roof
from flashkern import _host


def test_limits_are_plausible():
    found = roof.measure(1, seconds=0.4)
    assert 1e9 < found.fma < 1e12
    assert 1e8 < found.gemm < 1e12
    assert all(1e8 < speed < 1e12 for speed in found.read.values())


@pytest.mark.parametrize("call", [lambda: _host.fma_peak(0), lambda: _host.read_peak(1 << 20, 0)])
def test_no_threads_are_refused(call):
    with pytest.raises(ValueError, match="threads must be at least 1"):
        call()


def test_a_working_set_too_small_is_refused():
    with pytest.raises(ValueError, match="bytes must be at least 512"):
        _host.read_peak(100, 1)


def test_the_limit_is_the_slower_of_two():
    limits = Roof(1, fma=1e9, gemm=1e9, read={1 << 20: 4e9, 1 << 22: 1e9})
    assert limits.read_at(1) == 4e9 and limits.read_at(1 << 30) == 1e9
    assert limits.read_at(1 << 21) == pytest.approx(2e9)
    assert limits.least_seconds(1e9, 1 << 22) == (pytest.approx(1.0), "fma")
    assert limits.least_seconds(1.0, 1 << 22) == (pytest.approx((1 << 22) / 1e9), "read")
    assert limits.least_seconds(1e9, 1 << 22, "bf16") == (pytest.approx(1.0), "fma")
    limits.bf16 = 2e9
    assert limits.least_seconds(1e9, 1 << 22, "bf16") == (pytest.approx(0.5), "bf16")
    assert limits.least_seconds(1e9, 1 << 22, "f16") == (pytest.approx(1.0), "fma")
    assert Roof.from_dict(limits.as_dict()) == limits


def test_the_better_of_two_measurements_counts():
    one, other = Roof(1, 1.0, 5.0, {8: 2.0}), Roof(1, 3.0, 4.0, {8: 1.0})
    assert roof.best(one, other) == Roof(1, 3.0, 5.0, {8: 2.0})


def test_a_record_says_where_it_was_made():
    record = machine.describe(2, "wall")
    assert record["cores"] >= 1 and record["threads"] == 2
    assert record["isa"] in ("portable", "avx2", "avx512", "avx512_bf16", "amx_bf16")
    assert record["versions"]["torch"] and "commit" in record and "gpu" in record


@pytest.mark.parametrize("name", sorted(PROFILES))
def test_labels_are_unique(name):
    labels = [label(case) for case in PROFILES[name].cases]
    assert len(set(labels)) == len(labels)


def test_a_peak_is_found_however_short_the_time():
    assert _host.fma_peak(threads=1, seconds=0.0) > 0
