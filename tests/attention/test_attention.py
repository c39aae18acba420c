"""Attention against its definition in float64: every feature, both passes, on every back end."""

import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import flashkern as fk
from flashkern import _ops, random, reference

pytestmark = pytest.mark.kernels("attention_forward")

GPU = ("emulated", "cuda")
# On a CPU half precision is held to the one rounding that ends float32 arithmetic, with a quarter
# of room. All else is held to twice torch's error: products of bfloat16 pairs and a GPU's tensor
# cores take weights in half precision, and the latter float32 as three products of TF32, to which
# twice the floor is allowed. The floors,
# in units of the last place of a result's greatest value, are for sums that torch happens to get
# exactly.
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
HALF = (torch.bfloat16, torch.float16)
FLOOR = {torch.float32: 4.0, torch.bfloat16: 0.5, torch.float16: 0.5, torch.float64: 16.0}
PORTABLE_TILES = os.environ.get("FLASHKERN_PORTABLE_TILES") == "1"  # how the library was built
MANY = 1000  # results whose root mean square is no matter of luck


def draw(
    shape: tuple[int, int, int, int, int], dim: int, dtype: torch.dtype, value_dim: int = 0
) -> list[Tensor]:
    batch, heads, kv_heads, rows, columns = shape
    sizes = ((heads, rows, dim), (kv_heads, columns, dim), (kv_heads, columns, value_dim or dim))
    return [torch.randn(batch, *size).to(dtype).requires_grad_() for size in sizes]


def run(function: Any, tensors: list[Tensor], **options: Any) -> list[Tensor]:
    """Output, lse and, where the back end has them, the gradients of both for one direction."""
    output, lse = function(*tensors, **options)
    lse = lse.masked_fill(lse == -torch.inf, 0)
    if not _ops.has_kernel("attention_backward", output.device.type):
        return [output.detach(), lse.detach()]
    torch.manual_seed(1)  # a direction that every dtype holds exactly
    direction = torch.randn(output.shape).to(torch.bfloat16).half().to(output.dtype)
    weight = torch.randn(lse.shape).to(lse.dtype)
    wanted = [t for t in (*tensors, *options.values()) if isinstance(t, Tensor) and t.requires_grad]
    grads = torch.autograd.grad((output * direction).sum() + (lse * weight).sum(), wanted)
    return [output.detach(), lse.detach(), *grads]


