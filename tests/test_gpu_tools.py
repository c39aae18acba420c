"""What `make gpu` reads from other programs, and what it says where there is no GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools import gpu_tests

ROOT = Path(__file__).resolve().parent.parent
MEMCHECK = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at void flashkern::attention::forward<float>(Params)+0x1230
=========     by thread (3,0,0) in block (1,0,0)
=========     Address 0x7f0 is out of bounds
=========
========= ERROR SUMMARY: 3 errors
========= ERROR SUMMARY: 1 error was not printed. Use --print-limit option to adjust
"""
RACECHECK = """========= COMPUTE-SANITIZER
every kernel ran: 213 results on cuda
========= RACECHECK SUMMARY: {} hazards displayed (0 errors, 0 warnings)
"""


def test_findings() -> None:
    assert gpu_tests.findings(MEMCHECK) == 4
    assert gpu_tests.findings("========= ERROR SUMMARY: 0 errors\n") == 0
    assert gpu_tests.findings(RACECHECK.format(2)) == 2
    assert gpu_tests.findings(RACECHECK.format(0)) == 0
    assert gpu_tests.findings("========= Error: Device not supported\n") is None
    lines = gpu_tests.first_lines(MEMCHECK)
    assert lines[0] == "Invalid __global__ read of size 16 bytes" and len(lines) == 4


INITCHECK = """========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void cub::sort<float>(float *)+0x90
=========     by thread (3,0,0) in block (1,0,0)
=========
========= Uninitialized __global__ memory read of size 2 bytes
=========     at void flashkern::beam::scan<float>(Params)+0x1230
=========     by thread (3,0,0) in block (1,0,0)
=========
every kernel ran: 213 results on cuda
========= ERROR SUMMARY: 2 errors
"""


def test_initcheck_counts_only_kernels_of_flashkern() -> None:
    assert gpu_tests.findings(INITCHECK) == 2 and gpu_tests.count_own(INITCHECK) == 1
    kept = gpu_tests.own(INITCHECK)
    assert "flashkern::beam" in kept and "cub::sort" not in kept and "every kernel ran" in kept
    assert gpu_tests.count_own(INITCHECK.replace("flashkern", "at::native")) == 0


@pytest.mark.parametrize(
    ("prints", "code", "clean"),
    [
        (RACECHECK.format(0), 0, True),
        (RACECHECK.format(1), 9, False),
        (MEMCHECK, 9, False),
        (RACECHECK.format(0).replace("every kernel ran", "stopped"), 0, False),
        ("========= Error: Device not supported\n", 1, False),
    ],
)
def test_a_tool_is_clean_only_if_it_says_so(
    prints: str, code: int, clean: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{prints}END\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(gpu_tests, "OUT", tmp_path)
    result = gpu_tests.Sanitizer(str(tool), "memcheck").result(30)
    assert result["clean"] is clean and result["exit"] == code
    assert clean or result["says"]


def test_a_tool_that_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\necho starting\nexec sleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setattr(gpu_tests, "OUT", tmp_path)
    result = gpu_tests.Sanitizer(str(tool), "racecheck").result(1)
    assert result == {
        "clean": False, "findings": None, "exit": "out of time", "says": ["starting"],
    }  # fmt: skip


def _pytest(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_junit(tmp_path: Path) -> None:
    (tmp_path / "test_three.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'no'\n"
        "@pytest.fixture\ndef broken(): raise OSError('gone')\n"
        "def test_broken(broken): pass\n"
        "def test_left(): pytest.skip('needs two GPUs')\n"
    )
    report = tmp_path / "report.xml"
    assert _pytest(tmp_path, f"--junitxml={report}").returncode == 1
    found = gpu_tests.read_junit(report)
    assert found["passed"] == 1 and found["skipped"] == {"needs two GPUs": 1}
    assert {name.split("::")[1] for name in found["failed"]} == {"test_bad", "test_broken"}
    assert "no" in next(why for name, why in found["failed"].items() if "test_bad" in name)


def test_what_starts_too_late_is_skipped() -> None:
    done = _pytest(ROOT / "tests" / "beam", "--backend=portable", "--stop-at=1", "-rs")
    assert done.returncode == 0 and "out of time" in done.stdout and "passed" not in done.stdout


def test_without_hypothesis_the_other_tests_run() -> None:
    code = (
        "import sys, importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'hypothesis' else real(n, *a)\n"
        "import pytest; sys.exit(pytest.main(['tests/beam/test_beam_topk.py', '-q', '-rs',"
        " '-p', 'no:cacheprovider', '-p', 'no:hypothesispytest',"
        " '-k', 'any_shape or float64_is']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "hypothesis is not installed" in done.stdout and "sss." in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence_says_why() -> None:
    command = [sys.executable, "-m", "tools.gpu", "test", "bench"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("make gpu: torch ")
    assert "without CUDA" in done.stderr or "sees no GPU" in done.stderr
