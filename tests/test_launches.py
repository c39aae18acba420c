"""How many kernels a call launches, where the emulator counts them."""

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch

import flashkern as fk
from flashkern import _ops


@pytest.fixture
def launched(backend: str) -> Callable[..., int]:
    """Calls a function; returns the launches that it cost."""
    if backend != "emulated":
        pytest.skip("nobody counts launches")
    count = ctypes.CDLL(str(_ops.LIBRARY)).fk_launches
    count.restype = ctypes.c_uint64

    def run(function: Callable[..., Any], *args: Any, **options: Any) -> int:
        before = count()
        function(*args, **options)
        return count() - before

    return run


def heads(*shape: int) -> list[torch.Tensor]:
    batch, rows, keys = shape
    return [torch.randn(batch, n, size, 32) for n, size in ((4, rows), (2, keys), (2, keys))]


def test_attention(launched: Callable[..., int]) -> None:
    assert launched(fk.attention, *heads(2, 70, 90), causal=True) == 1
    assert launched(fk.attention, *heads(2, 1, 90)) == 1
    assert launched(fk.attention, *heads(1, 1, 2000)) == 2  # splits of the keys, and their merge


def test_attention_varlen(launched: Callable[..., int]) -> None:
    starts = torch.tensor([0, 5, 5, 90], dtype=torch.int32)
    packed = [torch.randn(90, n, 32) for n in (4, 2, 2)]
    assert launched(fk.attention_varlen, *packed, starts, starts, 85, 85, causal=True) == 1


def test_attention_kvcache(launched: Callable[..., int]) -> None:
    query, *cache = heads(2, 1, 90)
    lengths, new = torch.tensor([3, 80]), torch.randn(2, 2, 1, 32)
    assert launched(fk.attention_kvcache, query, *cache, cache_lengths=lengths) == 1
    options = {"cache_lengths": lengths, "k": new, "v": new}
    assert launched(fk.attention_kvcache, query, *cache, **options) == 2  # the append, apart


def test_attention_over_beams(launched: Callable[..., int]) -> None:
    query, *cache = heads(6, 1, 90)
    options: dict[str, Any] = {
        "cache_lengths": torch.full((6,), 7),
        "beam_table": torch.zeros(2, 3, 90, dtype=torch.int32),
    }
    assert launched(fk.attention_kvcache, query, *cache, **options) == 1
    options |= {"shared_k": torch.randn(2, 2, 50, 32), "shared_v": torch.randn(2, 2, 50, 32)}
    assert launched(fk.attention_kvcache, query, *cache, **options) == 3  # shared, own, their merge


def test_attention_backward(launched: Callable[..., int]) -> None:
    query, key, value = (t.requires_grad_() for t in heads(2, 70, 90))
    loss = fk.attention(query, key, value, causal=True).sum()
    assert launched(loss.backward) == 2  # delta; dQ, dK and dV
    sinks = torch.randn(4, requires_grad=True)
    loss = fk.attention(query, key, value, causal=True, sinks=sinks).sum()
    assert launched(loss.backward) == 3


@pytest.mark.parametrize("rows", [1, 16, 64])
def test_lora_decode(launched: Callable[..., int], rows: int) -> None:
    x, weight = (torch.randn(n, 64).bfloat16() for n in (rows, 96))
    for rank, dtype, launches in (
        (16, torch.float32, 1),
        (
            17,
            torch.float32,
            2,
        ),  # h comes first: each block reads all of A
        (32, torch.bfloat16, 1),
        (33, torch.bfloat16, 2),
    ):
        a, b = torch.randn(rank, 64).to(dtype), torch.randn(96, rank).to(dtype)
        assert launched(fk.lora_linear, x, weight, a, b) == launches


@pytest.mark.parametrize("adapters,depth", [(1, 64), (30, 64), (30, 600)])
def test_lora_of_several_adapters(launched: Callable[..., int], adapters: int, depth: int) -> None:
    """However many, and however h's sums are cut: the rows' order, h, and y."""
    x, weight = (torch.randn(n, depth).bfloat16() for n in (70, 96))
    a, b = torch.randn(adapters, 8, depth), torch.randn(adapters, 96, 8)
    ids = torch.arange(70) % (adapters + 1) - 1
    assert launched(fk.lora_linear_multi, x, weight, a, b, ids) == 3


def test_beam_topk(launched: Callable[..., int]) -> None:
    for beams, vocab in ((1, 50), (4, 5000), (64, 900)):
        logits = torch.randn(2, beams, vocab)
        assert launched(fk.beam_topk, logits, torch.zeros(2, beams), 2 * beams) == 1
        options = {
            "trie": fk.Trie.from_sequences([[1, 2], [3]]),
            "nodes": torch.zeros(2, beams, dtype=torch.int64),
            "excluded": torch.ones(2, beams, 1, dtype=torch.int64),
        }
        assert launched(fk.beam_topk, logits, torch.zeros(2, beams), 2 * beams, **options) == 1
