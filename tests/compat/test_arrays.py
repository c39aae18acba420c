"""Operators on other libraries' arrays: NumPy stands for them on a CPU, CuPy runs where it is."""

import contextlib
from typing import Any

import numpy as np
import pytest
import torch

import flashkern as fk
from flashkern.compat._arrays import on_arrays

RNG = np.random.default_rng(0)


def on_numpy(operator: Any) -> Any:
    return on_arrays(operator, np.from_dlpack, contextlib.nullcontext)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape, dtype=np.float32)


def same(array: np.ndarray, tensor: torch.Tensor) -> bool:
    return isinstance(array, np.ndarray) and np.array_equal(array, tensor.numpy())


def test_attention() -> None:
    query, key = normal(2, 4, 9, 16), normal(2, 2, 9, 16)
    output, lse = on_numpy(fk.attention)(query, key, key, causal=True, return_lse=True)
    tensors = [torch.from_numpy(x) for x in (query, key, key)]
    want, want_lse = fk.attention(*tensors, causal=True, return_lse=True)
    assert same(output, want) and same(lse, want_lse)


def test_a_cache_is_written_in_place() -> None:
    cache = np.zeros((1, 2, 8, 16), dtype=np.float32)
    new = normal(1, 2, 1, 16)
    lengths = np.array([3], dtype=np.int32)
    on_numpy(fk.attention_kvcache)(new, cache, cache.copy(), cache_lengths=lengths, k=new, v=new)
    assert np.array_equal(cache[:, :, 3:4], new) and not cache[:, :, :3].any()


def test_lora_linear_and_memory_is_shared() -> None:
    x, weight = normal(5, 32), normal(24, 32)
    a, b = normal(4, 32), normal(24, 4)
    y = on_numpy(fk.lora_linear)(x, weight, a, b, scaling=0.5)
    assert same(y, fk.lora_linear(*map(torch.from_numpy, (x, weight, a, b)), scaling=0.5))
    seen = []
    on_numpy(lambda t: seen.append(t.data_ptr()))(x)
    assert seen == [x.ctypes.data]


def test_named_tuples_and_lists() -> None:
    logits, scores = normal(2, 3, 50), normal(2, 3)
    best = on_numpy(fk.beam_topk)(logits, scores, 4)
    want = fk.beam_topk(torch.from_numpy(logits), torch.from_numpy(scores), 4)
    assert isinstance(best, fk.BeamTopK)
    assert all(same(one, other) for one, other in zip(best, want, strict=True))
    output, lse = normal(1, 2, 3, 8), normal(1, 2, 3)
    merged, _ = on_numpy(fk.merge_attention)([output, output], [lse, lse])
    np.testing.assert_allclose(merged, output, rtol=1e-6)


def test_tensors_pass_and_errors_speak_of_arguments() -> None:
    x = torch.randn(1, 1, 4, 8)
    assert isinstance(on_numpy(fk.attention)(x, x, x), np.ndarray)
    with pytest.raises(ValueError, match="attention: query must"):
        on_numpy(fk.attention)(normal(4, 8), normal(1, 1, 4, 8), normal(1, 1, 4, 8))


def test_no_gradients() -> None:
    x = torch.randn(1, 1, 4, 8, requires_grad=True)
    assert isinstance(on_numpy(fk.attention)(x, x, x), np.ndarray)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_cupy_on_a_stream_of_its_own() -> None:
    cupy = pytest.importorskip("cupy")
    from flashkern.compat import cupy as on_cupy

    assert set(on_cupy.__all__) <= set(fk.__all__)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        x = cupy.random.standard_normal((1, 8, 2048, 64), dtype=cupy.float32)
        output = on_cupy.attention(x, x, x, causal=True)
        total = output.sum()
    stream.synchronize()
    want = fk.attention(*[torch.from_dlpack(x)] * 3, causal=True)
    assert isinstance(output, cupy.ndarray)
    torch.testing.assert_close(torch.from_dlpack(output), want)
    assert abs(float(total) - want.sum().item()) < 1e-2 * want.abs().sum().item()
