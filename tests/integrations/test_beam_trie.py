"""beam_search within a trie: transformers' search under a prefix function that allows the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

import flashkern as fk
from flashkern.integrations._beam_search import beam_search
from tests.integrations.test_beam_search import model, prompt
from tests.integrations.tiny import VOCAB

EOS = 5


def _sequences(count: int, length: int) -> torch.Tensor:
    return torch.randint(6, VOCAB, (count, length))


def _legal(got: torch.Tensor, sequences: torch.Tensor) -> bool:
    return all(bool((sequences == row).all(1).any()) for row in got)


SAMPLED = {"do_sample": True, "top_k": 3}
EXTRAS: dict[str, dict[str, Any]] = {
    "fused": {},
    "rescored": {"repetition_penalty": 1.3},
    "banned": {"suppress_tokens": list(range(20, 40))},
    "dense": {"scores": True},
    "sampled": SAMPLED,
    "typical": {**SAMPLED, "top_k": 0, "typical_p": 0.6},
    "renormalised": {"renormalize_logits": True},
}


@pytest.mark.parametrize("name", ["llama", "bart"])
@pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS)
def test_same_as_a_prefix_function(name: str, extra: dict[str, Any], backend: str) -> None:
    sequences = torch.cat([_sequences(4000, 3), torch.full((4000, 1), EOS)], 1)
    trie = fk.Trie.from_sequences(sequences)
    ids = prompt(name)
    skip = 1 if name == "bart" else ids.shape[1]

    def allowed(batch: int, tokens: torch.Tensor) -> list[int]:
        node = torch.zeros((), dtype=torch.int64)
        for token in tokens[skip:].cpu():
            node = trie.advance(node, token)
        if node < 0 or trie.is_leaf(node):
            return [EOS]
        return trie.tokens[trie.starts[node] : trie.starts[node + 1]].tolist()

    options = {
        "num_beams": 4,
        "max_new_tokens": 4,
        "eos_token_id": EOS,
        "pad_token_id": 0,
        "do_sample": False,
        "num_return_sequences": 4,
        **extra,
    }
    if options.pop("scores", False):
        options.update(return_dict_in_generate=True, output_scores=True)
    torch.manual_seed(2)
    want: Any = model(name).generate(ids, prefix_allowed_tokens_fn=allowed, **options)
    torch.manual_seed(2)
    got: Any = model(name).generate(ids, custom_generate=beam_search, trie=trie, **options)
    if options.get("output_scores"):
        torch.testing.assert_close(got.sequences_scores, want.sequences_scores)
        want, got = want.sequences, got.sequences
    assert torch.equal(got, want)
    if "suppress_tokens" not in extra:  # then too few finish, and unfinished ones fill up
        assert _legal(got[:, skip : skip + 4].cpu(), sequences.cpu())


def test_fewer_sequences_than_beams(backend: str) -> None:
    """All of them come, best first; what fills up has a score of -1e9."""
    ids = prompt("llama")[:1]
    sequences = torch.tensor([[7, 8, EOS], [7, 9, EOS], [20, 30, EOS]])
    best: Any = model("llama").generate(
        ids,
        custom_generate=beam_search,
        trie=fk.Trie.from_sequences(sequences),
        num_beams=5,
        num_return_sequences=5,
        max_new_tokens=3,
        eos_token_id=EOS,
        pad_token_id=0,
        return_dict_in_generate=True,
        length_penalty=1.0,
    )
    found = best.sequences[:3, 7:].cpu()
    assert _legal(found, sequences.cpu()) and len(found.unique(dim=0)) == 3


@pytest.mark.parametrize("beams", [1, 8, 64])
def test_sequences_that_end_at_the_last_step(beams: int, backend: str) -> None:
    sequences = _sequences(900, 3)
    ids = prompt("llama")[:2]
    got = model("llama").generate(
        ids,
        custom_generate=beam_search,
        trie=fk.Trie.from_sequences(sequences),
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=3,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    assert got.shape == (2 * beams, 10)
    assert _legal(got[:, 7:].cpu(), sequences.cpu())
    for rows in got.view(2, beams, -1):
        assert len(rows.unique(dim=0)) == beams


def test_drawn_beams(backend: str) -> None:
    """Also where no beam of a prompt can go on: two sequences for four beams.

    Of what is drawn the first num_beams may finish, so not both sequences need to.
    """
    sequences = torch.tensor([[7, EOS], [9, EOS]])
    torch.manual_seed(3)
    got = model("llama").generate(
        prompt("llama")[:2],
        custom_generate=beam_search,
        trie=fk.Trie.from_sequences(sequences),
        num_beams=4,
        max_new_tokens=5,
        do_sample=True,
        eos_token_id=EOS,
        pad_token_id=3,
    )
    assert _legal(got[:, 7:9].cpu(), sequences.cpu())


def test_what_is_no_trie() -> None:
    with pytest.raises(TypeError, match="must be a flashkern.Trie, got list"):
        model("llama").generate(
            prompt("llama"), custom_generate=beam_search, trie=[[1, 2]], num_beams=2
        )


def test_a_trie_of_another_vocabulary() -> None:
    trie = fk.Trie.from_sequences([[VOCAB, 1]])
    with pytest.raises(ValueError, match="trie"):
        model("llama").generate(
            prompt("llama"), custom_generate=beam_search, trie=trie, num_beams=2, max_new_tokens=2
        )
