"""Drives CMake: configure, build with ninja, install. What is built stands in CMakeLists.txt."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def jobs() -> int:
    """MAX_JOBS, or as many jobs as there are cores and 1.5 GiB of free memory for each."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return max(1, min(len(os.sched_getaffinity(0)), int(free / 1.5)))


class CMakeBuild(build_ext):
    """Builds into the wheel's tree, or beside the sources for an editable install."""

    def run(self) -> None:
        target = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "flashkern"
        build = Path(self.build_temp).resolve() / "cmake"
        if self.inplace:  # a temporary folder for pip: in a fixed one a rebuild is incremental
            build = ROOT / "build" / f"editable-{sys.implementation.cache_tag}"
        options = ["-UFLASHKERN_*"]  # those of the build before, as is its ninja
        options += [f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja') or 'ninja'}"]
        options += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_INSTALL_PREFIX={target}"]
        for what in ("ISAS", "CUDA", "CUDA_ARCHS", "SANITIZE"):
            name = f"FLASHKERN_{what}"
            if os.environ.get(name):
                options.append(f"-D{name}={os.environ[name]}")
        print(f"flashkern: building the operators with {jobs()} jobs", file=sys.stderr)
        subprocess.check_call(["cmake", "-G", "Ninja", "-S", ROOT, "-B", build, *options])
        subprocess.check_call(["cmake", "--build", build, "-j", str(jobs())])
        subprocess.check_call(["cmake", "--install", build])


setup(ext_modules=[Extension("flashkern._host", sources=[])], cmdclass={"build_ext": CMakeBuild})
