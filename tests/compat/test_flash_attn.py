"""flash_attn's functions mean what flash_attn says: each against the definition."""

import inspect

import pytest
import torch

from flashkern import reference
from flashkern.compat import flash_attn as fa


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, requires_grad=True)


def definition(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> tuple:
    output, lse = reference.attention(*(t.transpose(1, 2) for t in (q, k, v)), **options)
    return output.transpose(1, 2), lse


def test_dense_and_packed(backend: str) -> None:
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


PAGED = [{}, {"causal": True}, {"window_size": (4, 1), "softcap": 3.0}]


@pytest.mark.parametrize("options", PAGED)
@pytest.mark.parametrize("slopes", [None, (4,), (3, 4)])
def test_varlen_with_pages(options: dict, slopes: tuple[int, ...] | None, backend: str) -> None:
    """Page by page what the packed call gives, one sequence without queries among them."""
    starts_q = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
    starts_k = torch.tensor([0, 30, 37, 40], dtype=torch.int32)
    table = torch.tensor([[7, 2], [4, 0], [1, 3]], dtype=torch.int32)
    q, caches = torch.randn(14, 4, 32), [torch.randn(8, 16, 2, 32) for _ in range(2)]
    lengths = zip(table.long(), starts_k.diff().tolist(), strict=True)
    keep = [(pages, n) for pages, n in lengths]
    k, v = (torch.cat([c[pages].flatten(0, 1)[:n] for pages, n in keep]) for c in caches)
    if slopes is not None:
        options = {**options, "alibi_slopes": torch.rand(slopes)}
    places = (starts_q, starts_k, 7, 30)
    want = fa.flash_attn_varlen_func(q[:12], k, v, *places, **options, return_attn_probs=True)
    got = fa.flash_attn_varlen_func(
        q, *caches, *places, **options, return_attn_probs=True, block_table=table
    )
    torch.testing.assert_close(got[0][:12], want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1][:, :12], want[1], rtol=1e-5, atol=1e-5)
    assert (got[0][12:] == 0).all() and (got[1][:, 12:] == -torch.inf).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("paged", [False, True])
def test_left_padding(causal: bool, rows: int, paged: bool) -> None:
    """Padding is not seen, and moves neither the diagonal nor where new tokens go."""
    q, k, v = torch.randn(3, rows, 4, 32), torch.randn(3, rows, 2, 32), torch.randn(3, rows, 2, 32)
    caches = [torch.randn(3, 48, 2, 32) for _ in range(2)]
    lengths = torch.tensor([3, 20, 30], dtype=torch.int32)
    padding = torch.tensor([2, 0, 30], dtype=torch.int32)
    seen = torch.arange(48) >= padding.view(3, 1, 1, 1)
    want, lse = reference.attention_kvcache(
        *(t.transpose(1, 2) for t in (q, *caches)),
        cache_lengths=lengths, k=k.transpose(1, 2), v=v.transpose(1, 2), causal=causal, bias=seen,
    )  # fmt: skip
    table = torch.randperm(9).view(3, 3).int()
    if paged:
        pages = [torch.empty(9, 16, 2, 32) for _ in range(2)]
        for page, cache in zip(pages, caches, strict=True):
            page[table.long()] = cache.unflatten(1, (3, 16))
        caches = pages
    got = fa.flash_attn_with_kvcache(
        q, *caches, k, v, cache_seqlens=lengths, cache_leftpad=padding, causal=causal,
        block_table=table if paged else None, return_softmax_lse=True,
    )  # fmt: skip
    torch.testing.assert_close(got, (want.transpose(1, 2), lse), rtol=1e-5, atol=1e-5)


