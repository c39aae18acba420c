"""Every public docstring's example runs, and so does every script in examples/."""

import doctest
import importlib
import pkgutil
import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import flashkern

ROOT = Path(flashkern.__file__).parent.parent
OPTIONAL = ("transformers", "peft", "cupy")


@contextmanager
def optional_packages() -> Iterator[None]:
    """Skips the test where a package of an extra is not installed; any other failure stands."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        pytest.skip(str(error))


def modules() -> list[str]:
    compiled = ("flashkern.__main__", "flashkern._host", "flashkern.lib")
    found = pkgutil.walk_packages(flashkern.__path__, "flashkern.")
    return [module.name for module in found if not module.name.startswith(compiled)]


@pytest.mark.parametrize("name", modules())
def test_doctests(name: str) -> None:
    if name.endswith("_beam_search"):  # its example imports it, the module does not
        pytest.importorskip("transformers")
    with optional_packages():
        result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


@pytest.mark.parametrize("name", ["attention.md", "lora.md"])
def test_pages(name: str) -> None:
    assert doctest.testfile(str(ROOT / "docs" / name), module_relative=False).failed == 0


def test_public_functions_have_examples() -> None:
    for name in flashkern.__all__:
        value = getattr(flashkern, name)
        if callable(value):
            doc = value.__doc__ or ""
            assert ">>>" in doc, f"flashkern.{name} has no example"


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_examples(script: Path) -> None:
    with optional_packages():
        runpy.run_path(str(script), run_name="__main__")
