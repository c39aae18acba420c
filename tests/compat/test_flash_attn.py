"""flash_attn's functions mean what flash_attn says: each against the definition."""

import pytest
import torch

from flashkern import reference
from flashkern.compat import flash_attn as fa


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, requires_grad=True)


def definition(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> tuple:
    output, lse = reference.attention(*(t.transpose(1, 2) for t in (q, k, v)), **options)
    return output.transpose(1, 2), lse


def test_dense_and_packed() -> None:
    qkv = draw(2, 12, 3, 4, 32)
    q, k, v = qkv.unbind(2)
    slopes = torch.rand(4)
    options = {"causal": True, "window_size": (5, 0), "softcap": 4.0, "alibi_slopes": slopes}
    want = definition(q, k, v, causal=True, window=(5, 0), softcap=4.0, alibi_slopes=slopes)
    got = fa.flash_attn_func(q, k, v, **options, return_attn_probs=True)
    torch.testing.assert_close(got[:2], want, rtol=1e-5, atol=1e-5)
    assert got[2] is None and got[0].is_contiguous()
    for other in (
        fa.flash_attn_qkvpacked_func(qkv, **options),
        fa.flash_attn_kvpacked_func(q, qkv[:, :, 1:], **options),
    ):
        assert torch.equal(other, got[0])
    mine, theirs = (torch.autograd.grad(o.sum(), qkv, retain_graph=True) for o in (got[0], want[0]))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_causal_ends_at_the_last_key() -> None:
    q, k, v = draw(1, 3, 2, 16), draw(1, 7, 2, 16), draw(1, 7, 2, 16)
    want, _ = definition(q, k, v, causal="bottom_right")
    torch.testing.assert_close(fa.flash_attn_func(q, k, v, causal=True), want)


def test_varlen() -> None:
    qkv = torch.randn(12, 3, 4, 32)
    starts = torch.tensor([0, 5, 12], dtype=torch.int32)
    want, lse = reference.attention_varlen(*qkv.unbind(1), starts, starts, causal=True)
    got = fa.flash_attn_varlen_qkvpacked_func(qkv, starts, 7, causal=True, return_attn_probs=True)
    torch.testing.assert_close(got[:2], (want, lse), rtol=1e-5, atol=1e-5)
    kv = fa.flash_attn_varlen_kvpacked_func(
        qkv[:, 0], qkv[:, 1:], starts, starts, 7, 7, causal=True
    )
    assert torch.equal(kv, got[0])


@pytest.mark.parametrize("interleaved", [False, True])
def test_cache_with_rotary(interleaved: bool) -> None:
    q, k, v = (torch.randn(2, 3, 2, 32) for _ in range(3))
    caches = [torch.randn(2, 40, 2, 32) for _ in range(2)]
    lengths = torch.tensor([4, 30], dtype=torch.int32)
    angles = torch.arange(40.0).view(-1, 1) * torch.rand(8)
    turn = torch.polar(torch.ones(40, 8), angles)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        parts = x[..., :16].unflatten(-1, (8, 2) if interleaved else (2, 8))
        z = torch.view_as_complex((parts if interleaved else parts.mT).contiguous())
        places = lengths.view(-1, 1).long() + torch.arange(3)
        pairs = torch.view_as_real(z * turn[places].unsqueeze(2))
        return torch.cat([(pairs if interleaved else pairs.mT).flatten(-2), x[..., 16:]], -1)

    want, _ = reference.attention_kvcache(
        *(t.transpose(1, 2) for t in (rotate(q), *caches)),
        cache_lengths=lengths, k=rotate(k).transpose(1, 2), v=v.transpose(1, 2), causal=True,
    )  # fmt: skip
    got = fa.flash_attn_with_kvcache(
        q, *caches, k, v, angles.cos(), angles.sin(), lengths, causal=True,
        rotary_interleaved=interleaved,
    )  # fmt: skip
    torch.testing.assert_close(got, want.transpose(1, 2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(caches[0][1, 30:33], rotate(k)[1], rtol=1e-5, atol=1e-6)


def test_cache_batch_index_and_pages() -> None:
    q, caches = torch.randn(2, 1, 4, 32), [torch.randn(5, 16, 2, 32) for _ in range(2)]
    rows = torch.tensor([3, 1], dtype=torch.int32)
    want = fa.flash_attn_with_kvcache(q, *(c[rows.long()] for c in caches), cache_seqlens=9)
    got = fa.flash_attn_with_kvcache(q, *caches, cache_seqlens=9, cache_batch_idx=rows)
    torch.testing.assert_close(got, want)
    table = rows.view(2, 1)
    torch.testing.assert_close(
        fa.flash_attn_with_kvcache(q, *caches, cache_seqlens=9, block_table=table), want
    )


def test_what_is_not_there_is_refused() -> None:
    q, cache = torch.randn(1, 1, 2, 32), torch.randn(1, 8, 2, 32)
    with pytest.raises(NotImplementedError, match="cache_leftpad"):
        fa.flash_attn_with_kvcache(q, cache, cache, cache_leftpad=torch.zeros(1))
    with pytest.raises(ValueError, match="k and v must come together"):
        fa.flash_attn_with_kvcache(q, cache, cache, k=q, cache_seqlens=0)
