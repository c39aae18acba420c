"""enable, disable, patch, unpatch, and what is refused instead of being computed wrongly."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers as hf
from transformers import masking_utils, modeling_utils

import flashkern.integrations.transformers as fkt
from flashkern.integrations import _masks
from tests.integrations.tiny import BERT, MODELS, inputs

PATCHED = [name for name, tiny in MODELS.items() if tiny.patched]


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    fkt.enable()
    yield
    fkt.disable()


def test_enable_and_disable_say_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "flashkern"):
        assert fkt.enable() == "fkern"
        assert "fkern" in modeling_utils.ALL_ATTENTION_FUNCTIONS.valid_keys()
        fkt.disable()
    assert len(caplog.records) == 2
    for interface in (modeling_utils.AttentionInterface, masking_utils.AttentionMaskInterface):
        assert "fkern" not in interface._global_mapping
    with pytest.raises(ValueError, match="fkern"):
        MODELS["llama"].build("eager").set_attn_implementation("fkern")


@pytest.mark.parametrize("name", PATCHED)
def test_patch_and_unpatch(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = MODELS[name].build(MODELS[name].oracle).eval()
    given, _ = inputs("decoder", "right")
    keys = list(model.state_dict())
    with torch.no_grad(), caplog.at_level(logging.INFO, "flashkern"):
        before = model(**given).logits
        assert fkt.patch(model) == 2
        assert fkt.patch(model) == 0
        copied = copy.deepcopy(model)(**given).logits
        assert torch.equal(copied, model(**given).logits)
        assert list(model.state_dict()) == keys
        assert fkt.unpatch(model) == 2
        assert fkt.unpatch(model) == 0
        assert model.config._attn_implementation == MODELS[name].oracle
        assert torch.equal(model(**given).logits, before)
    assert "2 attention modules" in caplog.text


def test_patch_refuses_other_models() -> None:
    with pytest.raises(NotImplementedError, match="patch: model must be one of bloom"):
        fkt.patch(MODELS["llama"].build("eager"))


@pytest.mark.parametrize("name", ["bloom", "mpt"])
def test_models_that_would_misread_the_mask_are_refused(name: str) -> None:
    model = MODELS[name].build("fkern")
    with pytest.raises(NotImplementedError, match=re.escape("transformers.patch(model)")):
        model(**inputs("decoder")[0])


def test_unknown_models_of_their_own_kind_are_refused() -> None:
    model = hf.MegatronBertModel(hf.MegatronBertConfig(**BERT, attn_implementation="eager"))
    model.config._attn_implementation = "fkern"
    with pytest.raises(NotImplementedError, match="computes attention by itself") as caught:
        model(**inputs("encoder", "right")[0])
    assert "patch(model)" not in str(caught.value)  # which would refuse it


@pytest.mark.parametrize("argument", ["cache", "indices", "block_indices", "sinks"])
def test_arguments_that_no_kernel_computes_are_refused(argument: str) -> None:
    x = torch.randn(1, 2, 4, 8)
    with pytest.raises(NotImplementedError, match=argument):
        fkt.attention_forward(torch.nn.Identity(), x, x, x, None, **{argument: x})


def test_packed_lengths_without_a_mask_are_refused() -> None:
    x = torch.randn(1, 2, 4, 8)
    packed = torch.tensor([0, 2, 4])
    with pytest.raises(NotImplementedError, match="position_ids"):
        fkt.attention_forward(torch.nn.Identity(), x, x, x, None, cu_seq_lens_q=packed)


def _recipes() -> Iterator[tuple[str, dict]]:
    causal = masking_utils.causal_mask_function
    window = masking_utils.sliding_window_causal_mask_function(4)
    both = masking_utils.sliding_window_bidirectional_mask_function(3)
    everything = masking_utils.bidirectional_mask_function
    sizes = [(7, 7, 0, 0), (5, 12, 0, 0), (5, 12, 7, 0), (5, 12, 3, 0), (5, 8, 9, 6), (6, 4, 9, 11)]
    for q, k, q_offset, kv_offset in sizes:
        shape = {"q_length": q, "kv_length": k, "q_offset": q_offset, "kv_offset": kv_offset}
        for function in (causal, window, everything, both):
            for padding in ("none", "left", "right", "holes", "short"):
                yield padding, {**shape, "mask_function": function}


@pytest.mark.parametrize("device_offset", [False, True])
def test_a_mask_means_what_transformers_makes_of_the_same_recipe(device_offset: bool) -> None:
    made = 0
    for padding, recipe in _recipes():
        real = torch.ones(2, recipe["kv_length"] + recipe["kv_offset"], dtype=torch.bool)
        if padding == "left":
            real[1, : recipe["kv_offset"] + 2] = False
        if padding == "right":
            real[1, -2:] = False
        if padding == "holes":
            real[1, recipe["kv_offset"] + 1] = False
        if padding == "short":  # what lies beyond it is padding
            real = real[:, :-2]
        given = {**recipe, "batch_size": 2, "attention_mask": None if padding == "none" else real}
        expected = masking_utils.sdpa_mask(**given, allow_is_causal_skip=False)
        if device_offset:
            given["q_offset"] = torch.tensor(given["q_offset"])
        skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": True}
        for never_none in (False, True):
            mask = _masks.build_mask(**given, **skips, never_none=never_none)
            if mask is None:
                assert not never_none
                continue
            assert isinstance(mask, _masks.Mask) is not device_offset
            assert mask.shape == expected.shape and mask.dtype == torch.bool
            assert torch.equal(mask & True, expected), (padding, recipe)
            made += 1
    assert made > 100


def test_operations_on_a_mask_see_its_values() -> None:
    real = torch.ones(2, 6, dtype=torch.bool)
    real[1, 4:] = False
    mask = _masks.build_mask(2, 6, 6, attention_mask=real)
    assert isinstance(mask, _masks.Mask)
    dense = masking_utils.sdpa_mask(2, 6, 6, attention_mask=real)
    assert torch.equal(mask[:, :, -2:], dense[:, :, -2:])
    assert torch.equal(torch.cat([mask, mask], -1), torch.cat([dense, dense], -1))
    assert torch.equal(torch.where(mask, 1.0, 2.0), torch.where(dense, 1.0, 2.0))
    assert torch.equal(mask.float(), dense.float())
    assert mask.to(torch.bool) is mask


def test_patterns_of_users_become_dense_masks() -> None:
    def own(batch: int, head: int, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        return kv % 2 == 0

    both = masking_utils.or_masks(masking_utils.causal_mask_function, own)
    mask = _masks.build_mask(2, 6, 6, mask_function=both, allow_is_causal_skip=False)
    assert mask is not None and not isinstance(mask, _masks.Mask)
    assert bool(mask[0, 0, 0, 4]) and not bool(mask[0, 0, 0, 3])
