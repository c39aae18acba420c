"""attention_kvcache over the caches of beam search equals attention over gathered copies."""

from typing import Any

import pytest
import torch
from torch import Tensor

import flashkern as fk
from flashkern import _ops, reference

GPU = ("emulated", "cuda")
pytestmark = pytest.mark.kernels("attention_beams")


def _case(
    prompts: int = 2,
    beams: int = 3,
    heads: tuple[int, int] = (4, 2),
    rows: int = 1,
    own: int = 9,
    shared: int = 70,
    room: int = 16,
    dims: tuple[int, int] = (32, 32),
    dtype: torch.dtype = torch.float32,
) -> tuple[list[Tensor], dict[str, Any]]:
    """(query, k_cache, v_cache) and the other arguments."""
    batch, (many, few) = prompts * beams, heads
    query = torch.randn(batch, many, rows, dims[0]).to(dtype)
    caches = [torch.randn(batch, few, room, dim).to(dtype) for dim in dims]
    shared_k, shared_v = (torch.randn(prompts, few, shared, dim).to(dtype) for dim in dims)
    options = {
        "cache_lengths": torch.full((batch,), own),
        "beam_table": torch.randint(beams, (prompts, beams, room)),
        "shared_k": shared_k,
        "shared_v": shared_v,
    }
    return [query, *caches], options


def _check(tensors: list[Tensor], options: dict[str, Any]) -> None:
    got = fk.attention_kvcache(*tensors, **options, return_lse=True)
    wide = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in options.items()
    }
    want = reference.attention_kvcache(*(t.double() for t in tensors), **wide)
    close = 1e-5 if tensors[0].dtype in (torch.float32, torch.float64) else 2e-2
    torch.testing.assert_close(got[0].double(), want[0], rtol=close, atol=close)
    torch.testing.assert_close(got[1].double(), want[1], rtol=close, atol=close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("beams", [1, 3, 16])
@pytest.mark.parametrize("own", [0, 1, 16])
def test_beams(backend: str, beams: int, own: int, dtype: torch.dtype) -> None:
    if backend in GPU and dtype == torch.float64:
        pytest.skip("the GPU kernels know no float64")
    _check(*_case(beams=beams, own=own, dtype=dtype))


@pytest.mark.parametrize("shared", [1, 63, 1100])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (9, 1)])
def test_prompts_of_any_length(backend: str, shared: int, heads: tuple[int, int]) -> None:
    _check(*_case(heads=heads, shared=shared, beams=5))


def test_beams_whose_own_tokens_are_many(backend: str) -> None:
    _check(*_case(own=1200, room=1234, shared=40))