COMMON = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "alibi_slopes=None, deterministic=False, return_attn_probs=False"
)
SIGNATURES = {
    "flash_attn_func": "q, k, v, " + COMMON,
    "flash_attn_kvpacked_func": "q, kv, " + COMMON,
    "flash_attn_qkvpacked_func": "qkv, " + COMMON,
    "flash_attn_varlen_func": "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, "
    + COMMON
    + ", block_table=None",
    "flash_attn_varlen_kvpacked_func": "q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, "
    "max_seqlen_k, " + COMMON,
    "flash_attn_varlen_qkvpacked_func": "qkv, cu_seqlens, max_seqlen, " + COMMON,
    "flash_attn_with_kvcache": "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, "
    "rotary_sin=None, cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, "
    "block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False",
}


@pytest.mark.parametrize("name", fa.__all__)
def test_signatures_are_those_of_flash_attn_2(name: str) -> None:
    parameters = inspect.signature(getattr(fa, name)).parameters.values()
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    assert ", ".join(map(str, plain)) == SIGNATURES[name]


def test_what_is_not_there_is_refused() -> None:
    q, cache = torch.randn(1, 1, 2, 32), torch.randn(1, 8, 2, 32)
    with pytest.raises(ValueError, match="cache_leftpad must have shape"):
        fa.flash_attn_with_kvcache(q, cache, cache, cache_leftpad=torch.zeros(2).int())
    with pytest.raises(ValueError, match="k and v must come together"):
        fa.flash_attn_with_kvcache(q, cache, cache, k=q, cache_seqlens=0)
    falling, starts = torch.tensor([0, 2, 1]).int(), torch.tensor([0, 4, 8]).int()
    packed, table = torch.randn(2, 2, 32, requires_grad=True), torch.zeros(2, 1).int()
    with pytest.raises(ValueError, match="cu_seqlens_q must rise"):
        fa.flash_attn_varlen_func(packed, cache, cache, falling, starts, 2, 4, block_table=table)
    rows = torch.tensor([0, 1, 2]).int()
    with pytest.raises(ValueError, match="block_table must have 2 rows"):
        fa.flash_attn_varlen_func(packed, cache, cache, rows, starts, 1, 4, block_table=table[:1])
    with pytest.raises(NotImplementedError, match="a paged cache has no backward pass"):
        fa.flash_attn_varlen_func(packed, cache, cache, rows, starts, 1, 4, block_table=table)


@pytest.mark.parametrize("head_dim", [20, 36])
def test_head_dims_are_padded(head_dim: int) -> None:
    q, k, v = torch.randn(3, 2, 6, 4, head_dim, requires_grad=True).unbind()
    got = fa.flash_attn_func(q, k, v, causal=True)
    want, _ = definition(q, k, v, causal=True)
    torch.testing.assert_close(got, want)
    assert got.is_contiguous()
    packed = [t[0] for t in (q, k, v)]
    starts = torch.tensor([0, 6], dtype=torch.int32)
    varlen = fa.flash_attn_varlen_func(*packed, starts, starts, 6, 6, causal=True)
    torch.testing.assert_close(varlen, want[0])


def test_errors_speak_of_flash_attns_arguments() -> None:
    x, cache = torch.randn(1, 6, 4, 16), torch.randn(1, 8, 4, 16)
    for call, text in (
        (
            lambda: fa.flash_attn_func(x[0], x[0], x[0]),
            r"^flash_attn_func: q must have 4 dimensions, \(batch, sequence, heads, head_dim\), "
            r"got \(6, 4, 16\)",
        ),
        (
            lambda: fa.flash_attn_func(x, x.half(), x),
            "^flash_attn_func: k must have the dtype of q",
        ),
        (
            lambda: fa.flash_attn_func(x, x, x, softmax_scale="1"),
            "^flash_attn_func: softmax_scale must be a number",
        ),
        (
            lambda: fa.flash_attn_with_kvcache(x, cache, cache, cache_seqlens=9),
            "^flash_attn_with_kvcache: cache_seqlens must lie in",
        ),
    ):
        with pytest.raises((TypeError, ValueError, RuntimeError), match=text):
            call()
