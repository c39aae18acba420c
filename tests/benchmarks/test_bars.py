"""What is asked of a CPU's numbers, judged on a committed result file and on made-up ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import bars, page, results
from benchmarks.profiles import PROFILES, label
from benchmarks.results import Run
from benchmarks.sampler import FLASHKERN

KEPT = Path(__file__).parents[2] / "benchmarks" / "results"
CASE = "attention prefill H8 S1024 D64 f32"
LORA = "lora training 512x768->768 r16 drop0.05 f32"


def _changed(tmp_path: Path, speed: float, name: str = "intel-xeon-amx") -> Run:
    """A committed file in which flashkern is so many times as fast."""
    data = json.loads((KEPT / name / "quick.json").read_text())
    for entry in data["benchmarks"]:
        if entry["extra_info"]["provider"] == FLASHKERN:
            entry["stats"]["median"] /= speed
    path = tmp_path / "run.json"
    path.write_text(json.dumps(data))
    return results.load(path)


def _values(run: Run) -> dict[str, dict[str, float]]:
    """By bar; "the same" stands behind what it is the same as."""
    found: dict[str, dict[str, float]] = {}
    stem = ""
    for verdict in bars.judge(run):
        name = verdict.bar.name
        stem = stem if name.startswith("the same") else name
        found[name if stem == name else f"{stem}; {name}"] = verdict.values
    return found


def test_ratios_come_from_the_numbers(tmp_path: Path) -> None:
    run = _changed(tmp_path, 1.0)
    rows = {row.case: row for row in run.operators}
    row, roof, values = rows[CASE], run.roofs[2], _values(run)
    share = 4 * 8 * 1024 * 1024 * 64 / row.seconds[FLASHKERN] / roof.fma
    assert values["attention from 1024 tokens, head_dim 64, of the peak"] == {
        CASE: pytest.approx(share)
    }
    lora = rows[LORA]
    base, rank = 4 * 512 * 768 * 768, 6 * 512 * 16 * (768 + 768)
    ideal = lora.seconds["frozen linear"] * (base + rank) / base
    found = values[
        "LoRA training, time over the ideal beside the frozen layer; the same with dropout"
    ]
    assert found == {LORA: pytest.approx(lora.seconds[FLASHKERN] / ideal)}


@pytest.mark.parametrize("speed", [0.01, 100.0])
def test_verdicts_follow_the_times(tmp_path: Path, speed: float) -> None:
    verdicts = [v for v in bars.judge(_changed(tmp_path, speed)) if v.values]
    assert len(verdicts) > 12
    assert {v.word for v in verdicts} == {"met" if speed > 1 else "not met"}


def test_the_full_profile_has_every_bar(tmp_path: Path) -> None:
    """A run of all its cases, in numbers that are made up, leaves none unmeasured."""
    entries = []
    for case in PROFILES["full"].cases:
        facts = {"operator": case.operator, "mode": case.mode, "shape": case.shape}
        facts |= {"keys": getattr(case, "kv", 0), "head_dim": getattr(case, "dim", 0)}
        facts |= {
            n: getattr(case, n) for n in ("causal", "rows", "inputs", "outputs") if hasattr(case, n)
        }
        facts |= {"dropout": getattr(case, "dropout", 0.0), "threads": case.threads or 2}
        facts |= {
            "flops": 1,
            "bytes": 2 * bars.LARGE,
            "units": {},
            "scaling": False,
            "role": "peer",
        }
        for provider in (FLASHKERN, "torch sdpa", "frozen linear", "transformers", "beamgrad"):
            info = {**facts, "case": label(case), "dtype": case.dtype, "provider": provider}
            stats = {"median": 1.0, "iqr": 0.0, "rounds": 5}
            entries.append({"extra_info": info, "stats": stats})
    roofs = [{"threads": n, "fma": 1.0, "gemm": 1.0, "read": {"1": 1.0}} for n in (1, 2)]
    record = {"roofs": roofs, "missing": {}}
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"flashkern": record, "benchmarks": entries, "datetime": ""}))
    unmeasured = [n for n, values in _values(results.load(path)).items() if not values]
    assert unmeasured == []


def test_the_report_has_them(tmp_path: Path) -> None:
    shown = page._bars(_changed(tmp_path, 1.0))
    assert "<h2>Bars</h2>" in shown and "beam step, speed over beamgrad" in shown
