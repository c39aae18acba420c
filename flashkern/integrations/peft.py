"""PEFT: LoRA layers that run flashkern's operator, by a swap of their class.

    from flashkern.integrations import peft as fk_peft
    print(fk_peft.patch(model))      # what was patched, what was left, and why
    fk_peft.unpatch(model)

:func:`patch` gives every exact ``peft.tuners.lora.layer.Linear`` a subclass that overrides
``forward`` alone. Parameters, state_dict keys, saving, loading, merging, disabling and adding
adapters stay PEFT's. Each call looks at the layer's state as it is then: where it is a plain LoRA
layer, the whole layer is one operator; anywhere else (see :func:`obstacle`) PEFT's forward runs.
"""

import logging
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from flashkern._ops import has_kernel
from flashkern.lora import lora_linear, lora_linear_multi

logger = logging.getLogger("flashkern")

_DEVICES = [d for d in ("cpu", "cuda") if has_kernel("lora_linear", d)]
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass
class PatchReport:
    """What :func:`patch` did, by layer name; ``str()`` of it is for people."""

    patched: list[str] = field(default_factory=list)
    """Layers whose class was swapped."""
    waiting: dict[str, str] = field(default_factory=dict)
    """Patched layers that run PEFT's forward as they are now, and why."""
    left: dict[str, str] = field(default_factory=dict)
    """LoRA layers that were not touched, and why."""

    def __str__(self) -> str:
        lines = [f"flashkern: {len(self.patched)} PEFT LoRA layers patched, {len(self.left)} left"]
        for title, layers in (("running PEFT's forward", self.waiting), ("left", self.left)):
            for reason, count in Counter(layers.values()).items():
                first = next(name for name, why in layers.items() if why == reason)
                lines.append(f"  {title}: {count} ({first}, ...): {reason}")
        return "\n".join(lines)


def patch(model: nn.Module) -> PatchReport:
    """Makes the model's PEFT LoRA linear layers run flashkern's operator.

    Args:
        model: any module with PEFT LoRA layers in it. Patch after loading: neither
            ``save_pretrained`` nor ``from_pretrained`` knows of the swap.

    Returns:
        a report, also logged at level INFO by the logger ``flashkern``.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from flashkern.integrations import peft as fk_peft
        >>> net = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 4))
        >>> model = get_peft_model(net, LoraConfig(target_modules=["0"]))
        >>> print(fk_peft.patch(model))
        flashkern: 1 PEFT LoRA layers patched, 0 left
        >>> fk_peft.unpatch(model)
        1
    """
    report = PatchReport()
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        reason = _unfit(layer)
        if reason is not None:
            report.left[name] = reason
            continue
        layer.__class__ = FusedLinear
        report.patched.append(name)
        why = obstacle(layer)
        if why is not None:
            report.waiting[name] = why
    logger.info("%s", report)
    return report


def unpatch(model: nn.Module) -> int:
    """Gives the layers that :func:`patch` swapped their class back; returns how many there were."""
    layers = [layer for layer in model.modules() if type(layer) is FusedLinear]
    for layer in layers:
        layer.__class__ = Linear
    logger.info("flashkern: %d PEFT LoRA layers put back", len(layers))
    return len(layers)


def _unfit(layer: nn.Module) -> str | None:
    """Why no state of the layer's could ever run fused."""
    if type(layer) is FusedLinear:
        return "it is patched already"
    if type(layer) is not Linear:
        return f"{type(layer).__module__}.{type(layer).__name__} is not PEFT's LoRA Linear"
    base = layer.base_layer
    if type(base) is not nn.Linear:
        return f"its base layer is {type(base).__name__}, not torch.nn.Linear"
    if layer.fan_in_fan_out:
        return "its weight is stored transposed (fan_in_fan_out)"
    return None


# ---- guards ----


def obstacle(layer: Linear) -> str | None:
    """Why the layer, as it is now, runs PEFT's own forward; None where it runs fused.

    Adapters that are disabled or merged, several active ones or none, variants (DoRA and the like),
    ``lora_bias``, a base weight that is trained, quantised, sharded or on a device for which this
    build has no kernel, and hooks on a submodule, which fused code would not call.
    """
    if layer.disable_adapters:
        return "its adapters are disabled"
    if layer.merged_adapters:
        return "its adapters are merged"
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1:
        return f"{len(active)} adapters are active"
    return _base_obstacle(layer) or _adapter_obstacle(layer, active[0])


def _base_obstacle(layer: Linear) -> str | None:
    base = layer.base_layer
    if type(base) is not nn.Linear:
        return f"its base layer is {type(base).__name__}"
    if _hooked(base):
        return "its base layer has hooks or a forward of its own"
    if hasattr(base, "_hf_tp_plan"):
        return "its base layer is part of a tensor-parallel plan"
    weight = base.weight
    reason = _weight_obstacle(weight)
    if reason is not None:
        return f"its base weight {reason}"
    if weight.requires_grad:
        return "its base weight is not frozen"
    bias = base.bias
    if bias is not None and bias.dtype is not weight.dtype:
        return "its base bias has a dtype of its own"
    return None


