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
On a CPU the model's larger linear layers read their weights once for all beams
(:mod:`flashkern.integrations._few_rows`).
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import Tensor

from flashkern._trie import Trie
from flashkern.beam import DEVICES
from flashkern.integrations._beam_cache import BeamCache
from flashkern.integrations._beam_record import Record, cache_name
from flashkern.integrations._beam_sets import Beams, Search, join
from flashkern.integrations._few_rows import few_rows
from flashkern.integrations._penalties import Penalties, with_trie
from flashkern.integrations._prefill import prefill

_log = logging.getLogger("flashkern")

_FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LATE_DEVICES = ("cuda",)  # where a step does not wait to learn whether it was the last


def beam_search(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    trie: Trie | None = None,
    num_beams_per_prompt: Tensor | list[int] | None = None,
    stochastic: bool = False,
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
        num_beams_per_prompt: (batch,), how many of its ``num_beams`` beams each prompt uses, as a
            keyword of ``generate``: what it returns is a search of that width.
        stochastic: sequences drawn without replacement, a keyword of ``generate``. A beam's score
            is its log-probability perturbed by Gumbel noise from torch's generator; the score
            that is returned too. ``length_penalty`` does not apply.
        model_kwargs: the model's other inputs, one row for each beam.

    Diverse groups are asked for as in transformers, ``num_beam_groups`` and ``diversity_penalty``
    of the configuration: groups of ``num_beams / num_beam_groups`` beams search in turn, and a
    token costs a group the penalty for each beam of the groups before that took it in this step.

    Returns:
        The sequences, or transformers' beam output where ``return_dict_in_generate`` asks for it.

    Raises:
        TypeError: ``trie`` is none.
        ValueError: ``low_memory`` or a streamer, which transformers' beam search refuses too,
            forced words, a cache that cannot be reordered, or options that do not go together.

    Sources: transformers 5.23, ``GenerationMixin._beam_search``, whose results it reproduces;
    Vijayakumar et al., Diverse beam search (arXiv 1610.02424); Kool et al., Stochastic beams and
    where to find them (arXiv 1903.06059).

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
    if trie is not None and not isinstance(trie, Trie):
        raise TypeError(f"beam_search: trie must be a flashkern.Trie, got {type(trie).__name__}")
    if "streamer" in model_kwargs:
        raise ValueError("beam_search: streamer must be None, for beams have no last token yet")
    groups = _Groups(input_ids, config, trie, num_beams_per_prompt, stochastic)
    record = Record(model, config, model_kwargs)
    step = _Step(groups, record, logits_processor, stopping_criteria)
    with few_rows(model):
        return _search(model, input_ids, step, synced_gpus, model_kwargs)


def _search(
    model: Any, input_ids: Tensor, step: _Step, synced_gpus: bool, model_kwargs: dict[str, Any]
) -> Any:
    groups, record, config = step.groups, step.record, step.config
    outputs = prefill(model, input_ids, config, model_kwargs)
    late = step.may_end_late and not synced_gpus and input_ids.device.type in _LATE_DEVICES
    told: _Told | None = None
    done = False
    while model._has_unfinished_sequences(done, synced_gpus, device=input_ids.device):
        sequences = groups.sequences()
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
            before = groups.copy()
            step(outputs, sequences)
            _reorder_cache(model, model_kwargs, groups.last_parents())
            if told is not None and told.read():  # by the step before: this one was for nothing
                groups, done = before, True
            elif late and groups.length < config.max_length:
                told = _Told(groups.stopped())
            else:
                done = bool(groups.stopped())
        outputs = None
    return record.finish(groups.finished(), groups.prompt, model_kwargs)


class _Told:
    """A bool on its way from the device."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.event = value, None
        if value.is_cuda:
            self.value = torch.empty((), dtype=torch.bool, pin_memory=True)
            self.value.copy_(value, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def read(self) -> bool:
        if self.event is not None:
            self.event.synchronize()
        return bool(self.value)


class _Groups:
    """The searches of a call: one, or one for each diverse group of a prompt's beams."""

    def __init__(
        self,
        input_ids: Tensor,
        config: Any,
        trie: Trie | None = None,
        widths: Tensor | list[int] | None = None,
        stochastic: bool = False,
    ) -> None:
        beams, count = config.num_beams, config.num_beam_groups or 1
        batch = input_ids.shape[0] // beams
        self.diversity = (config.diversity_penalty or 0.0) if count > 1 else 0.0
        if widths is not None:
            widths = torch.as_tensor(widths, device=input_ids.device)
        _check(config, batch, count, widths, stochastic)
        own = beams // count
        self.slices = [slice(g * own, (g + 1) * own) for g in range(count)]
        rows = torch.arange(batch, device=input_ids.device).unsqueeze(1) * beams
        prompts = input_ids.unflatten(0, (batch, beams))
        self.searches = [
            Search(
                prompts[:, s].flatten(0, 1), config, own, rows + s.start, trie, widths, stochastic
            )
            for s in self.slices
        ]

    @property
    def prompt(self) -> int:
        return self.searches[0].prompt

    @property
    def length(self) -> int:
        return self.searches[0].length

    def copy(self) -> _Groups:
        """As they are now: a step replaces tensors and changes none."""
        other = copy.copy(self)
        other.searches = [copy.copy(search) for search in self.searches]
        return other

    def sequences(self) -> Tensor:
        """Of all running beams, in the order of the model's rows."""
        parts = [s.sequences().unflatten(0, (s.batch, s.beams)) for s in self.searches]
        return parts[0].flatten(0, 1) if len(parts) == 1 else torch.cat(parts, 1).flatten(0, 1)

    def last_parents(self) -> Tensor:
        return torch.cat([s.last_parents() for s in self.searches], 1).flatten()

    def stopped(self) -> Tensor:
        return torch.stack([s.stopped() for s in self.searches]).all()

    def finished(self) -> Beams:
        return join([s.finished for s in self.searches])


def _check(config: Any, batch: int, groups: int, widths: Tensor | None, stochastic: bool) -> None:
    def must(fits: bool, what: str, got: Any) -> None:
        if not fits:
            raise ValueError(f"beam_search: {what}, got {got}")

    must(not config.low_memory, "low_memory must be False", config.low_memory)
    for name in ("constraints", "force_words_ids"):
        must(getattr(config, name, None) is None, f"{name} must be None", getattr(config, name, 0))
    text = f"num_beams must be a multiple of num_beam_groups = {groups}"
    must(config.num_beams % groups == 0, text, config.num_beams)
    if groups > 1:
        penalty = config.diversity_penalty
        must((penalty or 0.0) >= 0.0, "diversity_penalty must not be negative", penalty)
        must(not config.do_sample, "do_sample must be False with num_beam_groups", True)
    if stochastic:
        must(not config.do_sample, "do_sample must be False with stochastic", True)
        must(groups == 1, "num_beam_groups must be 1 with stochastic", groups)
    if widths is None:
        return
    name = "num_beams_per_prompt"
    must(groups == 1, f"num_beam_groups must be 1 with {name}", groups)
    must(widths.shape == (batch,), f"{name} must have shape ({batch},)", tuple(widths.shape))
    least, most = config.num_return_sequences or 1, config.num_beams
    fits = bool(((widths >= least) & (widths <= most)).all())
    must(fits, f"{name} must be between {least} and num_beams = {most}", widths.tolist())


class _Step:
    """From a model's outputs to the next beams."""

    def __init__(self, groups: _Groups, record: Record, processor: Any, criteria: Any) -> None:
        self.groups, self.record = groups, record
        self.processor, self.criteria = with_trie(processor, groups.searches), criteria
        self.config = config = groups.searches[0].config
        self.penalties = Penalties(processor, groups.diversity)
        drawn = config.do_sample or groups.searches[0].running.log_probs is not None
        self.fused = Penalties.know(processor) and not (drawn or record.wants_scores)
        _log.debug("beam_search: %s selection", "fused" if self.fused else "processed")
        # Another step may run, unseen: criteria keep no count, and nothing of a step is returned.
        known = all(type(c).__name__ in _STATELESS for c in criteria)
        self.may_end_late = known and not config.return_dict_in_generate

    def __call__(self, outputs: Any, sequences: Tensor) -> None:
        device = sequences.device
        raw = outputs.logits[:, -1, :]
        logits = raw.to(device).unflatten(0, (-1, sum(s.beams for s in self.groups.searches)))
        fused = self.fused and device.type in DEVICES and logits.dtype in _FUSED_DTYPES
        chosen = sequences.new_empty((len(logits), 0))
        log_probs: list[Tensor] = []
        for own, search in zip(self.groups.slices, self.groups.searches, strict=True):
            best = search.select(logits[:, own], self.penalties, chosen) if fused else None
            if best is None:
                log_probs.append(self._processed(logits, sequences, own, chosen))
                best = search.select_processed(log_probs[-1])
            if own == self.groups.slices[-1]:
                whole = torch.cat(log_probs, 1).flatten(0, 1) if log_probs else None
                self.record.add(outputs, raw, whole)
            hits = self.criteria(search.sequences(best, 1), self.record.scores)
            if self.groups.diversity:
                chosen = torch.cat([chosen, search.taken(best, hits)], 1)
            search.advance(best, hits)

    def _processed(self, logits: Tensor, sequences: Tensor, own: slice, chosen: Tensor) -> Tensor:
        """A group's log-probabilities, (batch, beams, V), after all processors."""
        log_probs = logits.float().log_softmax(-1)
        if chosen.shape[1]:
            log_probs[:, own] = self.penalties.diverse(log_probs[:, own], chosen)
        processed = self.processor(sequences, log_probs.flatten(0, 1))
        return processed.unflatten(0, logits.shape[:2])[:, own]


_STATELESS = ("MaxLengthCriteria", "EosTokenCriteria")


def _reorder_cache(model: Any, model_kwargs: dict[str, Any], parents: Tensor) -> None:
    name = cache_name(model_kwargs)
    if name is None:
        return
    cache = model_kwargs[name]
    shared = isinstance(getattr(cache, "self_attention_cache", cache), BeamCache)
    on_host = parents.device.type == "cpu"  # elsewhere to compare is to wait
    if not shared and on_host and torch.equal(parents, torch.arange(len(parents)).to(parents)):
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
