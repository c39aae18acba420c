"""flashkern's operators on CuPy arrays: no copies, on CuPy's current stream.

The functions are those of :mod:`flashkern`, argument for argument, with CuPy arrays in place of
tensors, lists of arrays in place of lists of tensors. There are no gradients. An append to a
key-value cache writes into the caller's array. dtypes are those that CuPy passes through DLPack.

A call is queued on CuPy's current stream and device and does not wait for them. Results are
memory of torch's allocator, which takes it back in the order of that same stream when the array
is gone; on any other stream an array must be waited for, as always in CuPy.

Example:
    >>> import cupy as cp, flashkern.compat.cupy as fc            # doctest: +SKIP
    >>> query = cp.random.standard_normal((1, 8, 1024, 64), dtype=cp.float32)
    >>> output = fc.attention(query, query, query, causal=True)   # a CuPy array
"""

from contextlib import AbstractContextManager
from typing import Any

import cupy
import torch

import flashkern
from flashkern.compat._arrays import on_arrays

__all__ = [
    "attention",
    "attention_kvcache",
    "attention_varlen",
    "beam_topk",
    "lora_linear",
    "lora_linear_multi",
    "merge_attention",
    "merge_topk",
    "scaled_dot_product_attention",
]


def _scope() -> AbstractContextManager[Any]:
    """Makes CuPy's current stream torch's own."""
    device = cupy.cuda.runtime.getDevice()
    stream = cupy.cuda.get_current_stream().ptr
    return torch.cuda.stream(torch.cuda.ExternalStream(stream, device=device))


def _wrapped(name: str) -> Any:
    return on_arrays(getattr(flashkern, name), cupy.from_dlpack, _scope)


attention = _wrapped("attention")
attention_kvcache = _wrapped("attention_kvcache")
attention_varlen = _wrapped("attention_varlen")
beam_topk = _wrapped("beam_topk")
lora_linear = _wrapped("lora_linear")
lora_linear_multi = _wrapped("lora_linear_multi")
merge_attention = _wrapped("merge_attention")
merge_topk = _wrapped("merge_topk")
scaled_dot_product_attention = _wrapped("scaled_dot_product_attention")
