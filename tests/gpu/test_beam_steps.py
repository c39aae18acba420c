"""Beam search on the back end's own device: transformers' tokens, and no step that waits for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from flashkern.integrations import _beam_search
from flashkern.integrations import transformers as fkt
from tests.gpu.test_integrations import IDS, llama

pytestmark = pytest.mark.kernels("attention_forward", "attention_beams", "beam_topk")


def unwaiting(call: Any) -> Any:
    """The call, in which CUDA refuses to wait."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return call(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode(before)

    return wrapped


@pytest.mark.parametrize("penalties", [{}, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}])
def test_beams_on_this_device(
    backend: str, penalties: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fkt.enable()
    ids = torch.tensor(IDS)
    kwargs: dict[str, Any] = {"num_beams": 4, "max_new_tokens": 12, "do_sample": False, **penalties}
    expected = llama(attn_implementation="eager").generate(ids, **kwargs)
    if backend == "cuda":
        for name in ("__call__", "_processed"):
            step = getattr(_beam_search._Step, name)
            monkeypatch.setattr(_beam_search._Step, name, unwaiting(step))
        monkeypatch.setattr(_beam_search, "_reorder_cache", unwaiting(_beam_search._reorder_cache))
    found = llama(attn_implementation="fkern").generate(
        ids, custom_generate=fkt.beam_search, **kwargs
    )
    assert torch.equal(found, expected)
