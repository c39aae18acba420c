"""`make gpu-test` and `make gpu-bench`: one command each for a machine with a GPU and no network.

Nothing is fetched and no environment is made. The library is built in place for the GPU that is
there, by what the machine has; what it lacks is named, and what was left out for it is written
down. Results go to benchmarks/results/<gpu>/.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from importlib.util import find_spec
from pathlib import Path

from tools import gpu_tests

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu"
CUDA = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
NAMES = {"torch": "PyTorch", "pybind11": "pybind11", "numpy": "NumPy", "pytest": "pytest"}


def find(program: str) -> str | None:
    """The program's path: on PATH, beside this Python, or in the CUDA toolkit."""
    folders = [*os.environ.get("PATH", "").split(os.pathsep), sysconfig.get_path("scripts")]
    folders += [f"{root}/{part}" for root in CUDA if root for part in ("bin", "compute-sanitizer")]
    return shutil.which(program, path=os.pathsep.join(folders))


def missing() -> list[str]:
    """What the build or the tests cannot do without."""
    absent = [what for name, what in NAMES.items() if find_spec(name) is None]
    for program in ("cmake", "nvcc", "g++"):
        if find(program) is None:
            absent.append(program)
    if find("ninja") is None and find("make") is None:
        absent.append("ninja or make")
    return absent


def refusal() -> str | None:
    """Why nothing can be done here, as one sentence; None where all is well."""
    absent = missing()
    if "PyTorch" not in absent:
        import torch

        if torch.version.cuda is None:
            return f"torch {torch.__version__} of {sys.executable} is built without CUDA"
        if not torch.cuda.is_available():
            return f"torch {torch.__version__} of {sys.executable} sees no GPU"
        major, minor = torch.cuda.get_device_capability()
        if major < 8:
            return f"{torch.cuda.get_device_name()} is sm_{major}{minor}; sm_80 is the least"
    if absent:
        return f"missing for {sys.executable}: {', '.join(absent)}"
    return None


def arch() -> str:
    """The compute capability to build for: "80"; "90a", whose own instructions may follow."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}{'a' * (major == 9)}"


def build() -> None:
    """The library in flashkern/: the CUDA kernels for this GPU, and the portable CPU kernels."""
    start = time.perf_counter()
    # The environment of `make` may use the same folder: it builds anew when it is next asked.
    (ROOT / ".venv" / "built.stamp").unlink(missing_ok=True)
    generator = ["-G", "Ninja"] if find("ninja") else ["-G", "Unix Makefiles"]
    log = ROOT / "build.log"
    configure = [find("cmake"), *generator, "-S", ROOT, "-B", BUILD, "-DFLASHKERN_CUDA=1",
                 "-DFLASHKERN_ISAS=portable", f"-DFLASHKERN_CUDA_ARCHS={arch()}",
                 f"-DCMAKE_CUDA_COMPILER={find('nvcc')}",
                 f"-DCMAKE_INSTALL_PREFIX={ROOT / 'flashkern'}",
                 f"-DPython_EXECUTABLE={sys.executable}"]  # fmt: skip
    jobs = str(len(os.sched_getaffinity(0)))
    steps = [configure, [find("cmake"), "--build", BUILD, "-j", jobs],
             [find("cmake"), "--install", BUILD]]  # fmt: skip
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    with log.open("w") as out:
        for step in steps:
            command = [str(word) for word in step]
            done = subprocess.run(
                command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, "PATH": path}
            )
            if done.returncode:
                print("".join(log.read_text().splitlines(keepends=True)[-60:]), file=sys.stderr)
                sys.exit(f"make gpu: the build failed; all of it is in {log}")
    print(f"built for this GPU in {time.perf_counter() - start:.0f} s", flush=True)
    print(subprocess.check_output([sys.executable, "-m", "flashkern", "info"], cwd=ROOT, text=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("commands", nargs="+", choices=["test", "bench"])
    parser.add_argument("--seconds", type=int, default=560, help="for each, the build included")
    options = parser.parse_args()
    reason = refusal()
    if reason is not None:
        print(f"make gpu: {reason} (PYTHON=... chooses another Python).", file=sys.stderr)
        return 2
    status, end = 0, time.monotonic() + options.seconds
    build()
    for command in options.commands:
        left = end - time.monotonic()
        if command == "test":
            status |= gpu_tests.run(find("compute-sanitizer"), left)
        else:
            bench = [sys.executable, "-m", "benchmarks", "gpu", f"--seconds={left:.0f}"]
            status |= subprocess.run(bench, cwd=ROOT).returncode
        end = time.monotonic() + options.seconds
    return status


if __name__ == "__main__":
    sys.exit(main())
