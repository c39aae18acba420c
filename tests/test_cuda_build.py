"""What nvcc makes of the CUDA kernels: no spills, and registers that let every block start.

Compiling takes minutes, so it is asked for: FLASHKERN_TEST_NVCC=1, as CI does, or a list of compute
capabilities such as "80 90a".
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc").glob("*/sm80/*.cu"))
NVCC = shutil.which("nvcc", path=os.environ.get("PATH", "") + ":/usr/local/cuda/bin")
ASKED = os.environ.get("FLASHKERN_TEST_NVCC", "0")
ARCHS = ["80", "90a"] if ASKED in ("0", "1") else ASKED.split()
USAGE = re.compile(
    r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)


@pytest.mark.skipif(ASKED == "0" or NVCC is None, reason="FLASHKERN_TEST_NVCC asks for it")
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_no_spills(source: Path, arch: str, tmp_path: Path) -> None:
    options = ["-std=c++20", f"-arch=sm_{arch}", "-I", ROOT / "csrc", "--expt-relaxed-constexpr"]
    command = [NVCC, *options, "-cubin", "-Xptxas=-v", "-o", tmp_path / "kernels.cubin", source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, *numbers in USAGE.findall(done.stderr):
        stack, stores, loads, registers = map(int, numbers)
        print(f"sm_{arch} {registers} registers {name}")
        assert (stack, stores, loads) == (0, 0, 0), name
        assert registers <= 255, name
