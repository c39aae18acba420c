"""Logits processors that touch few tokens, without a pass over all of them.

Most processors of `generate` change a handful of scores in each row: they rule tokens out
(no-repeat n-grams, bad words, a minimal length, suppressed tokens) or rescale those that a sequence
holds already (the repetition penalty). transformers applies them to log-probabilities and never
normalises again, so every other token keeps its score: `flashkern.beam_topk` selects among those
with the touched ones excluded, the touched ones are scored apart, and the two choices merge.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process as hf


def _repeated_ngrams(processor: Any, sequences: Tensor) -> Tensor | None:
    """What would complete an n-gram that the sequence holds already."""
    size, length = processor.ngram_size, sequences.shape[1]
    if length < size:
        return None
    windows = sequences.unfold(1, size, 1)
    prefix = sequences[:, None, length + 1 - size :]
    return windows[..., -1].where((windows[..., :-1] == prefix).all(-1), -1)


def _bad_words(processor: Any, sequences: Tensor) -> Tensor:
    banned = []
    for word in processor.sequence_bias:
        *prefix, last = word
        row = torch.full_like(sequences[:, :1], last)
        if len(prefix) > sequences.shape[1]:
            continue
        if prefix:
            tail = sequences[:, -len(prefix) :]
            same = tail == _on_device(tuple(prefix), tail.device)
            row = row.where(same.all(1, keepdim=True), -1)
        banned.append(row)
    return torch.cat(banned, 1) if banned else sequences[:, :0]


@functools.lru_cache(4096)
def _on_device(tokens: tuple[int, ...], device: torch.device) -> Tensor:
    """Made once: a copy to a GPU makes the host wait."""
    return torch.tensor(tokens, device=device)


def _everywhere(tokens: Tensor, sequences: Tensor) -> Tensor:
    return tokens.to(sequences).view(1, -1).expand(len(sequences), -1)


def _min_length(processor: Any, sequences: Tensor) -> Tensor | None:
    short = sequences.shape[1] < processor.min_length
    return _everywhere(processor.eos_token_id, sequences) if short else None


def _min_new_tokens(processor: Any, sequences: Tensor) -> Tensor | None:
    new = sequences.shape[1] - processor.prompt_length_to_skip
    return (
        _everywhere(processor.eos_token_id, sequences) if new < processor.min_new_tokens else None
    )


def _suppressed(processor: Any, sequences: Tensor) -> Tensor:
    return _everywhere(processor.suppress_tokens, sequences)


def _suppressed_at_begin(processor: Any, sequences: Tensor) -> Tensor | None:
    begins = sequences.shape[1] == processor.begin_index
    return _everywhere(processor.begin_suppress_tokens, sequences) if begins else None


# What generate puts before its own constraint by a prefix function: a trie stands in that place.
_BEFORE_TRIE = (
    hf.UnbatchedClassifierFreeGuidanceLogitsProcessor,
    hf.SequenceBiasLogitsProcessor,
    hf.EncoderRepetitionPenaltyLogitsProcessor,
    hf.RepetitionPenaltyLogitsProcessor,
    hf.NoRepeatNGramLogitsProcessor,
    hf.EncoderNoRepeatNGramLogitsProcessor,
    hf.NoBadWordsLogitsProcessor,
    hf.MinLengthLogitsProcessor,
    hf.MinNewTokensLengthLogitsProcessor,
)


class _InTrie(hf.LogitsProcessor):
    """-inf where a token is no child of a running beam's node."""

    def __init__(self, searches: Sequence[Any]) -> None:
        self.searches = searches

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        trie = self.searches[0].trie
        nodes = torch.cat([search.running.nodes for search in self.searches], 1).view(-1, 1)
        tokens = torch.arange(scores.shape[1], device=scores.device).expand(len(nodes), -1)
        return scores.masked_fill(trie.advance(nodes, tokens) < 0, -torch.inf)


def with_trie(processors: Any, searches: Sequence[Any]) -> Any:
    """The processors with the searches' trie among them, if they have one."""
    if searches[0].trie is None:
        return processors
    place = 0
    while place < len(processors) and type(processors[place]) in _BEFORE_TRIE:
        place += 1
    return hf.LogitsProcessorList([*processors[:place], _InTrie(searches), *processors[place:]])


# Of each row, the tokens that a processor rules out, -1 for none.
_BANS: dict[type, Callable[[Any, Tensor], Tensor | None]] = {
    hf.NoRepeatNGramLogitsProcessor: _repeated_ngrams,
    hf.NoBadWordsLogitsProcessor: _bad_words,
    hf.MinLengthLogitsProcessor: _min_length,
    hf.MinNewTokensLengthLogitsProcessor: _min_new_tokens,
    hf.SuppressTokensLogitsProcessor: _suppressed,
    hf.SuppressTokensAtBeginLogitsProcessor: _suppressed_at_begin,
}