@pytest.mark.parametrize("beams,dims", [(2, (64, 64)), (40, (128, 64)), (4, (24, 200))])
def test_other_dims(backend: str, beams: int, dims: tuple[int, int]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        _check(*_case(prompts=1, beams=beams, dims=dims, dtype=dtype))


@pytest.mark.parametrize(
    "extra",
    [
        {"causal": True},
        {"causal": True, "window": (11, None)},
        {"causal": "top_left", "window": (None, 3)},
        {"softcap": 3.0, "scale": 0.3},
        {"window": (4, 0)},
    ],
)
@pytest.mark.parametrize("rows", [1, 4, 9])
def test_masks_run_through_both_parts(backend: str, rows: int, extra: dict[str, Any]) -> None:
    tensors, options = _case(rows=rows, own=12, shared=33)
    _check(tensors, {**options, **extra, "shared_lengths": torch.tensor([33, 20])})


@pytest.mark.parametrize("shape", [(1, 1, 1, 86), (6, 1, 1, 86), (1, 4, 3, 86), (6, 4, 3, 1)])
@pytest.mark.parametrize("beams", [3, 1])
def test_bias_counts_from_the_prompt(backend: str, shape: tuple[int, ...], beams: int) -> None:
    tensors, options = _case(prompts=6 // beams, beams=beams, rows=3)
    lengths = torch.tensor([70, 41, 0, 5, 9, 60][: 6 // beams])
    bias = torch.randn(shape)
    for mask in (bias, bias > 0):
        _check(tensors, {**options, "shared_lengths": lengths, "bias": mask})


def test_sinks_and_slopes_count_once(backend: str) -> None:
    tensors, options = _case(beams=4)
    slopes = torch.rand(8, 4)
    _check(tensors, {**options, "sinks": torch.randn(4), "alibi_slopes": slopes})


def test_no_shared_keys(backend: str) -> None:
    tensors, options = _case(beams=4, own=15)
    del options["shared_k"], options["shared_v"]
    _check(tensors, options)
    torch.manual_seed(1)
    options["dropout_p"] = 0.5
    dropped = fk.attention_kvcache(*tensors, **options)
    torch.manual_seed(1)
    table = options.pop("beam_table")
    caches = [reference.gather_beams(t, table) for t in tensors[1:]]
    torch.testing.assert_close(dropped, fk.attention_kvcache(tensors[0], *caches, **options))


def test_no_table(backend: str) -> None:
    tensors, options = _case(beams=4, own=15)
    del options["beam_table"]
    _check(tensors, options)


def test_a_cache_without_room(backend: str) -> None:
    """Keys that every beam shares, and no others: cross-attention."""
    tensors, options = _case(beams=4, own=0, room=0)
    _check(tensors, options)


@pytest.mark.parametrize("shared", [True, False])
def test_pages_and_an_append(backend: str, shared: bool) -> None:
    (query, k_cache, v_cache), options = _case(rows=2, own=9, room=16)
    if not shared:
        del options["shared_k"], options["shared_v"]
    k, v = torch.randn(6, 2, 2, 32), torch.randn(6, 2, 2, 32)
    options["beam_table"][:, :, 9:11] = torch.arange(3).view(3, 1)
    options = {**options, "k": k, "v": v, "causal": True}
    want, _ = reference.attention_kvcache(query, k_cache, v_cache, **options)
    table = torch.randperm(6 * 4).view(6, 4)
    paged = [torch.empty(24, 2, 4, 32) for _ in range(2)]
    for pages, cache in zip(paged, (k_cache, v_cache), strict=True):
        pages[table] = cache.unflatten(2, (4, 4)).transpose(1, 2)
    got = fk.attention_kvcache(query, k_cache, v_cache, **options)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    again = fk.attention_kvcache(query, *paged, page_table=table, **options)
    assert torch.equal(got, again)


@pytest.mark.parametrize("rows", [1, 3])
def test_lengths_beyond_a_gpus_cache_end_with_it(backend: str, rows: int) -> None:
    if backend not in GPU:
        pytest.skip("a CPU refuses them")
    tensors, options = _case(rows=rows, own=16, room=16)
    options |= {"causal": True, "window": (40, None), "alibi_slopes": torch.rand(4)}
    want = fk.attention_kvcache(*tensors, **options)
    options["cache_lengths"] = torch.full((6,), 21)
    assert torch.equal(fk.attention_kvcache(*tensors, **options), want)


def test_a_beam_does_not_depend_on_other_prompts(backend: str) -> None:
    (query, k_cache, v_cache), options = _case(prompts=3, beams=4, shared=600)
    whole = fk.attention_kvcache(query, k_cache, v_cache, **options)
    one = {name: value[:1] for name, value in options.items()}
    one["cache_lengths"] = options["cache_lengths"][:4]
    assert torch.equal(whole[:4], fk.attention_kvcache(query[:4], k_cache[:4], v_cache[:4], **one))


def test_any_number_of_threads_gives_the_same_bits(isa: str, threads: None) -> None:
    tensors, options = _case(beams=4, shared=3000, own=500, room=512)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(fk.attention_kvcache(*tensors, **options))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_what_torch_knows_of_the_operator(backend: str) -> None:
    (query, k_cache, v_cache), options = _case(prompts=1)
    lengths, table = (options[name].int() for name in ("cache_lengths", "beam_table"))
    shared = options["shared_k"], options["shared_v"]
    for tables in ((table, *shared, None), (table, None, None, None), (None, *shared, None)):
        arguments = (
            query, k_cache, v_cache, None, None, None, lengths, None, None, *tables,
            2, -1, -1, 0.2, 0.0, 0.0,
        )  # fmt: skip
        torch.library.opcheck(_ops.ops.attention_beams.default, arguments)


def test_many_rows(backend: str) -> None:
    """More of each beam's own than one tile of a GPU holds."""
    for dtype in (torch.float32, torch.bfloat16):
        _check(*_case(prompts=1, beams=2, heads=(6, 2), rows=30, own=70, room=80, dtype=dtype))


def test_shapes_are_traced() -> None:
    tensors, options = _case()
    want = fk.attention_kvcache(*tensors, **options)
    compiled = torch.compile(fk.attention_kvcache, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*tensors, **options), want)
    meta = {name: value.to("meta") for name, value in options.items()}
    assert fk.attention_kvcache(*(t.to("meta") for t in tensors), **meta).shape == want.shape


@pytest.mark.parametrize(
    "change,error,text",
    [
        ({"beam_table": torch.zeros(2, 3, 15, dtype=torch.int32)}, ValueError, "beam_table must"),
        ({"beam_table": torch.zeros(2, 2, 16, dtype=torch.int32)}, ValueError, "beam_table must"),
        ({"beam_table": torch.zeros(2, 3, 16)}, TypeError, "beam_table must"),
        ({"beam_table": torch.full((2, 3, 16), 3)}, RuntimeError, "beams from 0 to 2"),
        ({"beam_table": torch.full((2, 3, 16), -1)}, RuntimeError, "beams from 0 to 2"),
        ({"shared_v": None}, ValueError, "shared_k must come with the other"),
        ({"shared_k": torch.randn(4, 2, 70, 32)}, ValueError, "shared_v must"),
        ({"shared_v": torch.randn(2, 2, 70, 40)}, ValueError, "shared_v must have v_cache's"),
        ({"shared_lengths": torch.tensor([71, 0])}, RuntimeError, "shared_lengths must lie in"),
        ({"shared_lengths": torch.tensor([1])}, ValueError, "shared_lengths must have shape"),
        ({"cache_lengths": torch.arange(6)}, RuntimeError, "equal for all beams"),
        ({"cache_lengths": torch.full((6,), 17)}, RuntimeError, "cache_lengths must lie in"),
        ({"dropout_p": 0.5}, NotImplementedError, "dropout_p must be 0"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], text: str) -> None:
    tensors, options = _case()
    with pytest.raises(error, match=text):
        fk.attention_kvcache(*tensors, **{**options, **change})


@pytest.mark.parametrize("shared", [True, False])
def test_beams_of_a_prompt_have_equal_lengths(shared: bool) -> None:
    """A beam reads the pages of the others: those are checked up to their own lengths."""
    query, pages = torch.randn(2, 2, 1, 16), torch.randn(3, 1, 16, 16)
    table = torch.tensor([[[0] * 16 + [1] * 16, [1] * 32]])
    options: dict[str, Any] = {"page_table": torch.tensor([[0, 1], [2, -1]]), "beam_table": table}
    if shared:
        options |= {"shared_k": torch.randn(1, 1, 5, 16), "shared_v": torch.randn(1, 1, 5, 16)}
    for lengths in ([32, 10], [10, 32]):
        with pytest.raises(RuntimeError, match="equal for all beams|pages from 0 to 2"):
            fk.attention_kvcache(
                query, pages, pages, cache_lengths=torch.tensor(lengths), **options
            )  # fmt: skip


def test_lengths_without_shared_keys() -> None:
    tensors, options = _case()
    del options["shared_k"], options["shared_v"]
    for table in (options["beam_table"], None):
        options.update(beam_table=table, shared_lengths=torch.tensor([3, 3]))
        with pytest.raises(ValueError, match="shared_lengths must come with shared_k"):
            fk.attention_kvcache(*tensors, **options)


def test_beams_have_no_gradient() -> None:
    tensors, options = _case()
    tensors[0].requires_grad_()
    with pytest.raises(NotImplementedError, match="no backward pass"):
        fk.attention_kvcache(*tensors, **options)
    with torch.no_grad():
        fk.attention_kvcache(*tensors, **options)
