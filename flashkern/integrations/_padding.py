"""Head dimensions that a kernel does not take, made ones that it does."""

from __future__ import annotations

import torch
from torch import Tensor

STEP = 8  # kernels take head dimensions that are multiples of this
LARGEST = 256


def pad_head_dim(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Each tensor with its last dimension filled up with zeros to a multiple of 8.

    Zeros in query and key add nothing to a score; those in value give outputs of zero, which the
    caller cuts off. Exact, as long as the scale is given and not taken from the padded size.
    """

    def fill(tensor: Tensor) -> Tensor:
        missing = -tensor.shape[-1] % STEP
        return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor

    return tuple(map(fill, tensors))


def cut_head_dim(tensor: Tensor, head_dim: int) -> Tensor:
    """The first `head_dim` columns of the last dimension: undoes `pad_head_dim`."""
    return tensor if tensor.shape[-1] == head_dim else tensor[..., :head_dim]
