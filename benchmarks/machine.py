"""What a result must say about where it was made: machine, clocks, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import flashkern
from benchmarks import nvml

_ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = (
    "torch", "triton", "transformers", "peft", "beamgrad", "cupy-cuda13x", "pytest-benchmark",
    "numpy",
)  # fmt: skip


def _cpu_facts() -> dict[str, Any]:
    facts: dict[str, Any] = {"model": platform.processor() or platform.machine(), "mhz": None}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return facts
    values = [line.split(":", 1) for line in lines if ":" in line]
    for key, value in values:
        if key.strip() == "model name":
            facts["model"] = value.strip()
    clocks = [float(value) for key, value in values if key.strip() == "cpu MHz"]
    if clocks:
        facts["mhz"] = round(max(clocks))
    return facts


def _caches() -> dict[str, str]:
    """Sizes of the first core's caches, as the kernel lists them: {"L1 Data": "32K", ...}."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = (
                (index / name).read_text().strip() for name in ("level", "type", "size")
            )
        except OSError:
            continue
        if kind != "Instruction":
            found[f"L{level}"] = size
    return found


def gpu() -> dict[str, Any] | None:
    """Name, driver, power limit and clocks of the first GPU; None where there is none."""
    found = nvml.Nvml.open()
    facts = found.describe() if found else {}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "processors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": round(properties.L2_cache_size / 2**20, 1),
            "cuda": torch.version.cuda,
        }
    return facts or None


def results_folder() -> Path:
    """benchmarks/results/<gpu>, made if it is not there: "nvidia-h100-80gb-hbm3"."""
    name = (gpu() or {}).get("name") or "no-gpu"
    folder = _ROOT / "benchmarks" / "results" / re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        run = subprocess.run(
            ["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def describe(threads: int, clock: str) -> dict[str, Any]:
    """The record that goes into every result file."""
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "cpu": _cpu_facts(),
        "caches": _caches(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "threads": threads,
        "clock": clock,
        "isa": flashkern.cpu_isa(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "gpu": gpu(),
        "python": platform.python_version(),
        "versions": {"flashkern": flashkern.__version__}
        | {package: _version(package) for package in _PACKAGES},
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "load": [round(x, 2) for x in os.getloadavg()],
    }
