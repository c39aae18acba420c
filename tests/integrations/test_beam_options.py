"""beam_search's own options: widths of a prompt's search, diverse groups, stochastic beams."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
)

from flashkern.integrations import _beam_search
from flashkern.integrations._beam_search import beam_search
from flashkern.integrations._beam_sets import Search
from flashkern.integrations._penalties import Penalties
from tests.integrations.test_beam_search import model, prompt
from tests.integrations.tiny import VOCAB


class Nothing(LogitsProcessor):
    """A processor that beam_search does not know: selection works on all log-probabilities."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores


def search(name: str, ids: torch.Tensor, **kwargs: Any) -> Any:
    settings: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
        **kwargs,
    }
    return model(name).generate(ids, custom_generate=beam_search, **settings)


# ---- each prompt's own number of beams ----


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("early", [False, True, "never"])
@pytest.mark.parametrize("penalty", [-0.5, 1.0, 2.0])
@pytest.mark.parametrize("processors", [[], [Nothing()]])
def test_each_prompt_as_if_alone(
    name: str, early: bool | str, penalty: float, processors: list[Any]
) -> None:
    ids, widths = prompt(name), [4, 2, 5]
    kwargs = {"eos_token_id": [5, 11, 17, 23], "early_stopping": early, "num_return_sequences": 2}
    kwargs |= {"length_penalty": penalty, "max_new_tokens": 9}
    kwargs["logits_processor"] = LogitsProcessorList(processors)
    together = search(name, ids, num_beams=5, num_beams_per_prompt=widths[: len(ids)], **kwargs)
    for i, width in enumerate(widths[: len(ids)]):
        alone = search(name, ids[i : i + 1], num_beams=width, **kwargs)
        rows = together.sequences[2 * i : 2 * i + 2]
        width = alone.sequences.shape[1]
        assert torch.equal(rows[:, :width], alone.sequences)
        assert (rows[:, width:] == 5).all()  # filled up as transformers does where padding is 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_beams_per_prompt": [2, 5, 3]}, "between 1 and num_beams = 4"),
        ({"num_beams_per_prompt": [2, 3]}, r"have shape \(3,\), got \(2,\)"),
        ({"num_beams_per_prompt": [2, 2, 2], "num_beam_groups": 2}, "num_beam_groups must be 1"),
        ({"stochastic": True, "do_sample": True}, "do_sample must be False with stochastic"),
        ({"stochastic": True, "num_beam_groups": 2}, "num_beam_groups must be 1 with stochastic"),
        ({"force_words_ids": [[5]]}, "force_words_ids must be None"),
        ({"num_beam_groups": 3}, "must be a multiple of num_beam_groups = 3, got 4"),
        ({"num_beam_groups": 2, "diversity_penalty": -1.0}, "must not be negative, got -1.0"),
    ],
)
def test_options_that_do_not_fit(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search("llama", prompt("llama"), num_beams=4, **given)


# ---- diverse groups ----


@torch.no_grad()
def diverse(ids: torch.Tensor, groups: int, own: int, penalty: float, steps: int) -> torch.Tensor:
    """The definition, for one prompt and no end: (groups * own, length), best first."""
    beams = [[(ids, 0.0)] for _ in range(groups)]
    for _ in range(steps):
        taken = torch.zeros(VOCAB)
        for g in range(groups):
            found = []
            for sequence, total in beams[g]:
                log_probs = model("llama")(sequence[None]).logits[0, -1].log_softmax(-1)
                best = (log_probs - penalty * taken + total).topk(own)
                for value, token in zip(*best, strict=True):
                    found.append((torch.cat([sequence, token.view(1)]), float(value)))
            beams[g] = sorted(found, key=lambda pair: -pair[1])[:own]
            for sequence, _ in beams[g]:
                taken[sequence[-1]] += 1
    every = sorted(sum(beams, []), key=lambda pair: -pair[1])
    return torch.stack([sequence for sequence, _ in every])


@pytest.mark.parametrize("processors", [[], [Nothing()]])
@pytest.mark.parametrize(("groups", "own"), [(3, 1), (2, 3)])
def test_groups_are_the_definition(groups: int, own: int, processors: list[Any]) -> None:
    ids, beams = prompt("llama"), groups * own
    kwargs = {"num_beams": beams, "num_beam_groups": groups, "num_return_sequences": beams}
    kwargs |= {"diversity_penalty": 0.7, "max_new_tokens": 4}
    kwargs["logits_processor"] = LogitsProcessorList(processors)
    found = search("llama", ids, **kwargs).sequences.unflatten(0, (-1, beams))
    for i in range(len(ids)):
        assert torch.equal(found[i], diverse(ids[i], groups, own, 0.7, 4))


def test_groups_without_a_penalty_search_alike() -> None:
    ids = prompt("t5")
    ends = {"eos_token_id": [5, 11]}
    plain = search("t5", ids, num_beams=3, num_return_sequences=3, **ends).sequences
    groups = {"num_beams": 6, "num_beam_groups": 2, "num_return_sequences": 6}
    found = search("t5", ids, **groups, **ends).sequences
    assert torch.equal(found[::2], plain) and torch.equal(found[1::2], plain)


def test_penalties_of_groups_on_both_paths() -> None:
    """A repeated token that another group took pays twice, whichever path selects."""
    kwargs = {"num_beams": 4, "num_beam_groups": 2, "num_return_sequences": 4}
    kwargs |= {"diversity_penalty": 0.9, "repetition_penalty": 1.4, "eos_token_id": 5}
    kwargs |= {"no_repeat_ngram_size": 2, "max_new_tokens": 10}
    ids = prompt("gpt2")
    fused = search("gpt2", ids, **kwargs)
    dense = search("gpt2", ids, logits_processor=LogitsProcessorList([Nothing()]), **kwargs)
    assert torch.equal(fused.sequences, dense.sequences)
    assert torch.equal(fused.beam_indices, dense.beam_indices)


class Config:
    max_length, do_sample, early_stopping = 4, False, False
    length_penalty = 1.0
    _eos_token_tensor = _pad_token_tensor = None


def test_what_earlier_groups_took_costs_every_beam() -> None:
    """Beside a repetition penalty, which only what a sequence holds pays."""
    ids = torch.tensor([[3, 4, 4], [3, 4, 9], [7, 7, 8], [1, 0, 2]])
    beams = Search(ids, Config, 2, torch.tensor([[0], [2]]))
    beams.running = beams.running._replace(scores=torch.randn(2, 2))
    logits = torch.randn(2, 2, 12)
    chosen = torch.tensor([[5, 4, 4], [8, 0, 6]])
    penalties = Penalties([RepetitionPenaltyLogitsProcessor(1.5)], diversity=0.8)
    fused = beams.select(logits, penalties, chosen)
    log_probs = penalties.diverse(logits.log_softmax(-1), chosen).flatten(0, 1)
    log_probs = penalties.processors[0](ids, log_probs)
    dense = beams.select_processed(log_probs.unflatten(0, (2, 2)))
    assert torch.equal(fused.tokens, dense.tokens)
    assert torch.equal(fused.parents, dense.parents)
    torch.testing.assert_close(fused.scores, dense.scores, atol=1e-5, rtol=0)


def test_what_a_group_takes_goes_on() -> None:
    """The best candidates that do not end here; where all do, the best."""
    beams = Search(torch.zeros(4, 3, dtype=torch.long), Config, 2, torch.tensor([[0], [2]]))
    best = beams.select_processed(torch.randn(2, 2, 9).log_softmax(-1))
    tokens = best.tokens[..., 3]
    hits = torch.tensor([[True, False, True, False], [True] * 4]).flatten()
    assert torch.equal(beams.taken(best, hits)[0], tokens[0, [1, 3]])
    assert torch.equal(beams.taken(best, hits)[1], tokens[1, :2])


# ---- stochastic beams ----


def test_stochastic_beams_are_drawn_without_replacement() -> None:
    """Two steps over six sequences: how often each is first, and second behind which first."""
    torch.manual_seed(3)
    batch = 20000
    rows = torch.arange(batch).unsqueeze(1) * 2
    beams = Search(torch.zeros(2 * batch, 1, dtype=torch.long), Config, 2, rows, stochastic=True)
    chances = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.6, 0.3], [0.2, 0.2, 0.6]])
    for _ in range(2):
        log_probs = chances.log()[beams.sequences()[:, -1]].unflatten(0, (batch, 2))
        best = beams.select_processed(log_probs)
        beams.advance(best, torch.zeros(best.scores.numel(), dtype=torch.bool))
    tokens = beams.running.tokens[..., 1:3]
    drawn = tokens[..., 0] * 3 + tokens[..., 1]
    exact = (chances[0, :, None] * chances).flatten()
    first = drawn[:, 0].bincount(minlength=9) / batch
    torch.testing.assert_close(first, exact, atol=0.015, rtol=0)
    pairs = (drawn[:, 0] * 9 + drawn[:, 1]).bincount(minlength=81).view(9, 9) / batch
    behind = exact[:, None] * exact / (1 - exact[:, None])
    torch.testing.assert_close(pairs, behind.fill_diagonal_(0), atol=0.012, rtol=0)
    torch.testing.assert_close(beams.running.log_probs, exact.log()[drawn])
    assert (beams.running.scores.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_stochastic_search_of_a_model(name: str) -> None:
    ids = prompt(name)
    kwargs = {"num_beams": 4, "num_return_sequences": 4, "stochastic": True, "eos_token_id": 5}
    model(name)  # drawn now, if not yet
    torch.manual_seed(1)
    found = search(name, ids, output_scores=True, **kwargs)
    rows = found.sequences.unflatten(0, (-1, 4))
    assert all(len({tuple(r.tolist()) for r in group}) == 4 for group in rows)
    assert (found.sequences_scores.view(-1, 4).diff(dim=1) <= 0).all()
    torch.manual_seed(1)
    assert torch.equal(search(name, ids, **kwargs).sequences, found.sequences)
    torch.manual_seed(2)
    assert not torch.equal(search(name, ids, **kwargs).sequences, found.sequences)


# ---- a step that does not wait ----


class Waits(TorchDispatchMode):
    """Counts the operators for which a host waits for its GPU."""

    NAMES = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op._schema.name.removeprefix("aten::") in self.NAMES:
            self.seen.append(op._schema.name)
        return op(*args, **(kwargs or {}))


def test_no_step_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where a bool arrives one step late: the same tokens, and nobody asks."""
    monkeypatch.setattr(_beam_search, "_LATE_DEVICES", ("cpu",))
    monkeypatch.setattr(_beam_search._Told, "read", lambda told: told.value.numpy().item())
    comparison = _beam_search._reorder_cache.__code__.co_names
    assert "equal" in comparison  # on a CPU alone: see there; not counted here
    monkeypatch.setattr(torch, "equal", lambda x, y: False)
    kwargs = {"num_beams": 3, "repetition_penalty": 1.2, "bad_words_ids": [[7, 8], [9]]}
    seen = []
    for tokens in (10, 20):
        with Waits() as waits:
            search("llama", prompt("llama"), max_new_tokens=tokens, eos_token_id=5, **kwargs,
                   return_dict_in_generate=False)  # fmt: skip
        seen.append(len(waits.seen))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("early", [False, True, "never"])
@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_a_late_end_changes_nothing(
    name: str, early: bool | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kwargs = {"eos_token_id": [5, 11, 17, 23], "num_beams": 3, "early_stopping": early}
    kwargs |= {"return_dict_in_generate": False, "max_new_tokens": 30}
    steps = []
    advance = Search.advance
    monkeypatch.setattr(Search, "advance", lambda *a: (steps.append(1), advance(*a))[1])
    ids = prompt(name)
    expected = search(name, ids, **kwargs)
    usual = len(steps)
    monkeypatch.setattr(_beam_search, "_LATE_DEVICES", ("cpu",))
    assert torch.equal(search(name, ids, **kwargs), expected)
    assert len(steps) - usual in (usual, usual + 1)