def cast(value: Any, dtype: torch.dtype) -> Any:
    """A float tensor in another dtype, as a leaf of its own; anything else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().to(dtype).requires_grad_(value.requires_grad)
    return value


def define(dtype: torch.dtype, tensors: list[Tensor], **options: Any) -> list[Tensor]:
    """The definition as torch runs it in a dtype."""
    options = {name: cast(value, dtype) for name, value in options.items()}
    return run(reference.attention, [cast(t, dtype) for t in tensors], **options)


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def check(
    tensors: list[Tensor],
    keep: Tensor | None = None,
    least: float = 1.0,
    few_keys: bool = False,
    **options: Any,
) -> None:
    """Every error against float64 is at most twice torch's, the greatest and the mean square.

    Torch's is that of the definition in the tensors' dtype, or for half precision on a CPU that
    of the definition in float32, rounded once. ``least``: the mean square of smaller results is
    allowed no smaller a floor, as terms of that size may cancel in them. ``few_keys``: some rows
    see few; a CPU's half precision is then held to torch in that dtype, since most of the error of
    dQ is that of delta, made of an output already rounded.
    """
    dtype, device = tensors[0].dtype, tensors[0].device
    options = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in options.items()}
    keep = None if keep is None else keep.to(device)
    fixed = {} if keep is None else {"keep": keep}
    exact = define(torch.float64, tensors, **options, **fixed)
    gpu = _ops.BACKEND == "emulated" or device.type == "cuda"
    pairs = dtype == torch.bfloat16 and (fk.cpu_isa().endswith("_bf16") or PORTABLE_TILES)
    once = dtype in HALF and not gpu and not few_keys and not pairs
    plain = define(torch.float32 if once else dtype, tensors, **options, **fixed)
    torch.manual_seed(7)
    got = run(lambda *t, **o: fk.attention(*t, return_lse=True, **o), tensors, **options)
    for place, (mine, theirs, want) in enumerate(zip(got, plain, exact, strict=True)):
        assert mine.shape == want.shape
        if want.numel() == 0:
            continue
        unit = FLOOR[mine.dtype] * torch.finfo(mine.dtype).eps * (1 + gpu)
        error, allowed = (t.to(mine.dtype).double() - want for t in (mine, theirs))
        # What cancels in gradients is as large as dO V^T: sums over value_dim unit normals, the
        # greatest of many.
        cancels = 1.0 if place < 2 or mine.dtype in HALF else 3 * tensors[2].shape[-1] ** 0.5
        luck = 3 if want.numel() < 10 else 1  # how near torch comes to a few sums
        floor = luck * unit * max(cancels, want.abs().max().item())
        assert error.abs().max() <= 2 * allowed.abs().max() + floor, f"result {place}"
        if want.numel() >= MANY and once and mine.dtype in HALF:
            assert rms(error) <= 1.25 * rms(allowed), f"result {place}: mean square"
        elif want.numel() >= MANY:
            floor = unit / 2 * max(least, rms(want))
            assert rms(error) <= 2 * rms(allowed) + floor, f"result {place}: mean square"


SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 4, 2, 17, 33),
    (1, 2, 1, 64, 64),
    (1, 3, 3, 127, 129),
    (1, 2, 2, 131, 67),
    (2, 8, 2, 1, 300),
    (1, 2, 1, 5, 0),
    (0, 2, 1, 5, 4),
    (1, 2, 1, 0, 4),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [False, "top_left", "bottom_right"])
def test_shapes(backend: str, shape: tuple[int, int, int, int, int], causal: Any) -> None:
    check(draw(shape, 32, torch.float32), causal=causal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "value_dim"), [(8, 8), (64, 64), (40, 72), (128, 64), (256, 256)])
def test_dtypes_and_head_dims(backend: str, dtype: torch.dtype, dim: int, value_dim: int) -> None:
    if backend in GPU and dtype == torch.float64:
        pytest.skip("the GPU kernels know no float64")
    check(draw((1, 4, 2, 37, 70), dim, dtype, value_dim), causal=True)


FORMS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"causal": "top_left", "sinks": torch.tensor([0.5, -1.0])},
    {"window": (37, 11)},
    {"kv_lengths": torch.tensor([90])},
    {"scale": -0.2},
    {"softcap": 3.0, "causal": True},
    {"alibi_slopes": torch.tensor([0.5, 0.1]), "causal": True},
]


@pytest.mark.parametrize("options", FORMS, ids=lambda options: ", ".join(options) or "plain")
@pytest.mark.parametrize("rows", [16, 17, 33, 64, 65, 128, 129])
def test_rows_of_a_block(backend: str, rows: int, options: dict[str, Any]) -> None:
    """16, 64 and 128 rows fill the blocks of the kernel's forms, tiles are of 64 keys."""
    check(draw((1, 2, 2, rows, 150), 64, torch.bfloat16), few_keys=True, **options)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    ("dim", "value_dim"), [(8, 8), (32, 24), (64, 128), (128, 128), (136, 256)]
)
@pytest.mark.parametrize("group", [1, 3])
def test_many_rows_and_head_dims(
    backend: str, dtype: torch.dtype, dim: int, value_dim: int, group: int
) -> None:
    tensors = draw((1, 2 * group, 2, 130 // group, 200), dim, dtype, value_dim)
    check(tensors, causal=True, few_keys=True)
    check(tensors, softcap=5.0, window=(70, 3), few_keys=True)


@pytest.mark.parametrize("dtype", HALF)
def test_many_rows_with_a_bias_and_dropout(backend: str, dtype: torch.dtype) -> None:
    tensors, bias = draw((1, 2, 1, 70, 150), 64, dtype), torch.randn(1, 2, 70, 150).to(dtype)
    check(tensors, bias=bias.requires_grad_())
    check(tensors, bias=torch.rand(1, 1, 70, 150) < 0.7)
    torch.manual_seed(7)
    keep = random.attention_keep_mask(random.draw_seed(), 0.4, 1, 2, 70, 150)
    check(tensors, keep=keep, dropout_p=0.4)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}])
def test_a_row_has_the_same_bits_among_any_others(backend: str, options: dict[str, Any]) -> None:
    """Whatever number of rows picks the kernel's form, here in dense and in ragged batches."""
    if backend not in GPU:
        pytest.skip("CPU panels of other widths add in another order")
    query, key, value = (t.detach() for t in draw((1, 1, 1, 200, 600), 64, torch.bfloat16))
    whole = fk.attention(query, key, value, **options)
    for rows in (129, 150):
        some = fk.attention(query[:, :, :rows], key, value, **options)
        assert torch.equal(some, whole[:, :, :rows])
    lengths = (10, 200, 100, 40)
    packed = torch.cat([query[0, :, :n] for n in lengths], 1).transpose(0, 1)
    keys, values = (t[0].transpose(0, 1).repeat(4, 1, 1) for t in (key, value))
    starts = [
        torch.tensor(s, dtype=torch.int32)
        for s in ([0, 10, 210, 310, 350], [0, 600, 1200, 1800, 2400])
    ]
    ragged = fk.attention_varlen(packed, keys, values, *starts, 200, 600, **options)
    for n, rows in zip(lengths, ragged.split(lengths), strict=True):
        alone = fk.attention(query[:, :, :n], key, value, **options)
        assert torch.equal(rows.transpose(0, 1), alone[0])


