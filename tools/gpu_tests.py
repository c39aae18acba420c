"""The tests of a GPU: pytest on the back end cuda, compute-sanitizer, vectors of its instructions.

The sanitizers run beside pytest. Everything is told on the terminal and kept in
benchmarks/results/<gpu>/tests.json: what passed, what failed, what was left out and why.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "gpu"
TESTS = ["tests/attention", "tests/lora", "tests/beam", "tests/gpu", "tests/test_far_offsets.py"]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
WORKERS = 10
# A package, and what is left out without it.
OPTIONAL = {
    "hypothesis": "tests of drawn shapes",
    "xdist": "tests in parallel",
    "pytest_timeout": "the end of a test that hangs",
    "triton": "torch.compile on the GPU",
    "transformers": "the models",
    "peft": "the adapters of PEFT",
}
_SUMMARY = re.compile(
    r"=+ (?:ERROR SUMMARY: (\d+) errors?|RACECHECK SUMMARY: (\d+) hazards? displayed)"
)


def findings(text: str) -> int | None:
    """How many errors or hazards a compute-sanitizer's output sums up; None without a summary."""
    sums = _SUMMARY.findall(text)
    return sum(int(one or other) for one, other in sums) if sums else None


def own(text: str) -> str:
    """The findings that name a kernel of flashkern, and all that is not a finding.

    A finding is what stands between two empty lines behind the bars. initcheck must see every
    kernel's writes, and so it also reports torch's own reads.
    """
    parts = re.split(r"^=+ *$\n", text, flags=re.MULTILINE)
    kept = [part for part in parts if "flashkern" in part or not re.search(r"^=+ +at ", part, re.M)]
    return "".join(kept)


def count_own(text: str) -> int:
    """How many findings of an unfiltered run name a kernel of flashkern."""
    return len(re.findall(r"^=+ +at [^\n]*flashkern", own(text), re.M))


def first_lines(text: str, count: int = 12) -> list[str]:
    """What a compute-sanitizer says first, without its banner and its summary."""
    lines = [re.sub(r"^=+ ?", "", line).rstrip() for line in text.splitlines() if "====" in line]
    kept = [line for line in lines if line and not re.match("COMPUTE-SANITIZER|.*SUMMARY", line)]
    return kept[:count]


def read_junit(path: Path) -> dict[str, Any]:
    """Counts, failures and the reasons of skips from pytest's XML."""
    failed: dict[str, str] = {}
    skipped: Counter[str] = Counter()
    passed = 0
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        bad = case.find("failure") if case.find("failure") is not None else case.find("error")
        skip = case.find("skipped")
        if bad is not None:
            failed[name] = (bad.get("message") or "").split("\n")[0][:300]
        elif skip is not None:
            skipped[skip.get("message") or ""] += 1
        else:
            passed += 1
    return {"passed": passed, "failed": failed, "skipped": dict(skipped)}


class Sanitizer:
    """One tool over tests/gpu/every_kernel.py, started at once; `result` waits for it."""

    def __init__(self, program: str, tool: str) -> None:
        self.tool = tool
        self.log = OUT / f"{tool}.log"
        script = ROOT / "tests" / "gpu" / "every_kernel.py"
        chosen = ["--kernel-regex", "kns=flashkern", "--print-limit", "50", "--error-exitcode", "9"]
        if tool == "initcheck":  # memory is initialised by torch's kernels too
            chosen = ["--print-limit", "100000"]
        command = [program, "--tool", tool, *chosen, sys.executable, str(script)]
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT,
                # Without torch's cache a tensor is an allocation, whose end the tool knows.
                env=_environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1"),
            )  # fmt: skip

    def result(self, seconds: float) -> dict[str, Any]:
        try:
            code: int | str = self.process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = "out of time"
        text = self.log.read_text(errors="replace")
        found = findings(text)
        if self.tool == "initcheck" and found is not None:
            text, found = own(text), count_own(text)
        clean = code == 0 and found == 0 and "every kernel ran" in text
        result: dict[str, Any] = {"clean": clean, "findings": found, "exit": code}
        if not clean:
            result["says"] = first_lines(text) or text.splitlines()[-12:]
        return result


def _environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "2", **more}


def run_pytest(seconds: float) -> dict[str, Any]:
    report = OUT / "tests.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", *TESTS, "--backend=cuda", "-p", "no:cacheprovider",
               f"--junitxml={report}", f"--stop-at={time.time() + seconds:.0f}"]  # fmt: skip
    if find_spec("xdist"):
        command += ["-n", str(WORKERS), "--max-worker-restart=1000"]
    if find_spec("pytest_timeout"):
        command += ["--timeout=100", "--timeout-method=thread"]
    try:
        done = subprocess.run(command, cwd=ROOT, timeout=seconds + 60, env=_environment())
        code: int | str = done.returncode
    except subprocess.TimeoutExpired:
        code = "hung"
    found = read_junit(report) if report.exists() else {"passed": 0, "failed": {}, "skipped": {}}
    return {"exit": code, **found}


def record_vectors(seconds: float) -> dict[str, Any]:
    """Runs tests/emulator/record.py, which prints one JSON object last."""
    command = [sys.executable, str(ROOT / "tests" / "emulator" / "record.py")]
    try:
        done = subprocess.run(command, cwd=ROOT, timeout=seconds, capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        return {"exit": "out of time"}
    lines = done.stdout.strip().splitlines()
    try:
        return {"exit": done.returncode, **json.loads(lines[-1])}
    except (IndexError, ValueError):
        return {"exit": done.returncode, "says": (done.stdout + done.stderr).splitlines()[-12:]}


def _tell(result: dict[str, Any]) -> None:
    tests = result["tests"]
    print(f"\ntests: {tests['passed']} passed, {len(tests['failed'])} failed")
    for name, why in tests["failed"].items():
        print(f"  FAILED {name}: {why}")
    for why, count in sorted(tests["skipped"].items(), key=lambda item: -item[1]):
        print(f"  skipped {count}: {why}")
    for tool, found in result["sanitizer"].items():
        print(f"{tool}: {'clean' if found['clean'] else json.dumps(found, indent=2)}")
    print(f"vectors: {json.dumps(result['vectors'])}")
    for line in result["left_out"]:
        print(f"left out: {line}")


def run(sanitizer: str | None, seconds: float) -> int:
    """Everything within about `seconds`; 0 if every part is clean."""
    from benchmarks import machine

    OUT.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    left_out = [f"{what}: {name} is not installed" for name, what in OPTIONAL.items()
                if find_spec(name) is None]  # fmt: skip
    tools = [Sanitizer(sanitizer, tool) for tool in TOOLS] if sanitizer else []
    if not tools:
        left_out.append("compute-sanitizer: it is neither on PATH nor in the CUDA toolkit")
    vectors = record_vectors(min(150.0, seconds / 3))
    tests = run_pytest(end - time.monotonic() - 75)
    result = {
        "machine": machine.describe(threads=0, clock="none"),
        "seconds": 0.0,
        "tests": tests,
        "sanitizer": {t.tool: t.result(end - time.monotonic()) for t in tools},
        "vectors": vectors,
        "left_out": left_out,
    }
    result["seconds"] = round(seconds - (end - time.monotonic()))
    _tell(result)
    path = machine.results_folder() / "tests.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path.relative_to(ROOT)}")
    clean = all(found["clean"] for found in result["sanitizer"].values())
    return int(tests["exit"] != 0 or bool(tests["failed"]) or not clean or vectors["exit"] != 0)
