"""Compiles .cu files as C++ and calls them: one shared library for each file and variant."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BUILD = Path(os.environ.get("FLASHKERN_EMULATOR_BUILD", ROOT / "build" / "emulator"))
CXX = os.environ.get("CXX", "g++")
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")

Argument = np.ndarray | int | float | None


class EmulatorError(RuntimeError):
    """What the emulator threw."""


def run(command: Sequence[str | Path]) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


@functools.cache
def emulator(sanitize: bool) -> Path:
    """The emulator's build folder: libfk_emulator.a, and the flags of each variant."""
    folder = BUILD / ("asan" if sanitize else "plain")
    option = f"-DFLASHKERN_EMULATOR_SANITIZE={'ON' if sanitize else 'OFF'}"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    run(["cmake", *generator, "-S", ROOT / "csrc" / "emulator", "-B", folder, option])
    run(["cmake", "--build", folder])
    return folder


def compile_kernel(source: str, name: str, variant: str = "plain") -> Path:
    """A shared library of the kernels in `source`; the same text is compiled once."""
    folder = emulator(variant == "asan")
    archive = folder / "libfk_emulator.a"
    age = str(max(archive.stat().st_mtime, newest_header()))
    key = hashlib.sha1((source + variant + age).encode()).hexdigest()[:12]
    out = BUILD / "kernels" / f"{name}-{variant}-{key}"
    library = out / "kernels.so"
    if not library.exists():
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.cu").write_text(source)
        control = ["-x", "none", HERE / "control.cpp"] if variant != "race" else [control_object()]
        flags = [f"@{folder / variant}.flags", f"-I{HERE}", out / f"{name}.cu"]
        partial = out / f"{os.getpid()}.so"
        if variant == "race":  # the hooks are the emulator's: compile with them, link without
            run([CXX, *flags, "-c", "-o", out / "kernel.o"])
            run([CXX, "-shared", out / "kernel.o", *control, archive, "-o", partial])
        else:
            run([CXX, *flags, *control, archive, "-o", partial])
        partial.rename(library)
    return library


@functools.cache
def newest_header() -> float:
    folders = [*(ROOT / "csrc" / name for name in ("ptx", "emulator", "beam")), HERE]
    return max(p.stat().st_mtime for f in folders for p in f.rglob("*.h"))


@functools.cache
def control_object() -> Path:
    out = BUILD / "control.o"
    run([CXX, "-std=c++20", "-fPIC", f"-I{ROOT / 'csrc'}", "-c", HERE / "control.cpp", "-o", out])
    return out


class Kernels:
    """The entry points of one .cu file: kernels.fk_name(array, 3, ...)."""

    def __init__(self, source: str | Path, variant: str = "plain", name: str = "kernel") -> None:
        name = source.stem if isinstance(source, Path) else name
        text = source.read_text() if isinstance(source, Path) else source
        self.library = ctypes.CDLL(str(compile_kernel(text, name, variant)))

    def call(self, name: str, *arguments: Argument) -> None:
        function = self.library[name]
        function.restype = ctypes.c_char_p
        error = function(*(self.convert(a) for a in arguments))
        if error is not None:
            raise EmulatorError(error.decode())

    @staticmethod
    def convert(argument: Argument) -> object:
        if isinstance(argument, np.ndarray):
            assert argument.flags.c_contiguous
            return ctypes.c_void_p(argument.ctypes.data)
        if isinstance(argument, float):
            return ctypes.c_float(argument)
        return ctypes.c_void_p(None) if argument is None else ctypes.c_int(argument)

    def seed(self, seed: int) -> None:
        self.library.fk_seed(ctypes.c_uint64(seed))

    def capability(self, major: int, minor: int) -> None:
        self.library.fk_capability(major, minor)


def run_sanitized(code: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a process with AddressSanitizer, where the `asan` variant can load."""
    preload = [
        run([CXX, f"-print-file-name={n}"]).strip()
        for n in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    env = {
        **os.environ,
        "LD_PRELOAD": ":".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": str(HERE),
    }
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)


def bfloat16(x: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def encode(x: np.ndarray, dtype: str) -> np.ndarray:
    return bfloat16(x) if dtype == "bfloat16" else x.astype(np.float16).view(np.uint16)


def decode(bits: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return from_bfloat16(bits)
    return bits.view(np.float16).astype(np.float32)