def test_a_step_has_the_same_bits_beside_longer_caches(backend: str) -> None:
    """Shorter ones may have more splits than the longest; ragged ones lie in memory one by one."""
    lengths = (8192, 9000, 130, 0, 4097)
    query, key, value = draw((5, 2, 1, 1, 9000), 16, torch.bfloat16)
    dense = fk.attention(query, key, value, kv_lengths=torch.tensor(lengths))
    keys, values = (
        torch.cat([t[b, :, :n] for b, n in enumerate(lengths)], 1).transpose(0, 1)
        for t in (key, value)
    )
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    rows = torch.arange(6, dtype=torch.int32)
    ragged = fk.attention_varlen(query[:, :, 0], keys, values, rows, starts, 1, 9000)
    assert torch.equal(ragged, dense[:, :, 0])
    for b, n in enumerate(lengths):
        tensors = [query[b : b + 1], key[b : b + 1, :, :n], value[b : b + 1, :, :n]]
        assert torch.equal(fk.attention(*tensors), dense[b : b + 1])
        check(tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dim", "value_dim"), [(8, 8), (40, 72), (24, 136)])
@pytest.mark.parametrize("rows", [1, 2])
def test_decoding_head_dims(
    backend: str, dtype: torch.dtype, dim: int, value_dim: int, rows: int
) -> None:
    """3 and 6 rows of a KV head: every height of the dot products, dims beside vectors."""
    check(draw((1, 6, 2, rows, 70), dim, dtype, value_dim), causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_long_sequences(dtype: torch.dtype, causal: bool) -> None:
    """Sums of thousands of terms, over many tiles of keys and rows; nothing here cancels."""
    check(draw((1, 2, 2, 2048, 2048), 64, dtype), least=0.0, causal=causal)


OPTIONS: dict[str, Any] = {
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 2.0, "causal": True},
    "window": {"window": (7, 3)},
    "window left": {"window": (5, None), "causal": True},
    "lengths": {"kv_lengths": torch.tensor([70, 9])},
    "no keys": {"kv_lengths": torch.tensor([0, 30]), "causal": True},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0])},
}


@pytest.mark.parametrize("name", list(OPTIONS))
@pytest.mark.parametrize("rows", [1, 3, 45])
def test_options(backend: str, name: str, rows: int) -> None:
    check(draw((2, 4, 2, rows, 70), 32, torch.float32), **OPTIONS[name])


