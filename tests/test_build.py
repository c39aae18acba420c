"""The operator library keeps to torch's stable ABI, holds no Python, and knows what it is."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flashkern
from flashkern import __main__, _host, _ops


def undefined_symbols() -> list[str]:
    command = ["nm", "-D", "--undefined-only", str(_ops.LIBRARY)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def test_no_symbol_outside_the_stable_abi() -> None:
    symbols = undefined_symbols()
    unstable = [s for s in symbols if re.search(r"(3c10|2at|5torch)\d", s) and s.startswith("_Z")]
    assert "aoti_torch_get_data_ptr" in " ".join(symbols) or "torch_" in " ".join(symbols)
    assert unstable == []


def test_no_python_in_the_operator_library() -> None:
    assert [s for s in undefined_symbols() if s.startswith(("Py", "_Py"))] == []


def test_versions_agree() -> None:
    assert flashkern.__version__ == _host.version
    assert re.fullmatch(r"\d+\.\d+\.\d+", flashkern.__version__)


def test_isas_are_those_of_the_build() -> None:
    assert flashkern.cpu_isa() in _host.isas.split()
    assert "portable" in _host.isas.split()


def test_isa_can_be_forced_and_put_back() -> None:
    best = flashkern.cpu_isa()
    assert flashkern.cpu_isa("portable") == "portable"
    assert flashkern.cpu_isa() == "portable"
    assert flashkern.cpu_isa("best") == best


def test_unknown_isa_is_refused() -> None:
    with pytest.raises(ValueError, match="cpu_isa: name must be an ISA .* got 'sse9'"):
        flashkern.cpu_isa("sse9")


def with_isa(name: str, code: str) -> subprocess.CompletedProcess[str]:
    root = Path(flashkern.__file__).parent.parent
    env = {"FLASHKERN_CPU_ISA": name, "PYTHONPATH": str(root), "PATH": "/usr/bin:/bin"}
    python = [sys.executable, "-c", code]
    return subprocess.run(python, capture_output=True, text=True, env=env, cwd=root)


def test_isa_from_the_environment() -> None:
    done = with_isa("portable", "import flashkern; print(flashkern.cpu_isa())")
    assert done.stdout.strip() == "portable"


@pytest.mark.parametrize("code", ["import flashkern", "import flashkern.__main__"])
def test_a_wrong_isa_in_the_environment_is_an_error(code: str) -> None:
    done = with_isa("avx9", code)
    assert done.returncode == 1
    assert "ImportError: flashkern: FLASHKERN_CPU_ISA must be portable, avx2" in done.stderr
    assert done.stderr.rstrip().endswith("got 'avx9'")


def test_info_names_a_build_without_cuda(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_host, "cuda", "no: the torch at build time had no CUDA")
    monkeypatch.setattr(_ops, "has_kernel", lambda name, device: device == "cpu")
    for cuda in (None, "13.0"):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        __main__.main(["info"])
        text = capsys.readouterr().out
        reason = "the torch at build time had no CUDA"
        assert f"built without CUDA kernels ({reason}); rebuild with FLASHKERN_CUDA=1" in text
        assert ("hint       this torch has CUDA" in text) == (cuda is not None)


def test_info_says_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["info"]) == 0
    text = capsys.readouterr().out
    for fact in (flashkern.__version__, torch.__version__, flashkern.cpu_isa(), "CUDA"):
        assert fact in text
