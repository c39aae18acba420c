"""generate(custom_generate=beam_search) against transformers' own beam search, on tiny models."""

from __future__ import annotations

import functools
import itertools
import logging
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerationMixin

from flashkern.integrations._beam_search import beam_search
from flashkern.integrations._beam_sets import Search
from flashkern.integrations._penalties import Penalties
from tests.integrations.tiny import MODELS, VOCAB

PROMPTS = {"llama": (3, 7), "gpt2": (2, 5), "t5": (2, 6), "bart": (3, 4)}


@functools.lru_cache
def built(name: str) -> Any:
    return MODELS[name].build("eager").eval()


def model(name: str) -> Any:
    """The model, on the device where new tensors land."""
    return built(name).to(torch.empty(0).device)


def prompt(name: str) -> torch.Tensor:
    return torch.randint(3, VOCAB, PROMPTS[name])


def theirs(
    self: Any,
    input_ids: Any,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    **kwargs: Any,
) -> Any:
    """transformers' beam search also for one beam, where generate would choose greedy search."""
    return GenerationMixin._beam_search(
        self, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs
    )


def compare(name: str, ids: torch.Tensor, **kwargs: Any) -> Any:
    """Runs both and holds everything equal that both return; gives ours."""
    settings: dict[str, Any] = {
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
        **kwargs,
    }
    torch.manual_seed(1)
    expected = model(name).generate(ids, custom_generate=theirs, **settings)
    torch.manual_seed(1)
    actual = model(name).generate(ids, custom_generate=beam_search, **settings)
    assert type(actual) is type(expected)
    assert torch.equal(actual.sequences, expected.sequences)
    assert torch.equal(actual.beam_indices, expected.beam_indices)
    assert actual.keys() == expected.keys()
    for field in ("sequences_scores", "scores", "logits", "attentions", "decoder_hidden_states"):
        if expected.get(field) is not None:
            torch.testing.assert_close(actual[field], expected[field], atol=1e-5, rtol=1e-5)
    return actual


GRID = list(itertools.product((1, 2, 5, 16), (0, 1, 3), (1.0, -0.5, 2.0), (False, True, "never")))


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("part", range(3))
def test_grid(name: str, part: int) -> None:
    """Beams, EOS ids, length penalties, early stopping: a third of the grid for each part, in turn
    fused and with scores kept; each model meets another half of it."""
    offset = list(PROMPTS).index(name) % 2
    for number, (beams, n_eos, penalty, early) in enumerate(GRID):
        if number % 3 != part or number // 3 % 2 != offset:
            continue
        compare(
            name,
            prompt(name),
            num_beams=beams,
            eos_token_id=[5, 11, 17][:n_eos] or None,
            length_penalty=penalty,
            early_stopping=early,
            num_return_sequences=(number % 3 + 1) if beams > 3 else beams,
            output_scores=number % 4 == 0,
        )


@pytest.mark.parametrize(
    "processors",
    [
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[7], [9, 10]]},
        {"min_new_tokens": 4},
        {"renormalize_logits": True, "repetition_penalty": 0.7},
        {"prefix_allowed_tokens_fn": lambda batch, ids: [5, 6, 7, 8, 9]},
        {"forced_eos_token_id": 5},
        {"suppress_tokens": [1, 2, 3]},
    ],
    ids=lambda p: next(iter(p)),
)
def test_processors(processors: dict[str, Any]) -> None:
    compare("llama", prompt("llama"), num_beams=4, eos_token_id=5, **processors)


SPARSE: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.7},
    "reward": {"repetition_penalty": 0.6},
    "ngrams": {"no_repeat_ngram_size": 2},
    "words": {"bad_words_ids": [[7], [9, 10], [37, 24, 44], [5]]},
    "single tokens": {"no_repeat_ngram_size": 1},
    "minimum": {"min_length": 10, "min_new_tokens": 5},
    "suppressed": {"suppress_tokens": [1, 2, 3, 40], "begin_suppress_tokens": [30, 31, 32, 33]},
    "forced": {"forced_bos_token_id": 4, "forced_eos_token_id": 5, "repetition_penalty": 1.3},
    "many": {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[12], [13, 14]],
        "min_new_tokens": 4,
        "suppress_tokens": [50, 51],
    },
}


@pytest.mark.parametrize("case", SPARSE)
@pytest.mark.parametrize("name", ["llama", "bart"])
@pytest.mark.parametrize("beams", [2, 7])
def test_penalties_on_the_fused_path(
    name: str, case: str, beams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense: list[int] = []
    processed = Search.select_processed

    def counted(self: Any, log_probs: torch.Tensor) -> Any:
        dense.append(self.length)
        return processed(self, log_probs)

    monkeypatch.setattr(Search, "select_processed", counted)
    options = {**SPARSE[case], "eos_token_id": [5, 11], "num_beams": beams, "max_new_tokens": 12}
    compare(name, prompt(name), **options)
    if case != "forced":
        assert not dense
    else:
        assert len(dense) <= 2


def test_bad_words_that_the_model_lacks() -> None:
    for search in (theirs, beam_search):
        with pytest.raises(ValueError, match="following tokens were being biased"):
            model("llama").generate(
                prompt("llama"), custom_generate=search, num_beams=2, bad_words_ids=[[7, VOCAB]]
            )


def test_penalties_of_new_tokens_alone() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    processors = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.5, prompt_ignore_length=7),
            RepetitionPenaltyLogitsProcessor(1.2),
        ]
    )
    assert Penalties.know(processors)
    compare("llama", prompt("llama"), num_beams=4, logits_processor=processors)