def _forces(processor: Any, length: int) -> bool:
    """Whether a processor leaves one token alone: then every score changes."""
    if type(processor) is hf.ForcedBOSTokenLogitsProcessor:
        return length == 1
    return type(processor) is hf.ForcedEOSTokenLogitsProcessor and (
        length == processor.max_length - 1
    )


def _refuses(processor: Any, vocab: int) -> bool:
    """Whether a bad word has a token that the model lacks: transformers raises for that."""
    return type(processor) is hf.NoBadWordsLogitsProcessor and any(
        token >= vocab for word in processor.sequence_bias for token in word
    )


def _penalised(processor: Any) -> bool:
    return type(processor) is hf.RepetitionPenaltyLogitsProcessor and not isinstance(
        processor.prompt_ignore_length, Tensor
    )


def _among(tokens: Tensor, others: Tensor, vocab: int) -> Tensor:
    """Whether each of a row's tokens is one of the row's others; -1 is none."""
    marks = torch.zeros((len(tokens), vocab + 1), dtype=torch.bool, device=tokens.device)
    marks.scatter_(1, others.where((others >= 0) & (others < vocab), vocab), True)
    marks[:, vocab] = False
    return marks.gather(1, tokens.where((tokens >= 0) & (tokens < vocab), vocab))


class Penalties:
    """A call's logits processors, all of a kind that touches few tokens; and diverse groups.

    In a diverse beam search a token costs ``diversity`` for each time that ``chosen`` has it:
    (batch, n), what the prompt's earlier groups took in this step. Before any processor.
    """

    def __init__(self, processors: Any, diversity: float = 0.0) -> None:
        self.processors = list(processors)
        self.diversity = diversity

    @staticmethod
    def know(processors: Any) -> bool:
        """Whether all of them are of such a kind."""
        forced = (hf.ForcedBOSTokenLogitsProcessor, hf.ForcedEOSTokenLogitsProcessor)
        return all(type(p) in (*_BANS, *forced) or _penalised(p) for p in processors)

    def touch_few(self, sequences: Tensor, vocab: int) -> bool:
        """Whether none of them forces a token in this step, or would refuse the vocabulary."""
        length = sequences.shape[1]
        return not any(_forces(p, length) or _refuses(p, vocab) for p in self.processors)

    def banned(self, sequences: Tensor) -> Tensor:
        """Tokens that no row may take: (rows, n), -1 for none."""
        lists = [_BANS[type(p)](p, sequences) for p in self.processors if type(p) in _BANS]
        return torch.cat([sequences[:, :0], *(x for x in lists if x is not None)], 1)

    def touched(self, sequences: Tensor, banned: Tensor, vocab: int, chosen: Tensor) -> Tensor:
        """Tokens whose scores change, each once and none of the banned: (rows, n), -1 for none."""
        lists = [
            sequences[:, p.prompt_ignore_length or 0 :]
            for p in self.processors
            if type(p) not in _BANS and _penalised(p)
        ]
        lists = sorted(lists, key=lambda t: -t.shape[1])[:1]  # holds the others
        if chosen.shape[1]:
            lists.append(_for_rows(chosen, sequences))
        if not lists:
            return sequences[:, :0]
        tokens = torch.cat(lists, 1).sort(1).values
        again = torch.zeros_like(tokens, dtype=torch.bool)
        again[:, 1:] = tokens[:, 1:] == tokens[:, :-1]
        if banned.shape[1]:
            again |= _among(tokens, banned, vocab)
        return tokens.masked_fill(again | (tokens >= vocab), -1)

    def rescored(
        self, sequences: Tensor, tokens: Tensor, scores: Tensor, vocab: int, chosen: Tensor
    ) -> Tensor:
        """The scores (rows, n) of `tokens` after all of them, in their order."""
        if chosen.shape[1]:
            again = tokens.unsqueeze(2) == _for_rows(chosen, sequences).unsqueeze(1)
            scores = scores - self.diversity * again.sum(2)
        for processor in self.processors:
            if type(processor) in _BANS or not _penalised(processor):
                continue
            held = sequences[:, processor.prompt_ignore_length or 0 :]
            changed = scores * processor.penalty
            changed = changed.where(scores < 0, scores / processor.penalty)
            if processor.prompt_ignore_length or chosen.shape[1]:
                changed = changed.where(_among(tokens, held, vocab), scores)
            scores = changed
        return scores

    def diverse(self, log_probs: Tensor, chosen: Tensor) -> Tensor:
        """The same of all tokens, without the processors: log_probs are (batch, beams, V)."""
        if chosen.shape[1] == 0:
            return log_probs
        counts = torch.zeros_like(log_probs[:, 0])
        counts.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=counts.dtype))
        return log_probs - self.diversity * counts.unsqueeze(1)


def _for_rows(chosen: Tensor, sequences: Tensor) -> Tensor:
    """What each prompt's groups took, for each of its rows."""
    return chosen.repeat_interleave(len(sequences) // len(chosen), 0)