BIASES = [(2, 4, 45, 70), (1, 4, 45, 70), (2, 4, 1, 70), (2, 1, 1, 70), (45, 1), (1, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", BIASES)
def test_float_bias_and_its_gradient(
    backend: str, dtype: torch.dtype, size: tuple[int, ...]
) -> None:
    bias = torch.randn(size).to(dtype).requires_grad_()
    check(draw((2, 4, 2, 45, 70), 32, dtype), bias=bias)


def test_bool_bias_with_rows_that_see_nothing(backend: str) -> None:
    bias = torch.rand(2, 1, 45, 70) < 0.3
    bias[:, :, 10:20] = False
    tensors = draw((2, 4, 2, 45, 70), 32, torch.float32)
    check(tensors, bias=bias)
    output, lse = fk.attention(*tensors, bias=bias, return_lse=True)
    assert (output[:, :, 10:20] == 0).all() and (lse[:, :, 10:20] == -torch.inf).all()


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("columns", [70, 3000])
def test_nothing_seen_is_zero_whatever_the_values(backend: str, rows: int, columns: int) -> None:
    """Not a weight of 0 times a value, which would be NaN here; in whole rows and in splits."""
    query, key, value = (t.detach() for t in draw((1, 4, 2, rows, columns), 32, torch.float32))
    bias = torch.zeros(1, 4, rows, columns, dtype=torch.bool)
    bias[:, 1, :, :2] = True
    value[:, :, columns * 7 // 10 :] = torch.nan
    output, lse = fk.attention(query, key, value, bias=bias, return_lse=True)
    blind = [0, 2, 3]
    assert (output[:, blind] == 0).all() and (lse[:, blind] == -torch.inf).all()
    assert lse[:, 1].isfinite().all()
    if columns > 70 and backend not in GPU:  # the NaN lie in other splits
        assert output[:, 1].isfinite().all()


@pytest.mark.parametrize("dtype", HALF)
def test_gradients_of_an_odd_number_of_elements(backend: str, dtype: torch.dtype) -> None:
    """120 of them: the rounding of dQ ends within a vector."""
    check(draw((1, 3, 1, 5, 9), 8, dtype))


def test_sinks_and_their_gradient(backend: str) -> None:
    sinks = torch.randn(4).requires_grad_()
    check(draw((2, 4, 2, 45, 70), 32, torch.float32), sinks=sinks, causal=True)
    check(draw((1, 4, 2, 45, 7), 32, torch.float32), sinks=sinks, causal=True)


@pytest.mark.parametrize("rows", [1, 45])
@pytest.mark.parametrize("window", [None, (150, 30)])
def test_dropout_is_the_function(backend: str, rows: int, window: Any) -> None:
    """Over several blocks of keys, and over splits of them, from the first key or a later one."""
    torch.manual_seed(7)
    keep = random.attention_keep_mask(random.draw_seed(), 0.4, 2, 4, rows, 590)
    tensors = draw((2, 4, 2, rows, 590), 32, torch.float32)
    check(tensors, keep=keep, dropout_p=0.4, window=window)


@pytest.mark.parametrize("rows", [1, 45])
@pytest.mark.parametrize("columns", [70, 3000])
def test_one_key_stands_out(backend: str, rows: int, columns: int) -> None:
    """Wherever it is, by more than the exponent of a float32: no maximum may leave it out."""
    query = torch.ones(1, 2, rows, 32)
    value = torch.randint(-9, 9, (1, 2, columns, 32)).float()
    for place in (*range(16), columns // 2 + 1, columns - 1):
        key = torch.zeros(1, 2, columns, 32)
        key[:, :, place] = 100.0
        output, lse = fk.attention(query, key, value, return_lse=True)
        want = value[:, :, place : place + 1].expand_as(output)
        torch.testing.assert_close(output, want, rtol=1e-4, atol=0)
        torch.testing.assert_close(lse, torch.full_like(lse, 3200 / 32**0.5))


def test_strided_and_expanded_views(backend: str) -> None:
    query = torch.randn(2, 45, 4, 32).transpose(1, 2).requires_grad_()
    key = torch.randn(1, 1, 70, 64)[..., ::2].expand(2, 2, 70, 32).requires_grad_()
    value = torch.randn(2, 70, 2, 40).transpose(1, 2)[..., 8:].requires_grad_()
    check([query, key, value], causal=True)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_drawn_combinations(backend: str, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1 << 16)))
    group, kv_heads = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 2))
    rows, columns = data.draw(st.integers(0, 80)), data.draw(st.integers(0, 200))
    heads, batch = group * kv_heads, data.draw(st.integers(1, 2))
    side = st.one_of(st.none(), st.integers(0, 40))
    options: dict[str, Any] = {
        "causal": data.draw(st.sampled_from([False, "top_left", "bottom_right"])),
        "window": data.draw(st.one_of(st.none(), st.tuples(side, side))),
        "softcap": data.draw(st.sampled_from([0.0, 3.0])),
    }
    if data.draw(st.booleans()):
        options["kv_lengths"] = torch.randint(0, columns + 1, (batch,))
    if data.draw(st.booleans()):
        options["sinks"] = torch.randn(heads).requires_grad_()
    if data.draw(st.booleans()):
        options["bias"] = torch.randn(batch, 1, rows, columns).requires_grad_()
    dim = 8 * data.draw(st.integers(1, 10))
    check(draw((batch, heads, kv_heads, rows, columns), dim, torch.float32), **options)


@pytest.mark.parametrize("shape", [(2, 4, 2, 150, 300), (1, 4, 1, 1, 3000), (3, 4, 4, 40, 40)])
def test_same_bits_on_any_threads_and_in_any_batch(
    backend: str, threads: None, shape: tuple[int, int, int, int, int]
) -> None:
    tensors = draw(shape, 64, torch.float32)
    results = []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        results.append(run(lambda *t: fk.attention(*t, causal=True, return_lse=True), tensors))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    alone = fk.attention(*(t[:1].detach() for t in tensors), causal=True)
    assert torch.equal(alone, results[0][0][:1])


@pytest.mark.kernels("attention_forward", "attention_backward")
@pytest.mark.parametrize("shape", [(1, 1, 1, 70, 8192), (1, 1, 1, 4096, 70)])
def test_long_sums_of_float32(backend: str, shape: tuple[int, int, int, int, int]) -> None:
    """Tensor cores cut their sums where others round them: what is all positive would shrink."""
    tensors = [t.detach().abs().requires_grad_() for t in draw(shape, 32, torch.float32)]
    output = fk.attention(*tensors)
    direction = torch.rand(output.shape)
    got = (output, *torch.autograd.grad(output, tensors, direction))
    wide = [t.detach().double().requires_grad_() for t in tensors]
    output, _ = reference.attention(*wide)
    want = (output, *torch.autograd.grad(output, wide, direction.double()))
    for mine, theirs in zip(got[::3], want[::3], strict=True):  # the output and dV
        torch.testing.assert_close(mine.double(), theirs, rtol=3e-6, atol=0)
