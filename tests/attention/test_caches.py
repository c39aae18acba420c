"""Packed sequences, caches and partial results: each equals the dense call that it stands for."""

import pytest
import torch

import flashkern as fk
from flashkern import _ops, reference

GPU = ("emulated", "cuda")
pytestmark = pytest.mark.kernels("attention_forward")

STARTS_Q = torch.tensor([0, 5, 5, 40, 41], dtype=torch.int32)
STARTS_K = torch.tensor([0, 9, 12, 52, 90], dtype=torch.int32)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (6, 2), "softcap": 3.0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_varlen(backend: str, options: dict, dtype: torch.dtype) -> None:
    if backend in GPU and dtype == torch.float64:
        pytest.skip("the GPU kernels know no float64")
    query = torch.randn(41, 4, 32, dtype=dtype, requires_grad=True)
    starts_q, starts_k = STARTS_Q.to(query.device), STARTS_K.to(query.device)
    key, value = (torch.randn(90, 2, 32, dtype=dtype, requires_grad=True) for _ in range(2))
    got = fk.attention_varlen(
        query, key, value, starts_q, starts_k, 35, 40, return_lse=True, **options
    )
    want = reference.attention_varlen(query, key, value, starts_q, starts_k, **options)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    if not _ops.has_kernel("attention_backward", query.device.type):
        return
    direction = torch.randn_like(got[0])
    mine, theirs = (
        torch.autograd.grad(result[0], (query, key, value), direction) for result in (got, want)
    )
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sequences", [1, 5, 70, 300])
@pytest.mark.parametrize("rows", [1, 40, 300])
def test_varlen_of_any_number_of_sequences(backend: str, sequences: int, rows: int) -> None:
    """One long sequence among short and empty ones, more of them than a warp counts."""
    lengths = [rows if i == sequences // 2 else i % 4 for i in range(sequences)]
    keys = [600 if i == sequences // 3 else 1 + i % 9 for i in range(sequences)]
    starts_q, starts_k = (
        torch.tensor([0, *n], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        for n in (lengths, keys)
    )
    query = torch.randn(sum(lengths), 4, 32).to(torch.bfloat16)
    key, value = (torch.randn(sum(keys), 2, 32).to(torch.bfloat16) for _ in range(2))
    got = fk.attention_varlen(
        query, key, value, starts_q, starts_k, max(lengths), 600, causal=True, return_lse=True
    )
    wide = (t.double() for t in (query, key, value))
    want = reference.attention_varlen(*wide, starts_q, starts_k, causal=True)
    torch.testing.assert_close(got[0].double(), want[0], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-4, atol=1e-4)


@pytest.mark.kernels("attention_forward", "attention_append_kv")
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_with_append_and_pages(backend: str, rows: int, dtype: torch.dtype) -> None:
    lengths = torch.tensor([0, 37, 700])
    query = torch.randn(3, 8, rows, 64).to(dtype)
    k, v = (torch.randn(3, 2, rows, 64).to(dtype) for _ in range(2))
    k_cache, v_cache = (torch.randn(3, 2, 768, 64).to(dtype) for _ in range(2))
    want, _ = reference.attention_kvcache(
        *(t.float() for t in (query, k_cache, v_cache)),
        cache_lengths=lengths,
        k=k.float(),
        v=v.float(),
        causal=True,
    )
    table = torch.randperm(48 * 3).view(3, 48).int()
    paged = [torch.empty(48 * 3, 2, 16, 64, dtype=dtype) for _ in range(2)]
    for pages, cache in zip(paged, (k_cache, v_cache), strict=True):
        pages[table.long()] = cache.unflatten(2, (48, 16)).transpose(1, 2)
    options = {"cache_lengths": lengths, "k": k, "v": v, "causal": True}
    dense = fk.attention_kvcache(query, k_cache, v_cache, **options)
    torch.testing.assert_close(dense.float(), want, rtol=2e-2, atol=2e-2 if dtype != torch.float32
                               else 1e-5)  # fmt: skip
    assert torch.equal(k_cache[1, :, 37 : 37 + rows], k[1])
    assert torch.equal(dense, fk.attention_kvcache(query, *paged, page_table=table, **options))
    assert torch.equal(reference.gather_pages(paged[1], table)[2, :, 700 : 700 + rows], v[2])


def test_pages_that_end_within_a_tile(backend: str) -> None:
    """Neither the table nor the pages are read beyond their ends."""
    query = torch.randn(1, 2, 20, 32)
    pages, values = torch.randn(5, 1, 16, 32), torch.randn(5, 1, 16, 32)
    table = torch.randperm(5).int().view(1, 5)
    lengths = torch.tensor([80])
    got = fk.attention_kvcache(query, pages, values, cache_lengths=lengths, page_table=table)
    dense = [reference.gather_pages(t, table) for t in (pages, values)]
    torch.testing.assert_close(got, fk.attention(query, *dense))


def test_append_of_no_rows(backend: str) -> None:
    caches = [torch.randn(2, 2, 20, 16) for _ in range(2)]
    before = [cache.clone() for cache in caches]
    none = torch.empty(2, 2, 0, 16)
    lengths = torch.tensor([4, 20])
    query = torch.randn(2, 4, 3, 16)
    fk.attention_kvcache(query, *caches, cache_lengths=lengths, k=none, v=none)
    assert all(map(torch.equal, caches, before))


def test_append_of_values_wider_than_keys(backend: str) -> None:
    query, k, v = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 3, 16), torch.randn(2, 2, 3, 40)
    caches = [torch.randn(2, 2, 20, dim) for dim in (16, 40)]
    options = {"cache_lengths": torch.tensor([4, 17]), "k": k, "v": v, "causal": True}
    want, _ = reference.attention_kvcache(query, *caches, **options)
    torch.testing.assert_close(fk.attention_kvcache(query, *caches, **options), want)
    assert torch.equal(caches[1][1, :, 17:], v[1])


def test_packed_rows_that_no_sequence_holds(backend: str) -> None:
    packed, starts = torch.randn(12, 2, 16), torch.tensor([2, 5, 8], dtype=torch.int32)
    output, lse = fk.attention_varlen(packed, packed, packed, starts, starts, 3, 3, return_lse=True)
    outside = torch.tensor([0, 1, 8, 9, 10, 11])
    assert output[outside].eq(0).all() and lse[:, outside].eq(-torch.inf).all()
    assert output[2:8].ne(0).all()


def test_sequences_longer_than_they_are_said_to_be() -> None:
    packed, starts = torch.randn(8, 2, 16), torch.tensor([0, 3, 8], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="max_seqlen = 4"):
        fk.attention_varlen(packed, packed, packed, starts, starts, 4, 5)


def test_pages_without_a_token() -> None:
    pages, none = torch.zeros(2, 2, 0, 16), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="at least one token"):
        fk.attention_kvcache(
            torch.randn(1, 2, 1, 16), pages, pages, cache_lengths=none, page_table=none[None]
        )


def test_window_wider_than_any_sequence(backend: str) -> None:
    query, key, value = (torch.randn(1, 2, rows, 16) for rows in (9, 5, 5))
    want = fk.attention(query, key, value)
    for window in ((2**63 - 1, None), (None, 2**63 - 1), (2**63 - 1, 2**63 - 1)):
        assert torch.equal(want, fk.attention(query, key, value, window=window))


@pytest.mark.kernels("attention_forward", "attention_backward")
def test_merge_is_the_whole(backend: str) -> None:
    query, key, value = (torch.randn(2, 4, 33, 64, requires_grad=True) for _ in range(3))
    whole, lse = fk.attention(query, key, value, return_lse=True)
    cuts = [slice(0, 7), slice(7, 7), slice(7, 33)]
    parts = [fk.attention(query, key[:, :, c], value[:, :, c], return_lse=True) for c in cuts]
    merged, merged_lse = fk.merge_attention(*zip(*parts, strict=True))
    torch.testing.assert_close((merged, merged_lse), (whole, lse), rtol=1e-5, atol=1e-5)
    direction = torch.randn_like(whole)
    mine, theirs = (torch.autograd.grad(o, (query, key, value), direction) for o in (merged, whole))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_merge_where_every_part_is_empty(dtype: torch.dtype) -> None:
    """Rows without a key anywhere have zero gradients, and leave those of the others alone."""
    query, key, value = (torch.randn(1, 2, 6, 16).to(dtype).requires_grad_() for _ in range(3))
    seen = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    seen[:, :, 2:4] = False
    whole = fk.attention(query, key, value, bias=seen, return_lse=True)
    parts = [
        fk.attention(query, key[:, :, c], value[:, :, c], bias=seen[..., c], return_lse=True)
        for c in (slice(0, 3), slice(3, 6))
    ]
    merged = fk.merge_attention(*zip(*parts, strict=True))
    assert merged[0].dtype == dtype and merged[1].dtype == whole[1].dtype
    assert (merged[0][:, :, 2:4] == 0).all() and (merged[1][:, :, 2:4] == -torch.inf).all()
    direction = torch.randn_like(whole[0]), torch.randn_like(whole[1])
    leaves = (query, key, value)
    mine = torch.autograd.grad(merged, (*leaves, parts[0][1]), direction)
    theirs = torch.autograd.grad(whole, leaves, direction)
    assert all(grad.isfinite().all() for grad in mine)
    assert (mine[0][:, :, 2:4] == 0).all()
    close = 3e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(merged, whole, rtol=close, atol=close)
    torch.testing.assert_close(mine[:3], theirs, rtol=close, atol=close)


@pytest.mark.parametrize("length,appended", [(16, True), (17, False), (-1, False)])
def test_lengths_outside_the_cache_are_refused(length: int, appended: bool) -> None:
    query, cache = torch.randn(1, 2, 1, 32), torch.randn(1, 2, 16, 32)
    new = {"k": query, "v": query} if appended else {}
    with pytest.raises(RuntimeError, match="^attention: cache_lengths must"):
        fk.attention_kvcache(
            query, cache, cache.clone(), cache_lengths=torch.tensor([length]), **new
        )


def test_a_gpu_counts_keys_in_32_bits(backend: str) -> None:
    if backend not in GPU:
        pytest.skip("a CPU counts in 64")
    keys = torch.zeros(1, 1, 1, 8).expand(1, 1, 2**30, 8)
    with pytest.raises(RuntimeError, match="fewer than 2\\^30"):
        fk.attention(keys[:, :, :1], keys, keys)


def test_a_gpu_drops_rows_for_which_a_cache_has_no_room(backend: str) -> None:
    """It cannot refuse them: lengths are read where they lie."""
    if backend not in GPU:
        pytest.skip("a CPU refuses them")
    room = torch.zeros(4, 1, 8, 16)
    caches, new = [room[1:3].clone(), room[1:3].clone()], torch.ones(2, 1, 3, 16)
    lengths = torch.tensor([6, -2], dtype=torch.int32)
    _ops.ops.attention_append_kv(*caches, new, new, lengths, None)
    for cache in caches:
        assert cache[0].sum(-1).tolist() == [[0, 0, 0, 0, 0, 0, 16, 16]]
        assert cache[1].sum(-1).tolist() == [[16, 0, 0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("name", ["k", "v"])
def test_what_is_appended_is_on_the_device_of_its_cache(name: str) -> None:
    query, cache = torch.randn(1, 2, 1, 32), torch.randn(1, 2, 16, 32)
    new = {"k": query, "v": query, name: query.to("meta")}
    with pytest.raises(ValueError, match=f"{name} must be on device cpu, got meta"):
        fk.attention_kvcache(query, cache, cache.clone(), cache_lengths=torch.tensor([3]), **new)


@pytest.mark.kernels("attention_forward", "attention_append_kv", "attention_beams")
@pytest.mark.parametrize("rows", [1, 30])
@pytest.mark.parametrize("beams", [False, True])
def test_a_gpu_meets_pages_and_beams_that_do_not_exist(
    backend: str, beams: bool, rows: int
) -> None:
    """A padded batch has them. Nothing outside the cache is written, and nothing there is read."""
    if backend not in GPU:
        pytest.skip("a CPU refuses them")
    around = torch.full((2, 5, 1, 8, 16), torch.nan)
    around[:, 1:4] = 0
    k_cache, v_cache = around[:, 1:4]
    new, query = torch.ones(3, 1, 1, 16), torch.ones(3, 1, rows, 16)
    options = {"cache_lengths": torch.tensor([3, 3, 3]), "k": new, "v": new}
    options["page_table"] = torch.tensor([[-1, 0], [3, 0], [2, -1]])
    if beams:
        options["beam_table"] = torch.tensor([0, -1, 3]).view(1, 3, 1).expand(1, 3, 16).contiguous()
    output = fk.attention_kvcache(query, k_cache, v_cache, **options)
    assert output.isfinite().all()
    assert around[:, [0, 4]].isnan().all()
    for cache in (k_cache, v_cache):
        assert (cache[2, :, 3] == 1).all() and cache.sum() == 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dims", [(24, 32), (64, 40), (128, 128), (256, 136)])
@pytest.mark.parametrize("rows", [1, 20, 70])
def test_pages_give_the_bits_of_a_cache(
    backend: str, rows: int, dims: tuple[int, int], dtype: torch.dtype
) -> None:
    """Whatever a tile's rows are wide; what lies in pages behind a sequence's length is NaN."""
    query = torch.randn(2, 2, rows, dims[0]).to(dtype)
    caches = [torch.randn(2, 1, 200, dim).to(dtype) for dim in dims]
    options = {"cache_lengths": torch.tensor([200, 131]), "causal": True}
    want = fk.attention_kvcache(query, *caches, **options)
    for cache in caches:
        cache[1, :, 131:] = torch.nan
    for page_size in (1, 10, 40):
        table = torch.randperm(400 // page_size).view(2, -1)
        pools = [torch.empty(table.numel(), 1, page_size, dim).to(dtype) for dim in dims]
        for pool, cache in zip(pools, caches, strict=True):
            pool[table.flatten()] = cache.reshape(-1, 1, page_size, cache.shape[3])
        assert torch.equal(fk.attention_kvcache(query, *pools, page_table=table, **options), want)


@pytest.mark.parametrize("value_dim", [8, 136])
def test_many_parts_are_merged(backend: str, value_dim: int) -> None:
    """As many parts of a long cache as need every lane more than once; a short one beside it."""
    room = 70_000 if value_dim == 8 else 3000
    query = torch.randn(2, 2, 1, 8).to(torch.bfloat16)
    caches = [torch.randn(2, 1, room, dim).to(torch.bfloat16) for dim in (8, value_dim)]
    lengths = torch.tensor([room - 1, 1500])
    got = fk.attention_kvcache(query, *caches, cache_lengths=lengths, return_lse=True)
    want = reference.attention_kvcache(
        *(t.double() for t in (query, *caches)), cache_lengths=lengths
    )  # fmt: skip
    torch.testing.assert_close(got[0].double(), want[0], rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-5, atol=1e-5)
    alone = [t[1:, :, :2000] for t in caches]
    again = fk.attention_kvcache(query[1:], *alone, cache_lengths=lengths[1:])
    assert torch.equal(again, got[0][1:])
