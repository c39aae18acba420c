"""A GPU's benchmarks without one: a made-up driver, workers that die or hang, bars, a rehearsal."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import bars, gpu, markdown, results
from benchmarks.nvml import Nvml, Watch, reasons
from benchmarks.profiles import label
from benchmarks.profiles_gpu import quick, rehearsal
from benchmarks.sampler import CONTROL, FLASHKERN

ROOT = Path(__file__).resolve().parents[2]
DRIVER = r"""
#include <cstring>
static unsigned calls;
extern "C" {
int nvmlInit_v2() { return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** handle) {
  *handle = (void*)0x1234;
  return index == 0 ? 0 : 2;
}
static int known(void* handle) { return handle == (void*)0x1234 ? 0 : 2; }
int nvmlDeviceGetClockInfo(void* h, int kind, unsigned* mhz) {
  *mhz = kind == 1 ? 1400 + 100 * (calls++ % 3) : 2619;
  return known(h);
}
int nvmlDeviceGetMaxClockInfo(void* h, int, unsigned* mhz) { return *mhz = 1980, known(h); }
int nvmlDeviceGetPowerUsage(void* h, unsigned* mw) { return *mw = 690500, known(h); }
int nvmlDeviceGetEnforcedPowerLimit(void*, unsigned*) { return 3; }  // not supported
int nvmlDeviceGetTemperature(void* h, int, unsigned* c) { return *c = 61, known(h); }
int nvmlDeviceGetCurrentClocksThrottleReasons(void* h, unsigned long long* bits) {
  return *bits = 1ull << 2 | 1, known(h);
}
int nvmlDeviceGetName(void* h, char* out, unsigned size) {
  return std::strncpy(out, "NVIDIA Made-Up 80GB", size), known(h);
}
int nvmlSystemGetDriverVersion(char* out, unsigned size) {
  return std::strncpy(out, "580.1", size), 0;
}
}
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> str:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not here")
    folder = tmp_path_factory.mktemp("nvml")
    (folder / "nvml.cpp").write_text(DRIVER)
    command = ["g++", "-shared", "-fPIC", "-o", folder / "libnvml.so", folder / "nvml.cpp"]
    subprocess.run(command, check=True)
    return str(folder / "libnvml.so")


def test_nvml_answers(driver: str) -> None:
    found = Nvml.open(0, driver)
    assert found is not None
    said = found.describe()
    assert said["name"] == "NVIDIA Made-Up 80GB" and said["driver"] == "580.1"
    assert said["power_watt"] == 690.5 and said["power_limit_watt"] is None
    assert said["sm_mhz_most"] == 1980 and said["memory_mhz"] == 2619 and said["celsius"] == 61
    assert found.reason_bits() == 5  # by its old name, where a driver has no other


def test_nvml_that_is_not_there(driver: str) -> None:
    assert Nvml.open(0, "libno-such-driver.so.1") is None
    assert Nvml.open(1, driver) is None
    with Watch(None) as watch:
        pass
    assert watch.summary() is None


def test_watch_sees_the_span(driver: str) -> None:
    with Watch(Nvml.open(0, driver), seconds=0.001) as watch:
        time.sleep(0.1)
    seen = watch.summary()
    assert seen is not None and seen["readings"] >= 3
    assert seen["sm_mhz"] == [1400, 1500, 1600] and seen["milliwatt"] == [690500] * 3
    assert seen["slowed_by"] == ["software power cap"]


def test_reasons() -> None:
    assert reasons(0) == []
    assert reasons(1 << 6 | 1 << 3) == ["hardware slowdown", "hardware thermal slowdown"]
    assert reasons(1 << 40) == ["bit 40"]


# ---- bars ----


def _entry(case: str, provider: str, seconds: float, **info: object) -> dict:
    role = {FLASHKERN: FLASHKERN, CONTROL: "control", "frozen linear": "limit"}
    facts = {"case": case, "provider": provider, "role": role.get(provider, "peer"), "flops": 0,
             "bytes": 0, "units": {}, "threads": 0, "scaling": False, "shape": case,
             "dtype": "bf16", "error": 1e-3, **info}  # fmt: skip
    return {"extra_info": facts, "stats": {"median": seconds, "iqr": 0.0, "rounds": 5}}


def _run(tmp_path: Path, entries: list[dict], missing: dict | None = None) -> results.Run:
    roof = {"threads": 0, "fma": 8e14, "gemm": 8e14, "read": {"1000": 1e12, "2000000": 3e12},
            "gpu": True, "call": 2e-6}  # fmt: skip
    machine = {"cpu": {"model": "a CPU"}, "cores": 2, "isa": "portable",
               "versions": {"torch": "2.11", "flashkern": "1"},
               "gpu": {"name": "A GPU", "driver": "5", "cuda": "13"}}  # fmt: skip
    record = {"profile": "gpu-quick", "device": "cuda", "machine": machine, "roofs": [roof],
              "missing": missing or {}, "seconds": 1.0}  # fmt: skip
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"flashkern": record, "benchmarks": entries, "datetime": ""}))
    return results.load(path)


