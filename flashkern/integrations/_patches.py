"""Models of transformers that compute attention by themselves, switched to flashkern.

BLOOM, MPT, GPT-J, Falcon and GPT-Neo never ask transformers' attention interface. `patch` swaps
the class of their attention modules for one that inherits everything and computes the attention
itself by flashkern, and sets the configuration's attn_implementation so that masks come as
recipes instead of dense float tensors. Parameters, state_dict keys and caches stay as they are.

ALiBi comes from these models as a bias per key: it equals the bias by distance up to a constant in
each row, which a softmax ignores, and it follows the padding. It is passed on as a bias that is
broadcast over the queries.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import masking_utils

from flashkern.integrations import _masks
from flashkern.integrations._attend import attend

_log = logging.getLogger("flashkern")

# What a patched model's configuration asks for: masks as recipes, attention by its own modules.
NAME = "fkern_patched"


_own_attention: dict[Any, bool] = {}


@torch.compiler.assume_constant_result
def computes_attention(config_class: Any) -> bool:
    """True when the configuration's model computes attention without transformers' interface."""
    if config_class not in _own_attention:
        package = config_class.__module__.rpartition(".")[0]
        files = [
            module
            for name, module in list(sys.modules.items())
            if name.startswith(f"{package}.modeling_") and module is not None
        ]
        _own_attention[config_class] = not any(
            hasattr(file, "ALL_ATTENTION_FUNCTIONS") for file in files
        ) and any(
            "Attention" in name and value.__module__ == file.__name__
            for file in files
            for name, value in vars(file).items()
            if isinstance(value, type) and issubclass(value, nn.Module)
        )
    return _own_attention[config_class]


def _merge(out: Tensor) -> Tensor:
    """(batch, heads, queries, head_dim) -> (batch, queries, heads * head_dim)."""
    return out.transpose(1, 2).flatten(2)


def _gptj(self: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None) -> Any:
    dtype = value.dtype  # rotary embeddings may have promoted the others
    out = attend(
        query.to(dtype),
        key.to(dtype),
        value,
        attention_mask,
        causal=True,
        scale=1 / self.scale_attn,
        dropout_p=self.attn_dropout.p if self.training else 0.0,
    )
    return out, None


def _gpt_neo(
    self: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None
) -> Any:
    local = self.attention_type == "local"
    out = attend(
        query,
        key,
        value,
        attention_mask,
        causal=True,
        scale=1.0,  # GPT-Neo does not scale its scores
        left_window=self.config.window_size - 1 if local else None,
        dropout_p=self.attn_dropout.p if self.training else 0.0,
    )
    return out, None


def _bloom(
    self: Any,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor,
    attention_mask: Any,
    layer_past: Any = None,
    **kwargs: Any,
) -> Any:
    batch = hidden_states.shape[0]
    query, key, value = self._reshape(self.query_key_value(hidden_states))
    if layer_past is not None:
        key, value = layer_past.update(key, value, self.layer_idx)
    out = attend(
        query,
        key,
        value,
        attention_mask,
        causal=True,
        scale=self.inv_norm_factor,
        bias=alibi.view(batch, self.num_heads, 1, -1),
        dropout_p=self.attention_dropout.p if self.training else 0.0,
    )
    out = _merge(out)
    if self.pretraining_tp > 1 and self.slow_but_exact:
        # The same sums in the same order as the training run that was split over devices.
        parts = zip(
            out.chunk(self.pretraining_tp, -1),
            self.dense.weight.chunk(self.pretraining_tp, 1),
            strict=True,
        )
        projected = torch.stack([nn.functional.linear(x, w) for x, w in parts]).sum(0)
    else:
        projected = self.dense(out)
    return residual + nn.functional.dropout(projected, self.hidden_dropout, self.training), None


def _mpt(
    self: Any,
    hidden_states: Tensor,
    position_bias: Tensor | None,
    past_key_values: Any = None,
    attention_mask: Any = None,
    **kwargs: Any,
) -> Any:
    batch, length = hidden_states.shape[:2]
    qkv = self.Wqkv(hidden_states)
    if self.clip_qkv:
        qkv = qkv.clamp(-self.clip_qkv, self.clip_qkv)
    query, key, value = qkv.view(batch, length, 3, self.n_heads, self.head_dim).permute(
        2, 0, 3, 1, 4
    )
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, self.layer_idx)
    keys = key.shape[2]
    if position_bias is not None and keys > position_bias.shape[-1]:
        raise ValueError(
            f"transformers: sequence must be at most max_seq_len = {position_bias.shape[-1]} "
            f"tokens in MPT, got {keys}"
        )
    out = attend(
        query,
        key,
        value,
        attention_mask,
        causal=True,
        scale=self.softmax_scale,
        bias=None if position_bias is None else position_bias[None, :, -1:, -keys:],
        dropout_p=self.attn_dropout_p if self.training else 0.0,
    )
    return self.out_proj(_merge(out)), None


def _falcon(
    self: Any,
    hidden_states: Tensor,
    alibi: Tensor | None,
    attention_mask: Any,
    position_ids: Any = None,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    position_embeddings: Any = None,
    **kwargs: Any,
) -> Any:
    query, key, value = (
        x.transpose(1, 2) for x in self._split_heads(self.query_key_value(hidden_states))
    )
    if alibi is None:
        rotate = importlib.import_module("transformers.models.falcon.modeling_falcon")
        query, key = rotate.apply_rotary_pos_emb(query, key, *position_embeddings)
    if layer_past is not None:
        key, value = layer_past.update(key, value, self.layer_idx)
    # With ALiBi the model has already merged it into the mask. Falcon applies dropout to the
    # probabilities in that case only.
    drops = alibi is not None and self.training
    out = attend(
        query,
        key,
        value,
        attention_mask,
        causal=True,
        scale=1 / math.sqrt(self.head_dim),
        dropout_p=self.attention_dropout.p if drops else 0.0,
    )
    return self.dense(_merge(out)), None


_MODELS: dict[str, tuple[str, str, Callable]] = {
    "bloom": ("BloomAttention", "forward", _bloom),
    "mpt": ("MptAttention", "forward", _mpt),
    "gptj": ("GPTJAttention", "_attn", _gptj),
    "falcon": ("FalconAttention", "forward", _falcon),
    "gpt_neo": ("GPTNeoSelfAttention", "_attn", _gpt_neo),
}
KINDS = frozenset(_MODELS)


@functools.cache
def _classes(kind: str) -> tuple[type, type]:
    """The attention class of a kind of model, and the class to put in its place."""
    name, method, function = _MODELS[kind]
    file = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    original = getattr(file, name)
    swapped = type(f"Fkern{name}", (original,), {method: function})
    for classes in vars(file).values():  # so that the configuration builds a model of its own kind
        if isinstance(classes, dict) and classes.get("eager") is original:
            classes[NAME] = swapped
    return original, swapped


def _kind(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def _swap(model: nn.Module, old: type, new: type) -> list[nn.Module]:
    found = [module for module in model.modules() if type(module) is old]
    for module in found:
        module.__class__ = new
    return found


def patch(model: nn.Module) -> int:
    """Switches BLOOM, MPT, GPT-J, Falcon and GPT-Neo, which compute attention by themselves.

    Args:
        model: a model of one of these kinds, loaded in any of its own implementations; it is
            changed in place. Parameters, state_dict keys and caches stay as they are.

    Returns:
        How many attention modules were switched; 0 when all of them were already.

    Raises:
        NotImplementedError: the model is of another kind.

    Example:
        >>> import flashkern.integrations.transformers as fkt
        >>> from transformers import BloomConfig, BloomForCausalLM
        >>> config = BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4)
        >>> model = BloomForCausalLM(config)
        >>> fkt.patch(model)
        2
        >>> fkt.unpatch(model)
        2
    """
    kind = _kind(model)
    if kind not in _MODELS:
        raise NotImplementedError(
            f"patch: model must be one of {', '.join(sorted(_MODELS))}, got {kind!r}; other models "
            f"take attn_implementation='fkern' after enable()"
        )
    masking_utils.AttentionMaskInterface.register(
        NAME, functools.partial(_masks.build_mask, never_none=kind == "mpt")
    )
    config: Any = model.config
    found = _swap(model, *_classes(kind))
    for module in found:
        module._implementation_before = config._attn_implementation
    config._attn_implementation = NAME
    _log.info("transformers: %d attention modules of %s now run flashkern", len(found), kind)
    return len(found)


def unpatch(model: nn.Module) -> int:
    """Undoes `patch`; returns how many attention modules went back to their own class."""
    kind = _kind(model)
    if kind not in _MODELS:
        return 0
    found = _swap(model, *reversed(_classes(kind)))
    config: Any = model.config
    for module in found:
        config._attn_implementation = vars(module).pop("_implementation_before", "eager")
    _log.info("transformers: %d attention modules of %s are their own again", len(found), kind)
    return len(found)