@pytest.mark.parametrize("beams", [1, 2, 6])
def test_sampled_beams_draw_the_same(beams: int) -> None:
    for temperature in (0.7, 1.8):
        compare(
            "gpt2",
            prompt("gpt2"),
            num_beams=beams,
            do_sample=True,
            temperature=temperature,
            top_k=20,
            eos_token_id=[5, 9],
            output_scores=True,
        )


def test_left_padded_prompts(backend: str) -> None:
    ids = prompt("llama")
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 0, 0
    compare("llama", ids, attention_mask=mask, num_beams=4, eos_token_id=5)


def test_no_cache() -> None:
    compare("llama", prompt("llama"), num_beams=3, eos_token_id=5, use_cache=False)


def test_static_cache() -> None:
    compare("llama", prompt("llama"), num_beams=3, eos_token_id=5, cache_implementation="static")


@pytest.mark.parametrize("name", ["gemma2", "mistral", "gpt_oss"])
def test_sliding_windows(name: str) -> None:
    compare(name, torch.randint(3, VOCAB, (2, 9)), num_beams=3, eos_token_id=5)


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_everything_kept(name: str, backend: str) -> None:
    kept = {f"output_{what}": True for what in ("scores", "logits", "attentions", "hidden_states")}
    compare(name, prompt(name), num_beams=3, eos_token_id=5, **kept)


def test_plain_sequences() -> None:
    ids = prompt("llama")
    kwargs: dict[str, Any] = {"num_beams": 4, "max_new_tokens": 6, "pad_token_id": 0}
    expected = model("llama").generate(ids, **kwargs)
    assert torch.equal(
        model("llama").generate(ids, custom_generate=beam_search, **kwargs), expected
    )


def test_custom_processor_and_criterion() -> None:
    class Favour(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            assert scores.logsumexp(-1).abs().max() < 1e-4  # log-probabilities
            return scores + (torch.arange(VOCAB) % 7 == 0)

    def stop(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids[:, -1] % 5 == 0

    compare(
        "llama",
        prompt("llama"),
        num_beams=4,
        logits_processor=LogitsProcessorList([Favour()]),
        stopping_criteria=StoppingCriteriaList([stop]),
    )


def test_selection_paths_agree() -> None:
    """What compare() cannot see without output_scores: the scores of the fused path."""

    class Config:
        max_length, do_sample, length_penalty = 20, False, 1.0
        _eos_token_tensor, _pad_token_tensor = torch.tensor([3, 4]), torch.tensor(0)

    rows = torch.tensor([[0], [4]])
    search = Search(torch.zeros(8, 3, dtype=torch.long), Config, 4, rows)
    search.running = search.running._replace(scores=torch.randn(2, 4))
    logits = torch.randn(2, 4, VOCAB) * 4
    fused = search.select(logits, Penalties([]), torch.zeros(2, 0, dtype=torch.long))
    processed = search.select_processed(logits.log_softmax(-1))
    assert torch.equal(fused.tokens, processed.tokens)
    assert torch.equal(fused.parents, processed.parents)
    torch.testing.assert_close(fused.scores, processed.scores, atol=1e-5, rtol=0)


def test_prompt_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first forward pass has one row for each prompt, the others one for each beam."""
    rows = []
    forward = type(model("llama")).forward

    def counted(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        rows.append(tuple(input_ids.shape))
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(type(model("llama")), "forward", counted)
    model("llama").generate(
        prompt("llama"),
        custom_generate=beam_search,
        num_beams=4,
        max_new_tokens=3,
        eos_token_id=None,
    )
    assert rows == [(3, 7), (12, 1), (12, 1)]


def test_log_names_the_path(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "flashkern"):
        compare("llama", prompt("llama"), num_beams=2)
        compare("llama", prompt("llama"), num_beams=2, repetition_penalty=1.2)
        compare("llama", prompt("llama"), num_beams=2, sequence_bias={(5,): 1.0})
    messages = [r.message for r in caplog.records if "selection" in r.message]
    fused, processed = (f"beam_search: {way} selection" for way in ("fused", "processed"))
    assert messages == [fused, fused, processed]


def test_low_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="beam_search: low_memory must be False"):
        model("llama").generate(
            prompt("llama"), custom_generate=beam_search, num_beams=2, low_memory=True
        )
