"""BeamCache: the same tokens as with transformers' own cache, and nothing copied."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers as hf

import flashkern.integrations.transformers as fkt
from flashkern.integrations._beam_cache import BeamTensor
from flashkern.integrations._prefill import _on_one_device
from tests.integrations.test_beam_search import model, theirs
from tests.integrations.tiny import MODELS, VOCAB

DECODERS = ["llama", "gpt2", "mistral", "gemma2", "gpt_oss", "deepseek_v3"]
SEQ2SEQ = ["t5", "bart"]
SETTINGS: dict[str, Any] = {
    "max_new_tokens": 9,
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": [5, 11],
    "return_dict_in_generate": True,
}


def fkern(name: str) -> Any:
    """The same weights as `model(name)`, with flashkern's attention."""
    return MODELS[name].build(fkt.enable()).eval().to(torch.empty(0).device)


def compare(name: str, ids: torch.Tensor, **kwargs: Any) -> None:
    settings = {**SETTINGS, **kwargs}
    torch.manual_seed(1)
    expected = model(name).generate(ids, custom_generate=theirs, **settings)
    own = fkern(name)
    torch.manual_seed(1)
    actual = own.generate(ids, custom_generate=fkt.beam_search, **settings)
    assert torch.equal(actual.sequences, expected.sequences)
    assert torch.equal(actual.beam_indices, expected.beam_indices)
    if settings.get("output_scores"):
        torch.testing.assert_close(
            actual.sequences_scores, expected.sequences_scores, atol=1e-4, rtol=1e-4
        )
        for mine, other in zip(actual.scores, expected.scores, strict=True):
            torch.testing.assert_close(mine, other, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("beams", [2, 5, 16])
@pytest.mark.parametrize("name", DECODERS + SEQ2SEQ)
def test_same_tokens(name: str, beams: int) -> None:
    compare(
        name,
        torch.randint(3, VOCAB, (3, 7)),
        num_beams=beams,
        num_return_sequences=2,
        output_scores=beams == 5,
    )


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_on_every_back_end(name: str, backend: str) -> None:
    compare(name, torch.randint(3, VOCAB, (2, 7)), num_beams=4)


@pytest.mark.parametrize("name", ["llama", "mistral", *SEQ2SEQ])
def test_padded_prompts(name: str) -> None:
    ids = torch.randint(3, VOCAB, (3, 9))
    mask = torch.ones_like(ids)
    side = slice(0, 4) if name in DECODERS else slice(5, 9)
    ids[0, side], mask[0, side] = 0, 0
    compare(name, ids, attention_mask=mask, num_beams=4)


def test_long_continuations(backend: str) -> None:
    """Beyond a window, and beyond what a prompt's window has kept."""
    for name in ("mistral", "gemma2"):
        compare(name, torch.randint(3, VOCAB, (1, 20)), num_beams=3, max_new_tokens=30)


def test_sampled_beams_draw_the_same() -> None:
    compare(
        "llama", torch.randint(3, VOCAB, (2, 5)), num_beams=4, do_sample=True, temperature=1.5,
        output_scores=True,
    )  # fmt: skip


def test_prompts_are_held_once(monkeypatch: pytest.MonkeyPatch) -> None:
    caches = []
    taken = fkt.BeamCache.of.__func__

    def noted(cls: Any, *args: Any) -> Any:
        caches.append(taken(cls, *args))
        return caches[-1]

    monkeypatch.setattr(fkt.BeamCache, "of", classmethod(noted))
    densified: list[Any] = []
    monkeypatch.setattr(BeamTensor, "dense", lambda self: densified.append(self))
    for name, halves in (("llama", 1), ("bart", 2)):
        caches.clear()
        fkern(name).generate(
            torch.randint(3, VOCAB, (2, 6)), custom_generate=fkt.beam_search, num_beams=4,
            max_new_tokens=5, eos_token_id=None,
        )  # fmt: skip
        assert len(caches) == halves and not densified
        for cache in caches:
            for layer in cache.layers:
                assert layer.shared_k.shape[0] == 2
        assert [layer.tokens for layer in caches[0].layers] == [4, 4]
        assert [layer.own_k.shape[2] for layer in caches[0].layers] == [5, 5]


def test_log_says_why_caches_are_copied(caplog: pytest.LogCaptureFixture) -> None:
    ids = torch.randint(3, VOCAB, (1, 4))
    with caplog.at_level(logging.DEBUG, "flashkern"):
        model("llama").generate(ids, custom_generate=fkt.beam_search, num_beams=2, max_new_tokens=2)
        fkern("llama").generate(ids, custom_generate=fkt.beam_search, num_beams=2, max_new_tokens=2)
    said = [record.message for record in caplog.records if "cache" in record.message]
    assert said == [
        "beam_search: a cache for each beam, as attention is 'eager'",
        "beam_search: beams share the prompt's cache",
    ]


@pytest.mark.parametrize(
    "name,implementation",
    [(name, way) for name in ("llama", "gpt2") for way in ("eager", "sdpa", "fkern")]
    + [("gemma2", "eager"), ("gemma2", "fkern")],
)
def test_under_transformers_own_search(name: str, implementation: str) -> None:
    fkt.enable()
    ids = torch.randint(3, VOCAB, (2, 6))
    own = MODELS[name].build(implementation).eval()
    settings = {**SETTINGS, "num_beams": 3, "max_new_tokens": 12}
    expected = own.generate(ids, **settings)
    actual = own.generate(ids, past_key_values=fkt.BeamCache(3, room=1), **settings)
    assert torch.equal(actual.sequences, expected.sequences)


def test_keys_of_a_cache_equal_those_of_transformers() -> None:
    theirs, ours = hf.DynamicCache(), fkt.BeamCache(3, room=2)
    for step in range(9):
        k, v = torch.randn(2, 6, 2, 1 + step % 3, 8).unbind()
        for layer in range(2):
            want = theirs.update(k, v, layer)
            got = ours.update(k, v, layer)
            assert all(map(torch.equal, (t + 0 for t in got), want))
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1, 0) == theirs.get_mask_sizes(1, 0)
        parents = torch.randint(3, (2, 3)) + torch.tensor([[0], [3]])
        theirs.reorder_cache(parents.flatten())
        ours.reorder_cache(parents.flatten())
    for layer in range(2):
        assert torch.equal(ours.layers[layer].keys + 0, theirs.layers[layer].keys)
        assert torch.equal(ours.layers[layer].values + 0, theirs.layers[layer].values)


