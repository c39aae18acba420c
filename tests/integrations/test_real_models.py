"""Real weights on real text: the same answers with flashkern as without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed")

import flashkern.integrations.torch_sdpa as fks
import flashkern.integrations.transformers as fkt
from benchmarks.models import loaders
from tests.models import real_model

SENTENCES = [
    "A cat sits on the mat.",
    "A kitten is resting on a rug by the fire, and it does not want to be moved.",
    "Stocks fell sharply today.",
]


@contextmanager
def on_flashkern(model: Any) -> Iterator[None]:
    """Runs the model on flashkern for a while."""
    before = model.config._attn_implementation
    model.set_attn_implementation(fkt.enable())
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        fkt.disable()


@contextmanager
def behind_sdpa(model: Any) -> Iterator[None]:
    """Leaves the model on scaled_dot_product_attention, with flashkern behind that."""
    fks.enable()
    try:
        yield
    finally:
        fks.disable()


WAYS = [on_flashkern, behind_sdpa]


@pytest.mark.parametrize("way", WAYS)
def test_smollm2_perplexity_is_equal_to_four_digits(way: Callable[[Any], Any]) -> None:
    model, tokenizer = real_model("smollm2")
    ids = tokenizer(loaders.bible_text(2000), return_tensors="pt").input_ids[:, :256]

    def perplexity() -> float:
        with torch.no_grad():
            return model(ids, labels=ids).loss.exp().item()

    expected = perplexity()
    with way(model):
        got = perplexity()
    assert f"{got:.4g}" == f"{expected:.4g}"
    assert 2 < got < 20  # it knows this text


def test_smollm2_answers_from_a_static_cache_and_a_padded_batch() -> None:
    model, tokenizer = real_model("smollm2")
    tokenizer.padding_side = "left"
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        for question in ("What is the capital of France?", "Name a colour.")
    ]
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    options = {"max_new_tokens": 7, "do_sample": False, "cache_implementation": "static"}
    with on_flashkern(model):
        ids = model.generate(**batch, **options)
    answer = tokenizer.decode(ids[0, batch.input_ids.shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."


@pytest.mark.parametrize("way", WAYS)
def test_minilm_embeddings_of_a_padded_batch(way: Callable[[Any], Any]) -> None:
    model, tokenizer = real_model("minilm")

    def embed(sentences: list[str]) -> Tensor:
        batch = tokenizer(sentences, padding=True, return_tensors="pt")
        with torch.no_grad():
            return loaders.mean_pool(model(**batch).last_hidden_state, batch["attention_mask"])

    expected = embed(SENTENCES)
    with way(model):
        got = embed(SENTENCES)
        alone = torch.cat([embed([sentence]) for sentence in SENTENCES])
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(alone, got, rtol=0, atol=2e-6)
    cat_kitten, cat_stocks = (got[0] @ got[1:].T).tolist()
    assert cat_kitten > 0.5 > 0.2 > cat_stocks


def test_whisper_states_and_tokens() -> None:
    model, _, extractor = real_model("whisper")
    samples, _ = loaders.speech()
    features = extractor(
        samples, sampling_rate=loaders.SAMPLE_RATE, return_tensors="pt"
    ).input_features

    def forward() -> Tensor:
        ids = torch.tensor([[50257, 50362, 383, 2068]])
        with torch.no_grad():
            return model(features, decoder_input_ids=ids).logits

    expected = forward()
    with on_flashkern(model):
        got = forward()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
