"""attention_kvcache looks before it writes: a call that raises leaves the cache as it was."""

from typing import Any

import pytest
import torch

import flashkern as fk

PROMPTS, BEAMS, HEADS, ROOM, DIM = 2, 3, 2, 16, 32
ROWS = PROMPTS * BEAMS


def _beams() -> dict[str, Any]:
    shared = torch.randn(PROMPTS, HEADS, 5, DIM)
    table = torch.arange(BEAMS, dtype=torch.int32).view(1, BEAMS, 1)
    return {
        "beam_table": table.expand(PROMPTS, BEAMS, ROOM).clone(),
        "shared_k": shared,
        "shared_v": shared,
        "cache_lengths": torch.full((ROWS,), 4, dtype=torch.int32),
    }


def _pages() -> dict[str, Any]:
    table = torch.arange(2 * ROWS, dtype=torch.int32).view(ROWS, 2)
    return {"page_table": table, "cache_lengths": torch.full((ROWS,), 9, dtype=torch.int32)}


def _refused(
    cache: torch.Tensor, change: dict[str, Any], error: type[Exception], text: str
) -> None:
    query, new = torch.randn(ROWS, 2 * HEADS, 1, DIM), torch.ones(ROWS, HEADS, 1, DIM)
    query.requires_grad_(change.pop("query_requires_grad", False))
    k_cache, v_cache = cache.clone(), cache.clone()
    with pytest.raises(error, match=text):
        fk.attention_kvcache(query, k_cache, v_cache, k=new, v=new, **change)
    assert torch.equal(k_cache, cache) and torch.equal(v_cache, cache)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"query_requires_grad": True}, NotImplementedError, "beams have no backward pass"),
        ({"sinks": torch.zeros(4, requires_grad=True)}, NotImplementedError, "no backward pass"),
        ({"beam_table": torch.full((PROMPTS, BEAMS, ROOM), 3)}, RuntimeError, "beams from 0 to 2"),
        ({"shared_lengths": torch.tensor([5, 6])}, RuntimeError, r"lie in \[0, 5\], got 6"),
        ({"cache_lengths": torch.tensor([4, 4, 4, 4, 5, 4])}, RuntimeError, "equal for all beams"),
        ({"cache_lengths": torch.full((ROWS,), ROOM)}, RuntimeError, "leave room for 1"),
    ],
)
def test_beams(change: dict[str, Any], error: type[Exception], text: str) -> None:
    _refused(torch.randn(ROWS, HEADS, ROOM, DIM), {**_beams(), **change}, error, text)


def test_a_table_is_read_up_to_the_appended_token() -> None:
    options = _beams()
    options["beam_table"][1, 2, 4] = BEAMS  # the place of the appended token
    cache = torch.randn(ROWS, HEADS, ROOM, DIM)
    _refused(cache, dict(options), RuntimeError, "beams from 0 to 2")
    options["beam_table"][1, 2, 4:] = torch.tensor([2] + [BEAMS] * 11)  # behind it: nobody looks
    new = torch.ones(ROWS, HEADS, 1, DIM)
    query = torch.randn(ROWS, HEADS, 1, DIM)
    fk.attention_kvcache(query, cache, cache.clone(), k=new, v=new, **options)
    assert torch.equal(cache[:, :, 4:5], new)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"query_requires_grad": True}, NotImplementedError, "a paged cache has no backward pass"),
        ({"page_table": torch.tensor([[99, 0]] * ROWS)}, RuntimeError, "page_table must hold"),
        ({"page_table": torch.tensor([[0, 99]] * ROWS)}, RuntimeError, "page_table must hold"),
    ],
)
def test_pages(change: dict[str, Any], error: type[Exception], text: str) -> None:
    _refused(torch.randn(2 * ROWS, HEADS, 8, DIM), {**_pages(), **change}, error, text)


def test_a_paged_cache_refuses_a_gradient_in_the_forward_pass() -> None:
    cache, query = torch.randn(2 * ROWS, HEADS, 8, DIM), torch.randn(ROWS, HEADS, 1, DIM)
    with pytest.raises(NotImplementedError, match="a paged cache has no backward pass"):
        fk.attention_kvcache(query.requires_grad_(), cache, cache, **_pages())
    with torch.no_grad():
        fk.attention_kvcache(query, cache, cache, **_pages())
