"""Padding on one side and packed sequences run as attention_varlen does, to sdpa's results."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import flashkern
import flashkern.integrations.transformers as fkt
from tests.integrations.test_transformers import assert_same, pair
from tests.integrations.tiny import inputs

HEADS, KV_HEADS, DIM = 4, 2, 16


@pytest.fixture(autouse=True)
def enabled() -> Any:
    fkt.enable()
    yield
    fkt.disable()


@pytest.fixture
def packed_calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The cu_seqlens_k of each call of attention_varlen."""
    seen: list[Tensor] = []
    real = flashkern.attention_varlen

    def spy(query: Any, key: Any, value: Any, cu_q: Any, cu_k: Any, *rest: Any, **more: Any) -> Any:
        seen.append(cu_k)
        return real(query, key, value, cu_q, cu_k, *rest, **more)

    monkeypatch.setattr(flashkern, "attention_varlen", spy)
    return seen


class Layer(torch.nn.Module):
    is_causal = True
    num_key_value_groups = HEADS // KV_HEADS


def tensors(batch: int, rows: int, keys: int, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    """query, key and value as a model has them: tokens outside, or heads (a cache), or a window
    into a longer cache."""
    torch.manual_seed(0)
    query = torch.randn(batch, rows, HEADS, DIM).transpose(1, 2)
    room = keys + 7 if layout == "room" else keys
    pair = torch.randn(2, batch, room, KV_HEADS, DIM).transpose(2, 3)
    if layout != "tokens":
        pair = pair.contiguous()
        query = query if layout == "room" else query.contiguous()
    return query, pair[0][:, :, :keys], pair[1][:, :, :keys]


def masks(
    function: Callable, batch: int, rows: int, keys: int, real: Tensor | None, **more: Any
) -> Any:
    """The mask that flashkern is given, and transformers' own for sdpa."""
    packed = real is None
    sizes: dict[str, Any] = {
        "batch_size": batch, "q_length": rows, "kv_length": keys, "q_offset": keys - rows,
        "kv_offset": 0, "mask_function": function, "attention_mask": real,
        "allow_is_causal_skip": not packed, **more,
    }  # fmt: skip
    theirs = masking_utils.sdpa_mask(**{**sizes, "allow_is_causal_skip": False})
    return fkt.attention_mask(**sizes), theirs


def packed_masks(band: str, positions: Tensor) -> Any:
    """`masks` of packed sequences."""
    numbers = masking_utils.find_packed_sequence_indices(positions)
    assert numbers is not None
    function = masking_utils.packed_sequence_compatibility_function(
        FUNCTIONS[band], positions, numbers
    )
    batch, length = positions.shape
    return masks(function, batch, length, length, None)


def run(forward: Callable, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    return forward(Layer(), query, key, value, mask, scaling=0.3)[0]


FUNCTIONS = {
    "causal": masking_utils.causal_mask_function,
    "window": masking_utils.sliding_window_causal_mask_function(5),
    "all": masking_utils.bidirectional_mask_function,
    "chunks": masking_utils.chunked_causal_mask_function(3, torch.zeros(1, dtype=torch.int64)),
    "both": masking_utils.sliding_window_bidirectional_mask_function(3),
}


@pytest.mark.parametrize("layout", ["tokens", "heads", "room"])
@pytest.mark.parametrize("rows", [1, 6, 13])
@pytest.mark.parametrize("band", ["causal", "window", "all", "both"])
def test_left_padding_is_skipped(
    band: str, rows: int, layout: str, packed_calls: list[Tensor]
) -> None:
    batch, keys = 4, 13
    real = torch.arange(keys) >= torch.tensor([0, 3, 9, 13])[:, None]  # the last row is all padding
    query, key, value = tensors(batch, rows, keys, layout)
    ours, theirs = masks(FUNCTIONS[band], batch, rows, keys, real)
    expected = run(sdpa_attention_forward, query, key, value, theirs)
    seen = theirs.any(-1).transpose(1, 2).unsqueeze(-1)  # (batch, rows, 1, 1): sees some key
    packs = rows > 1 or band in ("causal", "all")  # one query's window is a row of keys, masked
    for hidden in (key, value) if packs else ():
        hidden.masked_fill_(~real[:, None, :, None], torch.nan)  # nothing of it may be read
    got = run(fkt.attention_forward, query, key, value, ours)
    assert len(packed_calls) == packs
    torch.testing.assert_close(got, expected.masked_fill(~seen, 0), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("layout", ["tokens", "heads", "room"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("band", ["causal", "window", "all", "both"])
def test_queries_of_padding_are_skipped(
    band: str, side: str, layout: str, packed_calls: list[Tensor]
) -> None:
    batch, keys = 4, 13
    lengths = torch.tensor([13, 10, 4, 0])[:, None]
    place = torch.arange(keys)
    real = place < lengths if side == "right" else place >= keys - lengths
    query, key, value = tensors(batch, keys, keys, layout)
    encoder = SimpleNamespace(is_encoder_decoder=False)
    ours, theirs = masks(FUNCTIONS[band], batch, keys, keys, real, config=encoder)
    expected = run(sdpa_attention_forward, query, key, value, theirs)
    for hidden in (query, key, value):  # nothing of it may be read
        hidden.masked_fill_(~real[:, None, :, None], torch.nan)
    got = run(fkt.attention_forward, query, key, value, ours)
    assert len(packed_calls) == 1
    expected = expected.masked_fill(~real[:, :, None, None], 0)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_generation_reads_the_last_output_be_it_of_padding(packed_calls: list[Tensor]) -> None:
    batch, keys = 2, 9
    real = torch.arange(keys) < torch.tensor([9, 4])[:, None]
    query, key, value = tensors(batch, keys, keys, "tokens")
    ours, theirs = masks(FUNCTIONS["causal"], batch, keys, keys, real)
    expected = run(sdpa_attention_forward, query, key, value, theirs)
    got = run(fkt.attention_forward, query, key, value, ours)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
    assert not packed_calls


@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_of_a_padded_batch(side: str, packed_calls: list[Tensor]) -> None:
    batch, keys = 3, 13
    lengths = torch.tensor([13, 10, 4])[:, None]
    place = torch.arange(keys)
    real = place < lengths if side == "right" else place >= keys - lengths
    inputs = tensors(batch, keys, keys, "tokens")
    ours, theirs = masks(FUNCTIONS["causal"], batch, keys, keys, real)
    weight = torch.linspace(-1, 1, DIM) * real[:, :, None, None]
    results = []
    for forward, mask in ((fkt.attention_forward, ours), (sdpa_attention_forward, theirs)):
        leaves = [t.detach().requires_grad_() for t in inputs]
        (run(forward, *leaves, mask) * weight).sum().backward()
        results.append([leaf.grad for leaf in leaves])
    assert len(packed_calls) == 1
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_queries_of_cross_attention_are_never_padding(packed_calls: list[Tensor]) -> None:
    batch, keys = 2, 9
    real = torch.arange(keys) < torch.tensor([9, 4])[:, None]
    query, key, value = tensors(batch, keys, keys, "tokens")
    for config in (None, SimpleNamespace(is_encoder_decoder=True)):
        ours, theirs = masks(FUNCTIONS["all"], batch, keys, keys, real, config=config)
        expected = run(sdpa_attention_forward, query, key, value, theirs)
        got = run(fkt.attention_forward, query, key, value, ours)
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
    assert not packed_calls


def test_left_padding_that_cannot_be_packed_is_masked(packed_calls: list[Tensor]) -> None:
    batch, keys = 2, 9
    real = torch.arange(keys) >= torch.tensor([0, 4])[:, None]
    query, key, value = tensors(batch, keys, keys, "heads")
    ours, theirs = masks(FUNCTIONS["causal"], batch, keys, keys, real)
    shared = key[:1].expand(batch, -1, -1, -1)  # one row of memory for all
    other = torch.cat([value, value], 2)[:, :, :keys]  # a step of its own
    grown = key.clone().requires_grad_()
    for k, v in ((shared, shared), (key, other), (grown, value)):
        expected = run(sdpa_attention_forward, query, k, v, theirs)
        got = run(fkt.attention_forward, query, k, v, ours)
        torch.testing.assert_close(got[:, 4:], expected[:, 4:], atol=2e-6, rtol=1e-5)
    fkt.attention_forward(Layer(), query, key, value, ours, dropout=0.5)
    assert not packed_calls


def test_a_position_bias_meets_packed_sequences_as_a_mask(packed_calls: list[Tensor]) -> None:
    positions = torch.cat([torch.arange(5), torch.arange(8)])[None]
    ours, theirs = packed_masks("causal", positions)
    query, key, value = tensors(1, 13, 13, "tokens")
    bias = torch.randn(1, HEADS, 13, 13)
    got, expected = (
        forward(Layer(), query, key, value, mask, scaling=0.3, position_bias=bias)[0]
        for forward, mask in ((fkt.attention_forward, ours), (sdpa_attention_forward, theirs))
    )
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
    assert not packed_calls


@pytest.mark.parametrize("layout", ["tokens", "heads"])
@pytest.mark.parametrize("band", ["causal", "window"])
def test_packed_sequences_are_sequences(band: str, layout: str, packed_calls: list[Tensor]) -> None:
    batch, length = 2, 13
    positions = torch.stack(
        [
            torch.cat([torch.arange(5), torch.arange(2, 3), torch.arange(7)]),
            torch.cat([torch.arange(4, 11), torch.arange(6)]),  # need not begin at 0
        ]
    )
    ours, theirs = packed_masks(band, positions)
    assert torch.equal(ours.dense(), theirs)
    query, key, value = tensors(batch, length, length, layout)
    results = []
    for forward, mask in ((fkt.attention_forward, ours), (sdpa_attention_forward, theirs)):
        leaves = [t.detach().requires_grad_() for t in (query, key, value)]
        out = run(forward, *leaves, mask)
        (out * torch.linspace(-1, 1, out.shape[-1])).sum().backward()
        results.append([out, *(leaf.grad for leaf in leaves)])
    assert [cu.tolist() for cu in packed_calls] == [[0, 5, 6, 13, 20, 26]]
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_packed_sequences_in_chunks_are_left_to_a_dense_mask(packed_calls: list[Tensor]) -> None:
    positions = torch.cat([torch.arange(5), torch.arange(8)])[None]
    ours, theirs = packed_masks("chunks", positions)
    assert type(ours) is Tensor and torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_models_with_packed_batches(name: str, packed_calls: list[Tensor]) -> None:
    theirs, ours = pair(name)
    ids = inputs("decoder")[0]["input_ids"]
    positions = torch.cat([torch.arange(5), torch.arange(8)]).expand(3, -1)
    given = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    with torch.no_grad():
        assert_same(ours(**given).logits, theirs(**given).logits, torch.ones(3, 13))
    assert len(packed_calls) == 2


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_left_padded_batch_is_decoded_without_its_padding(
    name: str, packed_calls: list[Tensor]
) -> None:
    theirs, ours = pair(name)
    given, _ = inputs("decoder", "left")
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(ours.generate(**given, **options), theirs.generate(**given, **options))
    assert len(packed_calls) == 2 * 6  # layers, steps