def _adapter_obstacle(layer: Linear, name: str) -> str | None:
    if name in layer.lora_variant:
        return f"adapter {name} is a variant ({type(layer.lora_variant[name]).__name__})"
    a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if type(a) is not nn.Linear or type(b) is not nn.Linear:
        return f"adapter {name} is not made of torch.nn.Linear"
    if a.bias is not None or b.bias is not None:
        return f"adapter {name} has a bias (lora_bias)"
    if type(dropout) not in (nn.Identity, nn.Dropout):
        return f"adapter {name} has dropout of type {type(dropout).__name__}"
    if _hooked(a) or _hooked(b) or _hooked(dropout):
        return f"adapter {name} has hooks or a forward of its own"
    reason = _weight_obstacle(a.weight) or _weight_obstacle(b.weight)
    if reason is not None:
        return f"a weight of adapter {name} {reason}"
    dtype = a.weight.dtype
    if b.weight.dtype is not dtype or dtype not in (torch.float32, layer.base_layer.weight.dtype):
        return f"adapter {name} is neither float32 nor of the base weight's dtype"
    return None


def _hooked(module: nn.Module) -> bool:
    state = module.__dict__
    return "forward" in state or any(state[hooks] for hooks in _HOOKS)


def _weight_obstacle(weight: Tensor) -> str | None:
    if type(weight) is not nn.Parameter and type(weight) is not Tensor:
        return f"is a {type(weight).__name__}"
    if weight.dtype not in _FLOATS:
        return f"has dtype {weight.dtype}"
    if weight.device.type not in _DEVICES:
        return f"is on device {weight.device.type}, for which this build has no kernel"
    if weight.dim() != 2 or weight.numel() == 0:
        return f"has shape {tuple(weight.shape)}"
    return None


# ---- the layer ----


class FusedLinear(Linear):
    """PEFT's LoRA Linear with a forward in one operator wherever no guard objects."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = kwargs.get("adapter_names")
        plain = not args and len(kwargs) == ("adapter_names" in kwargs) and _plain_input(self, x)
        if plain and names is None and obstacle(self) is None:
            return self._fused(x)
        if plain and names is not None and self._mixed_obstacle(x, names) is None:
            return self._fused_mixed(x, names)
        return super().forward(x, *args, **kwargs)

    def _fused(self, x: Tensor) -> Tensor:
        name = next(name for name in self.active_adapters if name in self.lora_A)
        base, dropout = self.base_layer, self.lora_dropout[name]
        return lora_linear(
            x,
            base.weight,
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            bias=base.bias,
            scaling=self.scaling[name],
            dropout_p=dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0,
        )

    def _mixed_obstacle(self, x: Tensor, names: list[str]) -> str | None:
        if self.disable_adapters or self.merged_adapters or len(names) != len(x):
            return "PEFT decides what a mixed batch means here"
        used = {name for name in names if name in self.lora_A}
        if not used:
            return "no row has an adapter"
        if any(self.lora_dropout[name].training and _drops(self, name) for name in used):
            return "dropout is on"
        if len({self.lora_A[name].weight.dtype for name in used}) != 1:
            return "the adapters differ in dtype"
        reasons = (_adapter_obstacle(self, name) for name in used)
        return _base_obstacle(self) or next((why for why in reasons if why), None)

    def _fused_mixed(self, x: Tensor, names: list[str]) -> Tensor:
        used = [name for name in dict.fromkeys(names) if name in self.lora_A]
        number = {name: n for n, name in enumerate(used)}
        ids = _on_device(tuple(number.get(name, -1) for name in names), torch.int64, x.device)
        scaling = tuple(float(self.scaling[name]) for name in used)
        leading = x.shape[:-1]
        ids = ids.view(-1, *[1] * (len(leading) - 1)).expand(leading)
        rank = max(self.r[name] for name in used)
        a = [_pad(self.lora_A[name].weight, 0, rank) for name in used]
        b = [_pad(self.lora_B[name].weight, 1, rank) for name in used]
        return lora_linear_multi(
            x,
            self.base_layer.weight,
            torch.stack(a),
            torch.stack(b),
            ids,
            bias=self.base_layer.bias,
            scaling=_on_device(scaling, torch.float64, x.device),
        )


def _on_device(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values as a tensor, copied once: each layer and step would wait for a copy of its own."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.tensor(values, dtype=dtype, device=device)  # a graph outlives what is cached
    return _copied(values, dtype, device)


@lru_cache(maxsize=256)
def _copied(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a training step may save it
        return torch.tensor(values, dtype=dtype, device=device)


def _drops(layer: Linear, name: str) -> bool:
    return type(layer.lora_dropout[name]) is not nn.Identity


def _pad(weight: Tensor, dim: int, rank: int) -> Tensor:
    """Adapters of a lower rank get zeros: they add nothing."""
    missing = rank - weight.shape[dim]
    if missing == 0:
        return weight
    shape = list(weight.shape)
    shape[dim] = missing
    return torch.cat((weight, weight.new_zeros(shape)), dim)


def _plain_input(layer: Linear, x: object) -> bool:
    """An ordinary tensor that the base layer would take, outside tracing and global hooks."""
    if type(x) is not Tensor or x.dim() == 0 or torch.jit.is_tracing():
        return False
    if nn_module._has_any_global_hook() or not layer.cast_input_dtype_enabled:
        return False
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        return x.dtype in _FLOATS
    return x.dtype is layer.base_layer.weight.dtype