def test_what_a_batch_must_be() -> None:
    with pytest.raises(ValueError, match="BeamCache: beams must be positive, got 0"):
        fkt.BeamCache(0)
    new = torch.randn(4, 2, 1, 8)
    with pytest.raises(ValueError, match="BeamCache: the batch must hold 3 beams of each prompt"):
        fkt.BeamCache(3).update(new, new, 0)
    with pytest.raises(ValueError, match="BeamCache: value_states must have the batch, heads"):
        fkt.BeamCache(2).update(new, new[:, :1], 0)


def test_a_cache_after_its_reset() -> None:
    cache, prompts = fkt.BeamCache(2), hf.DynamicCache()
    prompts.update(*torch.randn(2, 1, 2, 5, 8).unbind(), 0)
    for used in (cache, fkt.BeamCache.of(prompts, 2)):
        used.update(*torch.randn(2, 2, 2, 3, 8).unbind(), 0)
        used.reorder_cache(torch.tensor([1, 1]))
        used.reset()
        assert used.get_seq_length() == 0 and used.get_mask_sizes(1, 0) == (1, 0)
        for _ in range(2):
            k, v = torch.randn(2, 2, 2, 1, 8).unbind()
            used.update(k, v, 0)
        assert used.get_seq_length() == 2
        assert torch.equal(used.layers[0].keys[:, :, 1:], k)


def test_keys_of_any_strides() -> None:
    cache = fkt.BeamCache(2)
    k, v = torch.randn(2, 2, 3, 8, 2)[..., :1].mT.unbind()
    assert k.stride(-1) == 2
    for _ in range(2):
        keys, values = cache.update(k, v, 0)
    assert torch.equal(keys[:, :, 1:], k) and torch.equal(values[:, :, 1:], v)


def test_values_that_a_model_has_changed() -> None:
    cache, query = fkt.BeamCache(2), torch.randn(2, 4, 1, 8)
    for _ in range(2):
        keys, values = cache.update(*torch.randn(2, 2, 2, 1, 8).unbind(), 0)
    module = torch.nn.Module()
    plain, _ = fkt.attention_forward(module, query, keys, values, None)
    twice, _ = fkt.attention_forward(module, query, keys, values * 2, None)
    torch.testing.assert_close(twice, 2 * plain)


def test_lengths_and_tables_are_of_their_batch_and_device() -> None:
    table = fkt.BeamCache(2).table
    cpu = torch.device("cpu")
    for batch, tokens in ((2, 3), (4, 3), (4, 5)):
        assert table.lengths(batch, tokens, cpu).tolist() == [tokens] * batch
    table.write(4, 3, cpu)
    assert table.rows(3, torch.device("meta")).is_meta and table.rows(3, cpu).is_cpu


def test_room_is_not_taken_for_all_that_may_come() -> None:
    prompts = hf.DynamicCache()
    prompts.update(*torch.randn(2, 1, 2, 5, 8).unbind(), 0)
    cache = fkt.BeamCache.of(prompts, 2, room=100_000)
    cache.update(*torch.randn(2, 2, 2, 1, 8).unbind(), 0)
    assert cache.layers[0].own_k.shape[2] == 256


def test_keys_elsewhere_are_copied() -> None:
    prompts = hf.DynamicCache()
    prompts.update(*torch.randn(2, 1, 2, 5, 8).unbind(), 0)
    cpu = torch.device("cpu")
    assert _on_one_device(prompts, cpu) and not _on_one_device(prompts, torch.device("meta"))
    prompts.offloading = True
    assert not _on_one_device(prompts, cpu)
