"""The operators on the arrays of another library, through DLPack: memory is shared, not copied."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


def _each(value: Any, convert: Callable[[Any], Any]) -> Any:
    """``convert`` of a value, or of every element of lists and (named) tuples."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_each(item, convert) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(_each(item, convert) for item in value)
    return convert(value)


def _tensor(value: Any) -> Any:
    is_array = hasattr(value, "__dlpack__") and not isinstance(value, Tensor)
    return torch.from_dlpack(value) if is_array else value


def on_arrays(
    operator: Callable[..., Any],
    from_dlpack: Callable[[Tensor], Any],
    scope: Callable[[], AbstractContextManager[Any]],
) -> Callable[..., Any]:
    """``operator`` for arrays: takes what has ``__dlpack__``, returns what ``from_dlpack`` makes.

    It runs inside ``scope()``, where the library's stream is torch's current one, and without
    gradients. Tensors are taken too; all that is returned is an array.
    """

    def array(value: Any) -> Any:
        return from_dlpack(value) if isinstance(value, Tensor) else value

    @functools.wraps(operator)
    def call(*args: Any, **kwargs: Any) -> Any:
        with scope(), torch.no_grad():
            inputs = [_each(value, _tensor) for value in args]
            named = {name: _each(value, _tensor) for name, value in kwargs.items()}
            return _each(operator(*inputs, **named), array)

    return call
