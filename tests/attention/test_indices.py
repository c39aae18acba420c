"""int64 indices that int32 cannot hold are out of range, as they would be in int32."""

from typing import Any

import pytest
import torch

import flashkern as fk

FAR = 2**32


def test_lengths_far_beyond_the_keys_see_them_all() -> None:
    q = torch.randn(2, 2, 4, 16)
    want = fk.attention(q, q, q)
    for lengths in ([FAR, FAR + 1], [4, 2**31]):
        got = fk.attention(q, q, q, kv_lengths=torch.tensor(lengths))
        assert torch.equal(got, want)


def test_lengths_below_zero_see_nothing() -> None:
    q = torch.randn(2, 2, 4, 16)
    got = fk.attention(q, q, q, kv_lengths=torch.tensor([-1, 4 - FAR]))
    assert torch.equal(got, torch.zeros_like(q))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"cache_lengths": torch.tensor([FAR + 3])}, "cache_lengths must"),
        ({"page_table": torch.tensor([[FAR + 1, 0]])}, "page_table must hold pages"),
        ({"beam_table": torch.full((1, 1, 16), FAR)}, "beam_table must hold beams"),
    ],
)
@pytest.mark.parametrize("append", [False, True])
def test_caches(change: dict[str, Any], text: str, append: bool) -> None:
    cache = torch.zeros(1, 2, 16, 16)
    if "page_table" in change:
        cache = cache.view(2, 2, 8, 16)
    new = torch.randn(1, 2, 1, 16)
    options = {"cache_lengths": torch.tensor([3]), **change}
    options |= {"k": new, "v": new} if append else {}
    with pytest.raises(RuntimeError, match=text):
        fk.attention_kvcache(new, cache, cache.clone(), **options)


def test_packed_sequences() -> None:
    q, starts = torch.randn(12, 2, 16), torch.tensor([0, 5, 12])
    for far in (starts + FAR, starts - FAR):
        with pytest.raises(RuntimeError, match="cu_seqlens_q must"):
            fk.attention_varlen(q, q, q, far, starts, 7, 7)
        with pytest.raises(RuntimeError, match="cu_seqlens_k must"):
            fk.attention_varlen(q, q, q, starts, far, 7, 7)
