"""Tensors without storage, which become ordinary ones where anybody touches them.

Code that knows such a class reads its fields; all other code sees the right values, as any tensor
operation, a slice for instance, works on `dense()`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class Virtual(Tensor):
    """What has the shape, dtype and device of a tensor, and says how to make one."""

    def dense(self) -> Tensor:
        """The same as an ordinary tensor."""
        raise NotImplementedError

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(Virtual, lambda x: x.dense(), (args, kwargs or {}))
        return func(*args, **kwargs)
