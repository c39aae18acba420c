"""transformers' beam search with flashkern's selection, for ``generate(custom_generate=...)``.

The search keeps two sets for each prompt. ``running`` beams go on; ``finished`` ones hold the best
hypotheses that met a stopping criterion, with their length-penalised scores. A step takes the
best candidates of all running beams, moves those that just finished into the second set and the
best of the others into the first. What transformers computes is kept to the letter, its large
negative number for "not this one" included: where too few hypotheses finish, such numbers decide
what is returned.

Done once instead of ``num_beams`` times: the prompt's forward pass (where the inputs allow it) and
the read of the logits (:func:`flashkern.beam_topk`, where no logits processor changes more than a
few of them). Cross-attention caches are not reordered at all: the beams of a prompt share them.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashkern._trie import Trie
from flashkern.beam import DEVICES, beam_topk
from flashkern.integrations._beam_cache import BeamCache
from flashkern.integrations._penalties import Penalties
from flashkern.integrations._prefill import prefill

_log = logging.getLogger("flashkern")

_NEVER = -1.0e9  # added to a score to rule a candidate out; transformers' own value
_FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def beam_search(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    trie: Trie | None = None,
    **model_kwargs: Any,
) -> Any:
    """Beam search for ``model.generate(..., num_beams=n, custom_generate=beam_search)``.

    Gives the tokens, scores and beam indices of transformers' own beam search, and the same draws
    from the same seed with ``do_sample``. Logits processors act on log-probabilities, as they do
    there; without ``output_scores`` or sampling, and with none but those that touch few tokens
    (repetition penalty, no-repeat n-grams, bad words, minimal lengths, suppressed and forced
    tokens), the selection is :func:`flashkern.beam_topk`. The logger ``flashkern`` says at level
    DEBUG which path runs.

    Args:
        model: a generating model.
        input_ids: (batch * num_beams, length), each prompt repeated ``num_beams`` times.
        logits_processor: acts on (rows, V) float32 log-probabilities.
        stopping_criteria: says of candidate sequences whether they end here.
        generation_config: as prepared by ``generate``.
        synced_gpus: go on with forward passes until every process has finished.
        trie: the token sequences that may follow a prompt (:class:`flashkern.Trie`), as a keyword
            of ``generate``. End them with an EOS token, or all at ``max_new_tokens``: a beam that
            has come to a leaf otherwise goes no further. Only beams within the trie finish; where
            fewer finish than are asked for, others with scores of -1e9 fill up, as they do there.
        model_kwargs: the model's other inputs, one row for each beam.

    Returns:
        The sequences, or transformers' beam output where ``return_dict_in_generate`` asks for it.

    Raises:
        ValueError: ``low_memory``, which transformers' beam search refuses too, or a cache that
            cannot be reordered.

    Source: transformers 5.23, ``GenerationMixin._beam_search``, whose results it reproduces.

    Example:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> seed = torch.manual_seed(0)
        >>> tokens = dict(bos_token_id=2, eos_token_id=1)
        >>> config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, **tokens)
        >>> model, prompt = GPT2LMHeadModel(config), torch.tensor([[5, 6, 7]])
        >>> kwargs = dict(num_beams=4, max_new_tokens=5, pad_token_id=0, do_sample=False)
        >>> ours = model.generate(prompt, custom_generate=beam_search, **kwargs)
        >>> torch.equal(ours, model.generate(prompt, **kwargs))
        True
    """
    config = generation_config
    if config.low_memory:
        raise ValueError("beam_search: low_memory must be False, got True")
    search = _Search(input_ids, config, trie)
    record = _Record(model, config, model_kwargs)
    penalties = Penalties(logits_processor)
    few = Penalties.know(logits_processor)
    fused = few and not (config.do_sample or record.wants_scores)
    _log.debug("beam_search: %s selection", "fused" if fused else "processed")
    outputs = prefill(model, input_ids, config, model_kwargs)
    done = False
    while model._has_unfinished_sequences(done, synced_gpus, device=input_ids.device):
        sequences = search.sequences()
        if outputs is None:
            length = 1 if model_kwargs["use_cache"] else None
            inputs = model.prepare_inputs_for_generation(
                sequences, next_sequence_length=length, **model_kwargs
            )
            outputs = model(**inputs, return_dict=True)
        model_kwargs = model._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder=model.config.is_encoder_decoder
        )
        if not (synced_gpus and done):
            logits = outputs.logits[:, -1, :]
            best = log_probs = None
            if fused and logits.device.type in DEVICES and logits.dtype in _FUSED_DTYPES:
                best = search.select(logits, penalties, sequences)
            if best is None:
                log_probs = logits.to(input_ids.device, torch.float32).log_softmax(-1)
                log_probs = logits_processor(sequences, log_probs)
                best = search.select_processed(log_probs)
            record.add(outputs, logits, log_probs)
            hits = stopping_criteria(search.sequences(best, 1), record.scores)
            search.advance(best, hits)
            _reorder_cache(model, model_kwargs, search.last_parents())
            done = search.done()
        outputs = None
    return record.finish(search, model_kwargs)


class _Beams(NamedTuple):
    tokens: Tensor  # (batch, n, max_length), prompt included
    scores: Tensor  # (batch, n)
    parents: Tensor  # (batch, n, max_length - prompt): the row that each token came from, or -1
    nodes: Tensor | None = None  # (batch, n): where in a trie the running ones are

    def take(self, index: Tensor) -> _Beams:
        wide = index.unsqueeze(-1)
        return _Beams(
            self.tokens.take_along_dim(wide, 1),
            self.scores.gather(1, index),
            self.parents.take_along_dim(wide, 1),
            None if self.nodes is None else self.nodes.gather(1, index),
        )


class _Search:
    """The two sets of beams and what moves between them."""

    def __init__(self, input_ids: Tensor, config: Any, trie: Trie | None = None) -> None:
        self.config = config
        self.trie = None if trie is None else trie.to(input_ids.device)
        self.beams, self.max_length = config.num_beams, config.max_length
        self.batch, self.prompt = input_ids.shape[0] // self.beams, input_ids.shape[1]
        self.length = self.prompt  # of the running sequences
        eos = config._eos_token_tensor
        # Enough that num_beams candidates go on even when all others end with an EOS token.
        self.kept = max(2, 1 + (0 if eos is None else eos.shape[0])) * self.beams
        shape, device = (self.batch, self.beams), input_ids.device
        tokens = input_ids.new_full((*shape, self.max_length), _fill(config), dtype=torch.int64)
        tokens[:, :, : self.prompt] = input_ids.unflatten(0, shape)
        parents = torch.full((*shape, self.max_length - self.prompt), -1, dtype=torch.int32)
        # All beams hold the same prompt: only the first may speak in the first step.
        scores = torch.zeros(shape, device=device)
        scores[:, 1:] = _NEVER
        never = torch.full(shape, _NEVER, device=device)
        nodes = None if trie is None else torch.zeros(shape, dtype=torch.int64, device=device)
        self.running = _Beams(tokens, scores, parents.to(device), nodes)
        self.finished = _Beams(tokens.clone(), never, parents.to(device))
        self.is_finished = torch.zeros(shape, dtype=torch.bool, device=device)
        self.improvable = torch.ones((self.batch, 1), dtype=torch.bool, device=device)
        self.all_hit = False

    def sequences(self, beams: _Beams | None = None, more: int = 0) -> Tensor:
        """The sequences so far of the running or the given beams: (rows, length)."""
        tokens = (self.running if beams is None else beams).tokens
        return tokens[:, :, : self.length + more].flatten(0, 1)

    def last_parents(self) -> Tensor:
        return self.running.parents[..., self.length - 1 - self.prompt].flatten()

    def select(self, logits: Tensor, penalties: Penalties, sequences: Tensor) -> _Beams | None:
        """The best candidates of all beams, from raw logits (batch * beams, V).

        None where penalties change or rule out too many for that.
        """
        if not penalties.touch_few(sequences, logits.shape[1]):
            return None
        banned = penalties.banned(sequences)
        banned = banned.where(banned < logits.shape[1], -1)
        touched = penalties.touched(sequences, banned, logits.shape[1])
        nodes = self.running.nodes
        if self.trie is not None and nodes is not None:
            ahead = self.trie.advance(nodes.view(-1, 1), touched)
            touched = touched.masked_fill(ahead < 0, -1)
        excluded = torch.cat([banned, touched], 1)
        left = (logits.shape[1] - excluded.shape[1]) * self.beams
        if self.trie is None and left < self.kept:
            return None
        shape = (-1, self.beams)
        best = beam_topk(
            logits.unflatten(0, shape),
            self.running.scores,
            self.kept,
            excluded=excluded.unflatten(0, shape) if excluded.shape[1] else None,
            trie=self.trie,
            nodes=nodes,
        )
        if touched.shape[1] == 0:
            return self._extend(best.scores, best.tokens, best.parents)
        found = touched.clamp(min=0)
        scores = logits.gather(1, found).float() - best.logsumexp.view(-1, 1)
        scores = penalties.rescored(sequences, touched, scores, logits.shape[1])
        scores = scores.masked_fill(touched < 0, -torch.inf)
        scores = (scores + self.running.scores.view(-1, 1)).view(self.batch, -1)
        merged, index = torch.cat([best.scores, scores], 1).topk(self.kept)
        beams = torch.arange(self.beams, device=logits.device).repeat_interleave(touched.shape[1])
        tokens = torch.cat([best.tokens, found.view(self.batch, -1)], 1)
        parents = torch.cat([best.parents, beams.expand(self.batch, -1)], 1)
        return self._extend(merged, tokens.gather(1, index), parents.gather(1, index))

    def select_processed(self, log_probs: Tensor) -> _Beams:
        """The same from log-probabilities, best first or drawn without replacement."""
        vocab = log_probs.shape[-1]
        if self.trie is not None:
            log_probs = log_probs.masked_fill(~self._allowed(vocab), -torch.inf)
        total = log_probs.unflatten(0, (-1, self.beams)) + self.running.scores.unsqueeze(-1)
        total = total.flatten(1)
        if self.config.do_sample:
            dead = (total == -torch.inf).all(1, keepdim=True)  # within a trie: draw any of these
            chances = total.masked_fill(dead, 0).softmax(-1)
            index = torch.multinomial(chances, num_samples=self.kept)
            scores = total.gather(1, index)
        else:
            scores, index = total.topk(self.kept)
        return self._extend(scores, index % vocab, index // vocab)

    def _allowed(self, vocab: int) -> Tensor:
        """Which tokens are children of each running beam's node: (rows, V) bool."""
        trie, nodes = self.trie, self.running.nodes
        assert trie is not None and nodes is not None
        rows = nodes.view(-1, 1)
        tokens = torch.arange(vocab, device=rows.device).expand(len(rows), -1)
        return trie.advance(rows, tokens) >= 0

    def _extend(self, scores: Tensor, tokens: Tensor, parents: Tensor) -> _Beams:
        extended = self.running.take(parents)._replace(scores=scores)
        if self.trie is not None and extended.nodes is not None:
            nodes = self.trie.advance(extended.nodes, tokens.where(scores > -torch.inf, -1))
            extended = extended._replace(nodes=nodes)
            tokens = tokens.where(scores > -torch.inf, max(_fill(self.config), 0))
        extended.tokens[:, :, self.length] = tokens
        rows = torch.arange(self.batch, device=parents.device).unsqueeze(1) * self.beams
        extended.parents[:, :, self.length - self.prompt] = (parents + rows).int()
        return extended

    def advance(self, best: _Beams, hits: Tensor) -> None:
        """Sorts the candidates into running and finished beams; ``hits``: they met a criterion."""
        hits = hits.unflatten(0, (self.batch, self.kept))
        held_back = best._replace(scores=best.scores + hits.float() * _NEVER)
        self.running = held_back.take(held_back.scores.topk(self.beams).indices)
        self._finish(best, hits)
        self.length += 1
        self._judge()
        self.all_hit = bool(hits.all())

    def _finish(self, best: _Beams, hits: Tensor) -> None:
        """The best num_beams of the finished beams and the candidates that just finished."""
        just_finished = hits.clone()
        just_finished[:, self.beams :] = False  # the rest only stand by as running beams
        scores = best.scores / (self.length + 1 - self.prompt) ** self.config.length_penalty
        full = self.is_finished.all(-1, keepdim=True) & (self.config.early_stopping is True)
        for ruled_out in (full, ~self.improvable, ~just_finished):
            scores = scores + ruled_out.float() * _NEVER
        fresh = best._replace(scores=scores)
        pairs = zip(self.finished[:3], fresh[:3], strict=True)
        merged = _Beams(*(torch.cat(pair, dim=1) for pair in pairs))
        index = merged.scores.topk(self.beams).indices
        self.finished = merged.take(index)
        self.is_finished = torch.cat((self.is_finished, just_finished), dim=1).gather(1, index)

    def _judge(self) -> None:
        """Whether a running beam may still beat the worst finished one; once no, always no."""
        penalty, length = self.config.length_penalty, self.length
        if self.config.early_stopping == "never" and penalty > 0.0:
            length = self.max_length
        hoped = self.running.scores[:, :1] / (length - self.prompt) ** penalty
        worst = self.finished.scores.amin(1, keepdim=True)
        worst = worst.where(self.is_finished, torch.full_like(worst, _NEVER))
        self.improvable &= (hoped > worst).any(-1, keepdim=True)

    def done(self) -> bool:
        full = self.config.early_stopping is True and bool(self.is_finished.all())
        return full or self.all_hit or not bool(self.improvable.any())


