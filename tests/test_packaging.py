"""What a user builds from: the source distribution configures, and a wrong option is named."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").exists()
    or shutil.which("cmake") is None
    or shutil.which("ninja") is None,
    reason="needs the sources, cmake and ninja",
)


def run(*command: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True)


def configure(sources: Path, build: Path, *options: str) -> subprocess.CompletedProcess[str]:
    python = f"-DPython_EXECUTABLE={sys.executable}"
    return run("cmake", "-G", "Ninja", "-S", sources, "-B", build, python, *options)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, made and unpacked."""
    place = tmp_path_factory.mktemp("sdist")
    made = run(sys.executable, "setup.py", "-q", "egg_info", "--egg-base", place, "sdist",
               "--dist-dir", place)  # fmt: skip
    assert made.returncode == 0, made.stderr
    (archive,) = place.glob("*.tar.gz")
    shutil.unpack_archive(archive, place)
    return place / archive.name.removesuffix(".tar.gz")


def test_the_source_distribution_configures(unpacked: Path, tmp_path: Path) -> None:
    done = configure(unpacked, tmp_path, "-DFLASHKERN_CUDA=0")
    assert done.returncode == 0, done.stderr


def test_the_source_distribution_holds_what_its_tests_import(unpacked: Path) -> None:
    """Every folder of modules in the repository that a test or the Makefile names."""
    for folder in ("benchmarks", "tools", "tests", "examples"):
        here = {p.relative_to(ROOT) for p in (ROOT / folder).rglob("*.py")}
        there = {p.relative_to(unpacked) for p in (unpacked / folder).rglob("*.py")}
        assert here == there


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("CUDA=bogus", "FLASHKERN_CUDA must be auto, 0 or 1, got bogus"),
        ("CUDA=2", "FLASHKERN_CUDA must be auto, 0 or 1, got 2"),
        ("CUDA_ARCHS=banana", "FLASHKERN_CUDA_ARCHS must .* got banana"),
        ("CUDA_ARCHS=80;70", "FLASHKERN_CUDA_ARCHS must .* got 70"),
        ("CUDA_ARCHS=sm_80", "FLASHKERN_CUDA_ARCHS must .* got sm_80"),
        ("CUDA_ARCHS=8.0", "FLASHKERN_CUDA_ARCHS must .* got 8.0"),
        ("CUDA_ARCHS=80,90", "FLASHKERN_CUDA_ARCHS must .* got 80,90"),
        ("CUDA_ARCHS=80 90", "FLASHKERN_CUDA_ARCHS must .* got 80 90"),
        ("ISAS=avx9", "FLASHKERN_ISAS must .* got avx9"),
        ("ISAS=portable avx2", "FLASHKERN_ISAS must .* got portable avx2"),
    ],
)
def test_a_wrong_option_is_named(options_build: Path, option: str, message: str) -> None:
    done = configure(ROOT, options_build, "-UFLASHKERN_*", f"-DFLASHKERN_{option}")
    assert done.returncode != 0
    assert re.search(message, " ".join(done.stderr.split()))


def test_an_editable_install_builds_in_one_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip gives each its own temporary folder, where every rebuild would be a full one."""
    log, stub = tmp_path / "log", tmp_path / "cmake"
    stub.write_text(f'#!/bin/sh\necho "$@" >> {log}\n')
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    build = ("build_ext", "--build-temp", tmp_path / "temporary")
    assert run(sys.executable, "setup.py", "-q", *build, "--inplace").returncode == 0
    place = ROOT / "build" / f"editable-{sys.implementation.cache_tag}"
    configured, built, installed = log.read_text().splitlines()
    assert f"-B {place} -UFLASHKERN_* " in configured  # what the last build was asked is forgotten
    assert built.startswith(f"--build {place} ") and installed == f"--install {place}"


@pytest.fixture(scope="module")
def options_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One build folder for all: the compiler is looked at once."""
    return tmp_path_factory.mktemp("options")
