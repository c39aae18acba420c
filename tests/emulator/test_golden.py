"""The emulator against vectors that real GPUs recorded (record.py), bit for bit."""

from __future__ import annotations

import subprocess
from pathlib import Path

import golden
import numpy as np
import pytest
from device import ON_HOST, compile_for_gpu
from machine import HERE, NVCC, Kernels

FILES = sorted(golden.FOLDER.glob("sm_*.npz"))


@pytest.fixture(scope="module")
def kernels() -> dict[str, Kernels]:
    return {name: Kernels(HERE / name) for name in ("primitives.cu", "hopper.cu")}


@pytest.mark.skipif(not FILES, reason="owed: no GPU has recorded vectors yet (make gpu-test)")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_a_gpu_recorded(kernels: dict[str, Kernels], path: Path) -> None:
    cases = golden.cases(hopper=path.stem == "sm_90")
    wrong = {c.name: why for c in cases if (why := golden.compare(path, c, kernels[c.source]))}
    assert not wrong


def test_one_wrong_bit_is_found(kernels: dict[str, Kernels], tmp_path: Path) -> None:
    """Vectors as the emulator gives them are equal; with one bit turned, each case is caught."""
    cases = golden.cases(hopper=True)
    assert len({case.name for case in cases}) == len(cases)
    right, turned = {}, {}
    for case in cases:
        right[case.name] = case.run(kernels[case.source])
        turned[case.name] = [a.copy() for a in right[case.name]]
        last = turned[case.name][-1].view(np.uint8).reshape(-1)
        last[len(last) // 2] ^= 1
    keys = {case.name: case.key() for case in cases}
    for name, results in (("right.npz", right), ("turned.npz", turned)):
        golden.save(tmp_path / name, results, keys)
    for case in cases:
        own = kernels[case.source]
        assert golden.compare(tmp_path / "right.npz", case, own) is None, case.name
        told = golden.compare(tmp_path / "turned.npz", case, own)
        assert told is not None and told.startswith("1 of"), case.name


def test_vectors_of_other_inputs_are_told(kernels: dict[str, Kernels], tmp_path: Path) -> None:
    case = golden.cases(hopper=False)[0]
    golden.save(tmp_path / "old.npz", {case.name: [np.zeros(1)]}, {case.name: "0"})
    told = golden.compare(tmp_path / "old.npz", case, kernels[case.source])
    assert told is not None and "other inputs" in told


@pytest.mark.skipif(NVCC is None, reason="nvcc is not here")
@pytest.mark.parametrize(("source", "arch"), [("primitives.cu", "80"), ("primitives.cu", "90a"),
                                              ("hopper.cu", "90a")])  # fmt: skip
def test_the_recorder_compiles(source: str, arch: str) -> None:
    """What a GPU would run exists for it, with every entry point that the cases call."""
    library = compile_for_gpu(HERE / source, arch)
    symbols = subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=True)
    entries = {c.entry for c in golden.cases(hopper=True) if c.source == source}
    assert all(f" T {entry}\n" in symbols.stdout for entry in entries)
    assert all(name in symbols.stdout for name in ON_HOST if name in entries)
