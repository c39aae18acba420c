"""flashkern in transformers: ``attn_implementation="fkern"``.

    >>> import flashkern.integrations.transformers as fkt
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> name = fkt.enable()
    >>> config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    ...                      num_attention_heads=4, vocab_size=50, attn_implementation=name)
    >>> model = LlamaForCausalLM(config)
    >>> model.config._attn_implementation
    'fkern'

`enable` registers an attention function and a mask function; both act only on models that ask for
the name. It cannot contain "flash": transformers takes any such name for the flash-attn package.
Models that compute attention by themselves are switched by `patch` (BLOOM, MPT, GPT-J, Falcon,
GPT-Neo) or refused.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import masking_utils, modeling_utils

from flashkern.integrations import _masks, _patches
from flashkern.integrations._attend import attend
from flashkern.integrations._beam_cache import BeamCache
from flashkern.integrations._beam_search import beam_search
from flashkern.integrations._patches import patch, unpatch

__all__ = [
    "NAME",
    "BeamCache",
    "attention_forward",
    "attention_mask",
    "beam_search",
    "disable",
    "enable",
    "patch",
    "unpatch",
]

NAME = "fkern"
_log = logging.getLogger("flashkern")

# What a layer may hand over that changes its result in a way that no kernel here computes.
_REFUSED = {
    "cache": "a paged cache (continuous batching)",
    "indices": "sparse attention by token indices",
    "block_indices": "sparse attention by block indices",
    "sinks": "sinks that depend on the query",
    "head_mask": "a head mask",
}

_NOTABLE = frozenset(_REFUSED) | {"cu_seq_lens_q", "output_attentions"}


def _refuse(kwargs: dict[str, Any], module: torch.nn.Module, mask: Tensor | None) -> None:
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"transformers: {type(module).__name__} must not need {what} (argument {name}); "
                f"use another attn_implementation than {NAME!r}"
            )
    packed = kwargs.get("cu_seq_lens_q")
    if packed is not None and mask is None and packed.numel() > 2:
        raise NotImplementedError(
            f"transformers: packed sequences must come with position_ids, from which the mask is "
            f"made, got cu_seq_lens_q alone in {type(module).__name__}"
        )
    if kwargs.get("output_attentions"):
        _warn_once(type(module).__name__)


_warned: set[str] = set()


def _warn_once(name: str) -> None:
    if name not in _warned:
        _warned.add(name)
        _log.warning("transformers: %s gives no attention weights with %r", name, NAME)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls, with its signature and meanings.

    Args:
        module: the layer; `module.is_causal` decides when neither mask nor `is_causal` is given.
        query: (batch, heads, queries, head_dim).
        key, value: (batch, kv_heads, keys, head_dim), value's head_dim may differ.
        attention_mask: None, a mask of `attention_mask`, bool (True = attend) or float (added).
        dropout: probability, already 0 outside of training.
        scaling: the factor on the scores; None for 1 / sqrt(head_dim).
        position_bias: float, added to the scores (T5).
        softcap: the scores become softcap * tanh(score / softcap) (Gemma 2).
        s_aux: one sink logit per head (GPT-OSS).

    Returns:
        (batch, queries, heads, value_head_dim), and None in place of attention weights.

    Raises:
        NotImplementedError: the layer needs what no kernel here computes, such as a paged cache or
            sparse indices.
    """
    if not _NOTABLE.isdisjoint(kwargs):
        _refuse(kwargs, module, attention_mask)
    if query.shape[0] != key.shape[0]:  # learned queries, shared by the batch
        batch = max(query.shape[0], key.shape[0])
        query, key, value = (x.expand(batch, -1, -1, -1) for x in (query, key, value))
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    out = attend(
        query,
        key,
        value,
        attention_mask,
        causal=causal,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        bias=position_bias,
        softcap=softcap or 0.0,
        sinks=s_aux,
        dropout_p=dropout,
    )
    return out.transpose(1, 2).contiguous(), None


def attention_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask function that transformers calls: `_masks.build_mask` for models that can use it.

    Raises:
        NotImplementedError: the model computes attention by itself and would misread the mask.
    """
    config = kwargs.get("config")
    if config is not None:
        kind = str(getattr(config, "model_type", ""))
        # Gemma 4 drops queries before its last layers, and then relies on the mask's rows.
        if kind.startswith("gemma4"):
            kwargs["never_none"] = True
        if _patches.computes_attention(config.__class__):
            how = "load it with attn_implementation='eager'"
            if kind in _patches.KINDS:
                how += " and call flashkern.integrations.transformers.patch(model)"
            raise NotImplementedError(
                f"transformers: the model must use the attention interface, got {kind!r}, which "
                f"computes attention by itself: {how}"
            )
    return _masks.build_mask(*args, **kwargs)


def enable() -> str:
    """Registers flashkern with transformers, under the name that it returns: ``"fkern"``.

    Models use it when loaded with ``attn_implementation="fkern"``, or from
    ``model.set_attn_implementation("fkern")`` on. Nothing changes for other models.

    Raises:
        ImportError: this version of transformers builds masks in another way.
    """
    if "q_length" not in inspect.signature(masking_utils.sdpa_mask).parameters:
        raise ImportError(
            f"transformers: version must build masks from q_length, got {transformers.__version__}"
        )
    modeling_utils.AttentionInterface.register(NAME, attention_forward)
    masking_utils.AttentionMaskInterface.register(NAME, attention_mask)
    _log.info(
        "transformers %s: attn_implementation=%r now runs flashkern (attention and masks)",
        transformers.__version__,
        NAME,
    )
    return NAME


def disable() -> None:
    """Takes the name out again; models that still ask for it get transformers' own error."""
    for interface in (modeling_utils.AttentionInterface, masking_utils.AttentionMaskInterface):
        interface._global_mapping.pop(NAME, None)
    _log.info("transformers: attn_implementation=%r is gone", NAME)
