"""One call of each operator as generation and training make it: a function, inputs, other inputs.

The inputs are tensors of the default device that a test may change in place; `changed` holds what
they are changed to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import flashkern as fk


@dataclass
class Call:
    """function(*inputs) gives the outputs as a flat sequence of tensors."""

    name: str
    kernels: tuple[str, ...]
    function: Callable[..., Sequence[Tensor]]
    make: Callable[[], list[Tensor]]  # inputs, drawn anew at each call


def _half(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def _lengths(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _random_lengths(low: int, high: int) -> Tensor:
    return torch.randint(low, high, (2,), dtype=torch.int32)


def _qkv(rows: int, columns: int) -> list[Tensor]:
    return [_half(2, 4, rows, 64), _half(2, 2, columns, 64), _half(2, 2, columns, 64)]


def _prefill(q: Tensor, k: Tensor, v: Tensor) -> Sequence[Tensor]:
    return fk.attention(q, k, v, causal=True, return_lse=True)


def _ragged(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Sequence[Tensor]:
    return fk.attention(q, k, v, kv_lengths=lengths, return_lse=True)


def _packed(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Sequence[Tensor]:
    return [fk.attention_varlen(q, k, v, starts, starts, 90, 90, causal=True)]


def _cached(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor
) -> Sequence[Tensor]:
    out = fk.attention_kvcache(q, k_cache, v_cache, cache_lengths=lengths, k=k, v=v, causal=True)
    return [out, k_cache, v_cache]


def _paged(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, pages: Tensor):
    return [fk.attention_kvcache(q, k_cache, v_cache, cache_lengths=lengths, page_table=pages)]


def _beams(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    table: Tensor,
    shared_k: Tensor,
    shared_v: Tensor,
) -> Sequence[Tensor]:
    options = {"beam_table": table, "shared_k": shared_k, "shared_v": shared_v}
    return [fk.attention_kvcache(q, k_cache, v_cache, cache_lengths=lengths, **options)]


def _training(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> Sequence[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = fk.attention(*leaves, causal=True)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def _lora(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Sequence[Tensor]:
    return [fk.lora_linear(x, w, a, b, scaling=2.0)]


def _lora_training(x: Tensor, w: Tensor, a: Tensor, b: Tensor, grad: Tensor) -> Sequence[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, a, b)]
    y = fk.lora_linear(leaves[0], w, *leaves[1:], scaling=2.0)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def _lora_multi(x: Tensor, w: Tensor, a: Tensor, b: Tensor, ids: Tensor) -> Sequence[Tensor]:
    return [fk.lora_linear_multi(x, w, a, b, ids, scaling=2.0)]


def _adapter(rows: int) -> list[Tensor]:
    return [_half(rows, 256), _half(192, 256) / 16, torch.randn(16, 256) / 16, torch.randn(192, 16)]


def _beam(logits: Tensor, scores: Tensor) -> Sequence[Tensor]:
    return fk.beam_topk(logits, scores, 8)


FORWARD, BACKWARD = "attention_forward", "attention_backward"
LORA, LORA_BACKWARD = "lora_linear", "lora_linear_backward"
CALLS = [
    Call("attention", (FORWARD,), _prefill, lambda: _qkv(130, 130)),
    Call("lengths", (FORWARD,), _ragged, lambda: [*_qkv(70, 150), _random_lengths(1, 151)]),
    Call(
        "varlen",
        (FORWARD,),
        _packed,
        lambda: [_half(150, 4, 64), _half(150, 2, 64), _half(150, 2, 64), _lengths(0, 61, 150)],
    ),
    Call(
        "decode",
        (FORWARD, "attention_append_kv"),
        _cached,
        lambda: [*_qkv(1, 1), _half(2, 2, 700, 64), _half(2, 2, 700, 64), _random_lengths(1, 699)],
    ),
    Call(
        "paged decode",
        (FORWARD,),
        _paged,
        lambda: [
            _half(2, 4, 1, 64),
            _half(64, 2, 16, 64),
            _half(64, 2, 16, 64),
            _random_lengths(1, 513),
            torch.randperm(64, dtype=torch.int32).view(2, 32),
        ],
    ),
    Call(
        "decode of beams",
        ("attention_beams",),
        _beams,
        lambda: [
            _half(8, 4, 1, 64),
            _half(8, 2, 90, 64),
            _half(8, 2, 90, 64),
            torch.full((8,), 77, dtype=torch.int32),
            torch.randint(4, (2, 4, 90), dtype=torch.int32),
            _half(2, 2, 700, 64),
            _half(2, 2, 700, 64),
        ],
    ),
    Call(
        "attention training",
        (FORWARD, BACKWARD),
        _training,
        lambda: [*_qkv(130, 130), _half(2, 4, 130, 64)],
    ),
    Call("lora decode", (LORA,), _lora, lambda: _adapter(3)),
    Call("lora", (LORA,), _lora, lambda: _adapter(300)),
    Call(
        "lora training",
        (LORA, LORA_BACKWARD),
        _lora_training,
        lambda: [*_adapter(300), _half(300, 192)],
    ),
    Call(
        "lora of several adapters",
        (LORA,),
        _lora_multi,
        lambda: [
            _half(40, 256),
            _half(192, 256) / 16,
            torch.randn(3, 16, 256) / 16,
            torch.randn(3, 192, 16),
            torch.randint(-1, 3, (40,)),
        ],
    ),
    Call("beam", ("beam_topk",), _beam, lambda: [_half(2, 4, 30000), torch.randn(2, 4)]),
]
