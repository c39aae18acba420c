"""Runs every case of golden.py on the GPU that is there, keeps the outputs, judges the emulator.

    python tests/emulator/record.py        # writes golden/sm_90.npz; the last line is JSON

The same .cu files, compiled by nvcc. tests/emulator/test_golden.py holds the emulator to the
vectors from then on.
"""

from __future__ import annotations

import json
import sys

import golden
import torch
from device import GpuKernels
from machine import HERE, EmulatorError, Kernels


def main() -> int:
    if not torch.cuda.is_available():
        print(f"record: torch {torch.__version__} sees no GPU", file=sys.stderr)
        return 2
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}{'a' * (major == 9)}"
    cases = golden.cases(hopper=major == 9)
    files = sorted({case.source for case in cases})
    gpu = {file: GpuKernels(HERE / file, arch) for file in files}
    results, keys, refused = {}, {}, {}
    for case in cases:
        try:
            results[case.name] = case.run(gpu[case.source])
            keys[case.name] = case.key()
        except EmulatorError as error:
            refused[case.name] = str(error)
            print(f"{case.name}: {error}", flush=True)
            if not _alive():
                break  # a fault ends the context: what was recorded so far is kept
    path = golden.FOLDER / f"sm_{major}{minor}.npz"
    golden.save(path, results, keys)
    emulator = {file: Kernels(HERE / file) for file in files}
    differ = {
        case.name: why
        for case in cases
        if case.name in results and (why := golden.compare(path, case, emulator[case.source]))
    }
    for name, why in differ.items():
        print(f"{name}: {why}")
    lost = [case.name for case in cases if case.name not in results]
    summary = {
        "gpu": torch.cuda.get_device_name(),
        "file": path.name,
        "recorded": len(results),
        "emulator_equal": len(results) - len(differ),
        "differ": differ,
        "refused": refused,
        "not_recorded": lost,
    }
    print(json.dumps(summary))
    return int(bool(differ or lost))


def _alive() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
