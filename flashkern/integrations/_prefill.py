"""The prompt's forward pass, once for each prompt instead of once for each of its beams."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from flashkern.integrations._beam_cache import BeamCache

_log = logging.getLogger("flashkern")

# Model inputs with one row for each beam, and those without rows. A call with any other input runs
# as transformers runs it.
_ROWS = ("attention_mask", "position_ids", "decoder_attention_mask", "token_type_ids")
_PLAIN = ("use_cache", "logits_to_keep", "output_attentions", "output_hidden_states", "return_dict")


def prefill(model: Any, input_ids: Tensor, config: Any, model_kwargs: dict[str, Any]) -> Any:
    """The model's outputs for the prompts, as many rows as ``input_ids``; fills the cache."""
    first = not config.is_assistant
    shared = _one_beam(input_ids, config, model_kwargs)
    if shared is None:
        return model._prefill(input_ids, config, model_kwargs, is_first_iteration=first)
    outputs = model._prefill(
        input_ids[:: config.num_beams], config, shared, is_first_iteration=first
    )
    outputs.logits = outputs.logits[:, -1:].repeat_interleave(config.num_beams, dim=0)
    outputs.past_key_values = _expanded(model, input_ids, config, model_kwargs["past_key_values"])
    return outputs


def _expanded(model: Any, input_ids: Tensor, config: Any, cache: Any) -> Any:
    """The prompts' cache for all beams: shared where attention can read it so, else copied."""
    from transformers import EncoderDecoderCache

    implementation = model.get_decoder().config._attn_implementation
    halves = [cache]
    if isinstance(cache, EncoderDecoderCache):
        halves = [cache.self_attention_cache, cache.cross_attention_cache]
    reason = "" if implementation == "fkern" else f"attention is {implementation!r}"
    if not all(_on_one_device(half, input_ids.device) for half in halves):
        reason = "layers' keys are on other devices"
    if reason:
        _log.debug("beam_search: a cache for each beam, as %s", reason)
        cache.batch_repeat_interleave(config.num_beams)
        return cache
    _log.debug("beam_search: beams share the prompt's cache")
    room = config.max_length - input_ids.shape[1]
    shared = [BeamCache.of(half, config.num_beams, room) for half in halves]
    return shared[0] if len(shared) == 1 else EncoderDecoderCache(*shared)


def _on_one_device(cache: Any, device: torch.device) -> bool:
    keys = [layer.keys for layer in cache.layers if layer.keys is not None]
    return not cache.offloading and all(k.device == device for k in keys)


def _one_beam(
    input_ids: Tensor, config: Any, model_kwargs: dict[str, Any]
) -> dict[str, Any] | None:
    """The inputs of each prompt's first beam, or None where the beams may not be alike."""
    from transformers import EncoderDecoderCache
    from transformers.modeling_outputs import BaseModelOutput

    beams = config.num_beams
    keep_all = config.return_dict_in_generate and (
        config.output_attentions or config.output_hidden_states
    )
    if beams == 1 or keep_all or not _repeated(input_ids, beams):
        return None
    cache: Any = model_kwargs.get("past_key_values")
    halves = [cache]
    if type(cache) is EncoderDecoderCache:
        halves = [cache.self_attention_cache, cache.cross_attention_cache]
    if not all(_is_fresh(half) for half in halves):
        return None
    shared: dict[str, Any] = {}
    for name, value in model_kwargs.items():
        if value is None or name in _PLAIN or name == "past_key_values":
            shared[name] = value
        elif name in _ROWS and isinstance(value, Tensor) and _repeated(value, beams):
            shared[name] = value[::beams]
        elif name == "encoder_outputs" and type(value) is BaseModelOutput:
            hidden: Any = value.last_hidden_state
            if not _repeated(hidden, beams):
                return None
            shared[name] = BaseModelOutput(last_hidden_state=hidden[::beams])
        else:
            return None
    return shared


def _is_fresh(cache: Any) -> bool:
    """Whether a cache is empty and of the kind that can be repeated row by row."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    if type(cache) is not DynamicCache or cache.get_seq_length():
        return False
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)


def _repeated(value: Tensor, beams: int) -> bool:
    """Whether every prompt's rows are the same."""
    if value.shape[0] % beams:
        return False
    groups = value.unflatten(0, (-1, beams))
    return torch.equal(groups, groups[:, :1].expand_as(groups))