def test_bars_are_judged_from_the_numbers(tmp_path: Path) -> None:
    forward = {"operator": "attention", "mode": "prefill"}
    decode = {"operator": "attention", "mode": "decode", "bytes": 3 * 10**9}
    lora = {"operator": "lora", "mode": "forward"}
    entries = [
        _entry("a", FLASHKERN, 1.0, **forward), _entry("a", "torch flash", 1.2, **forward),
        _entry("b", FLASHKERN, 1.0, **forward), _entry("b", "torch flash", 0.9, **forward),
        _entry("c", FLASHKERN, 1.0, **forward),  # its peer could not run
        _entry("d", FLASHKERN, 1.1e-3, keys=16384, **decode),  # 0.91 of 3 TB/s
        _entry("e", FLASHKERN, 2e-3, keys=4096, **decode),  # too short for the bar
        _entry("f", FLASHKERN, 1.05, **lora), _entry("f", "frozen linear", 1.0, **lora),
    ]  # fmt: skip
    found = {v.bar.name.split(",")[0]: v for v in bars.judge(_run(tmp_path, entries))}
    first = found["attention forward"]
    assert (first.word, first.kept, first.worst) == ("not met", 1, "b")
    assert first.values == {"a": pytest.approx(1.2), "b": pytest.approx(0.9)}
    long = found["decode from 16k keys on"]
    assert long.word == "met" and long.values == {"d": pytest.approx(0.909, abs=1e-3)}
    assert found["LoRA forward"].word == "met" and found["LoRA forward"].values["f"] == 1.05
    assert found["beam step above 100 MB"].word == "not measured"


def test_the_report_shows_bars_and_what_was_lost(tmp_path: Path) -> None:
    info = {"operator": "beam", "mode": "step", "bytes": 2 * 10**8}
    entries = [_entry("x", FLASHKERN, 1e-4, **info), _entry("x", "torch chain", 4e-4, **info)]
    run = _run(tmp_path, entries, {"y": {FLASHKERN: "the process ended with -11"}})
    text = markdown.markdown(run, "run.json")
    assert "On A GPU, driver 5, CUDA 13" in text and "800 TFLOP/s" in text
    assert "| beam step, speed over torch's chain | >= 5 | not met | 0 of 1 | 4.00 x |" in text
    assert "- not measured: y: the process ended with -11" in text


def test_every_bar_has_its_cases() -> None:
    cases = quick()
    assert len({label(case) for case in cases}) == len(cases)
    modes = {(case.operator, case.mode) for case in cases}
    for mode in ("prefill", "training", "decode", "paged"):
        assert ("attention", mode) in modes
    assert {("lora", m) for m in ("forward", "training", "decode", "several")} <= modes
    large = [c for c in cases if c.operator == "beam" and c.beams * c.vocab * 2 > bars.LARGE]
    assert large and sum(getattr(c, "kv", 0) >= bars.LONG for c in cases) >= 3
    assert {(c.operator, c.mode) for c in rehearsal()} == modes


# ---- a worker that dies, one that hangs ----

WORKER = """
import json, os, sys, time
path, first = sys.argv[1], int(sys.argv[2])
file = open(path, "a")
def say(**line): file.write(json.dumps(line) + chr(10)); file.flush()
for name in ["a", "b", "c", "d"][first:]:
    say(begin=name)
    if name == "b": os._exit(9)
    if name == "c": file.write('{"case": "c", "ent'); file.flush(); time.sleep(60)
    info = {"provider": "flashkern", "case": name}
    say(case=name, entries=[{"extra_info": info, "stats": {"median": 1.0}}], missing={"p": "why"})
say(done=True)
"""


def test_what_a_dying_worker_found_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "WORKER", (sys.executable, "-c", WORKER))
    monkeypatch.setattr(gpu, "_HUNG", 1.0)
    path = tmp_path / "lines"
    path.write_text("")
    log = gpu.Log(path)
    gpu._measure(log, ["a", "b", "c", "d"], 60, "", False)
    assert [e["extra_info"]["case"] for e in log.entries] == ["a", "d"] and log.done
    assert log.missing["a"] == {"p": "why"}
    assert log.missing["b"][FLASHKERN] == "the process ended with 9"
    assert log.missing["c"][FLASHKERN].startswith("no word for")
    assert "LOST b" in capsys.readouterr().out


def test_rehearsal(tmp_path: Path) -> None:
    """The real worker on a CPU, in a Python without rich and matplotlib: all but the GPU."""
    code = (
        "import sys; sys.modules['rich'] = sys.modules['matplotlib'] = None\n"
        "from benchmarks.__main__ import main; sys.exit(main())"
    )
    out = tmp_path / "results"
    arguments = ["gpu", "--rehearse", "--seconds=60", "--only=beam step 4", f"--out={out}"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left out: plots and index.html" in done.stdout and "| bar |" in done.stdout
    run = results.load(out / "gpu-rehearsal.json")
    assert len(run.operators) == 4 and all("torch chain" in row.seconds for row in run.operators)
    assert run.gpu is None and all(row.errors[FLASHKERN] < 1e-5 for row in run.operators)
    assert (out / "gpu-rehearsal.md").exists() and not list(out.glob("*.lines"))
