"""``python -m flashkern info``: what this installation is and what it runs on."""

import argparse
import sys

import torch

from flashkern import _host, _ops
from flashkern._version import __version__


def info() -> str:
    """Version, build, CPU instruction set, threads and GPU state, a line each."""
    best = _ops.cpu_isa()
    kernels = _ops.has_kernel("attention_forward", "cuda")
    why = _host.cuda.removeprefix("no: ")
    cuda = why if kernels else f"built without CUDA kernels ({why}); rebuild with FLASHKERN_CUDA=1"
    if torch.cuda.is_available():
        cuda += f"; torch sees {torch.cuda.get_device_name()}"
    rows = {
        "flashkern": f"{__version__} (commit {_host.commit}, {_host.compiler})",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "CPU ISA": f"{best} (built for {_host.isas}; FLASHKERN_CPU_ISA forces one)",
        "CUDA": cuda,
        "library": str(_ops.LIBRARY),
    }
    if _ops.BACKEND:
        rows["back end"] = "emulated: the CUDA kernels' sources, on this CPU; for tests"
    lines = [f"{name:<10} {value}" for name, value in rows.items()]
    if best == "portable" and not _ops.BACKEND:
        missing = "CPU has no AVX2" if "avx2" in _host.isas.split() else "build has no AVX2 kernels"
        forced = best == _ops.FORCED_ISA
        reason = "FLASHKERN_CPU_ISA forces it" if forced else f"this {missing}"
        lines.append(f"hint       portable, since {reason}: the kernels are right, but not fast")
    if torch.version.cuda and not kernels and not _ops.BACKEND:
        lines.append("hint       this torch has CUDA, this build of flashkern runs on CPUs alone")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flashkern", description=__doc__)
    parser.add_argument("command", choices=["info"])
    parser.parse_args(arguments)
    print(info())
    return 0


if __name__ == "__main__":
    sys.exit(main())
