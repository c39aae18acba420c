"""attn_implementation="fkern" against each model's own attention, on tiny random models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

import flashkern.integrations.transformers as fkt
from tests.integrations.tiny import MODELS, Tiny, inputs

DECODERS = [name for name, tiny in MODELS.items() if tiny.kind == "decoder"]


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    fkt.enable()
    yield
    fkt.disable()


def pair(name: str) -> tuple[Any, Any]:
    """The same random model twice: as its authors run it, and on flashkern."""
    tiny: Tiny = MODELS[name]
    theirs = tiny.build(tiny.oracle).eval()
    ours = tiny.build(tiny.oracle if tiny.patched else fkt.NAME).eval()
    if tiny.patched:
        assert fkt.patch(ours) == 2
    return theirs, ours


def output(model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    result = model(**given)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


@pytest.mark.parametrize("padding", ["none", "left", "right", "holes"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_equal_the_models_own(name: str, padding: str) -> None:
    kind = MODELS[name].kind
    if padding != "none" and kind in ("vision", "speech"):
        given, real = inputs(kind)
    else:
        given, real = inputs(kind, padding)
    theirs, ours = pair(name)
    with torch.no_grad():
        expected, got = output(theirs, given), output(ours, given)
    real = real.bool().unsqueeze(-1)
    error = ((got - expected) * real).abs().max().item()
    assert error <= 2e-5 * max(1.0, expected.abs().max().item())