def _fill(config: Any) -> int:
    """What stands behind a sequence's end; transformers takes a padding token 0 for none."""
    pad, eos = config._pad_token_tensor, config._eos_token_tensor
    if eos is None:
        return -1
    return int(pad) if pad is not None and bool(pad) else int(eos[0])


def _cache_name(model_kwargs: dict[str, Any]) -> str | None:
    from transformers.generation.utils import ALL_CACHE_NAMES

    return next((name for name in ALL_CACHE_NAMES if name in model_kwargs), None)


def _reorder_cache(model: Any, model_kwargs: dict[str, Any], parents: Tensor) -> None:
    name = _cache_name(model_kwargs)
    if name is None:
        return
    cache = model_kwargs[name]
    shared = isinstance(getattr(cache, "self_attention_cache", cache), BeamCache)
    if not shared and torch.equal(parents, torch.arange(len(parents)).to(parents)):
        return
    if hasattr(model, "_reorder_cache"):
        model_kwargs[name] = model._reorder_cache(cache, parents)
    elif hasattr(cache, "self_attention_cache"):
        cache.self_attention_cache.reorder_cache(parents)
    elif hasattr(cache, "reorder_cache"):
        cache.reorder_cache(parents)
    else:
        kind = type(model).__name__
        raise ValueError(f"beam_search: the cache must have reorder_cache, got {kind}'s")


