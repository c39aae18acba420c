"""Linear layers while a model decodes: a few rows meet a weight that is read once, in place.

A step of beam search gives each layer one row for every beam. Of so few rows a BLAS makes little:
it packs the weight, or reads it again for each row. A LoRA linear without an adapter is a linear
layer, and :func:`flashkern.lora_linear` reads the weight at the speed of memory.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import TypeGuard

import torch
from torch import Tensor, nn

from flashkern._ops import has_kernel, ops

MOST_ROWS = 16
LEAST_BYTES = 1 << 21  # of a weight: below, the call itself is what takes time
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _no_adapter(inputs: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    a = torch.empty(0, inputs, dtype=dtype, device="cpu")
    return a, torch.empty(outputs, 0, dtype=dtype, device="cpu")


class FewRowsLinear(nn.Linear):
    """A linear layer: flashkern for at most 16 rows without gradients, torch for others."""

    def forward(self, input: Tensor) -> Tensor:
        if (
            input.numel() > MOST_ROWS * self.in_features
            or torch.is_grad_enabled()
            or input.dtype is not self.weight.dtype
            or torch.compiler.is_compiling()
            or torch._C._is_any_autocast_enabled()
        ):
            return nn.functional.linear(input, self.weight, self.bias)
        a, b = _no_adapter(self.in_features, self.out_features, input.dtype)
        none = None
        return ops.lora_linear(input, self.weight, a, b, self.bias, none, none, 1.0, 0.0, none)[0]


def _fits(module: nn.Module) -> TypeGuard[nn.Linear]:
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    weight, bias = module.weight, module.bias
    return (
        type(weight) is nn.Parameter
        and weight.device.type == "cpu"
        and weight.dtype in _DTYPES
        and weight.is_contiguous()
        and weight.nbytes >= LEAST_BYTES
        and (bias is None or bias.dtype is weight.dtype)
    )


@contextlib.contextmanager
def few_rows(model: nn.Module) -> Iterator[None]:
    """While it lasts, the model's larger linear layers on a CPU are :class:`FewRowsLinear`."""
    layers = [m for m in model.modules() if _fits(m)] if has_kernel("lora_linear", "cpu") else []
    for layer in layers:
        layer.__class__ = FewRowsLinear
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = nn.Linear