class _Record:
    """What ``return_dict_in_generate`` asks to be kept of each step."""

    def __init__(self, model: Any, config: Any, model_kwargs: dict[str, Any]) -> None:
        self.config, self.encoder_decoder = config, model.config.is_encoder_decoder
        asked = config.return_dict_in_generate
        self.wants_scores = bool(asked and config.output_scores)
        self.scores: tuple[Tensor, ...] | None = () if self.wants_scores else None
        self.steps: dict[str, tuple[Any, ...]] = {}
        self.encoder: dict[str, Any] = {}
        if not asked:
            return
        names: list[str] = ["logits"] if config.output_logits else []
        names += self._names("attentions") if config.output_attentions else []
        names += self._names("hidden_states") if config.output_hidden_states else []
        self.steps = {name: () for name in names}
        if self.encoder_decoder:
            encoder = model_kwargs["encoder_outputs"]
            for name in ("attentions", "hidden_states"):
                wanted = getattr(config, f"output_{name}")
                self.encoder[f"encoder_{name}"] = encoder.get(name) if wanted else None

    def _names(self, what: str) -> list[str]:
        if not self.encoder_decoder:
            return [what]
        return [f"decoder_{what}"] + (["cross_attentions"] if what == "attentions" else [])

    def add(self, outputs: Any, logits: Tensor, log_probs: Tensor | None) -> None:
        if self.scores is not None and log_probs is not None:
            self.scores += (log_probs.clone(),)
        for name in self.steps:
            value = logits.float().clone() if name == "logits" else getattr(outputs, name)
            self.steps[name] += (value,)

    def finish(self, search: _Search, model_kwargs: dict[str, Any]) -> Any:
        """The finished beams, best first, cut to the longest; as transformers returns them."""
        count = self.config.num_return_sequences
        tokens, scores, parents = (value[:, :count].flatten(0, 1) for value in search.finished[:3])
        generated = int((parents >= 0).sum(1).max())
        sequences = tokens[:, : search.prompt + generated]
        if not self.config.return_dict_in_generate:
            return sequences
        from transformers.generation import utils

        name = _cache_name(model_kwargs)
        kind = "EncoderDecoder" if self.encoder_decoder else "DecoderOnly"
        return getattr(utils, f"GenerateBeam{kind}Output")(
            sequences=sequences,
            sequences_scores=scores if self.config.output_scores else None,
            scores=self.scores,
            beam_indices=parents[:, :generated],
            past_key_values=None if name is None else model_kwargs[name],
            **self.steps,
            **self.encoder,
        )
