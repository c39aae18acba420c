"""The planners behind :func:`flashkern.explain`: each operator's shape, its kernel, its cost."""

from typing import Any

import torch
from torch import Tensor

from flashkern import _attention_args, _host
from flashkern._checks import dtype_name
from flashkern._ops import BACKEND, cpu_isa, ops
from flashkern.explain import planner
from flashkern.sdpa import with_dims


def _attention_facts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: int,
    band: _attention_args.Band,
    options: dict[str, Any],
) -> dict[str, Any]:
    batch, heads, rows, head_dim = query.shape
    shape = (batch, heads, key.shape[1], rows, keys, head_dim, value.shape[3])
    tiles = query.dtype == torch.bfloat16 and cpu_isa() == "amx_bf16"
    plan = _host.attention_plan(*shape, query.element_size(), *band, tiles=tiles)
    if query.is_cuda or BACKEND:
        work = {name: plan[name] for name in ("rows", "flops", "backward_flops", "bytes")}
        plain = _is_plain(query, key, value, **options)
        cut = _host.attention_gpu_plan(*shape, query.dtype == torch.float32, plain=plain)
        form = cut.pop("form")
        why = f"{work['rows']} query rows for each KV head: {_ATTENTION_FORMS[form]}"
        return {"kernel": form, "why": why, **work, **cut}
    few = f"{plan['rows']} query rows for each KV head"
    limit = plan.pop("decode_rows")
    if query.dtype == torch.float64:
        plan["kernel"], why = "float64 rows", "float64 runs unhurried"
    elif plan["kernel"] == "decode":
        why = f"{few}, at most {limit}: the cache is streamed"
    else:
        why = f"{few}, more than {limit}: products of tiles"
        plan["pairs"] = query.dtype == torch.bfloat16 and cpu_isa() in _PAIRS
        why += _PAIRS[cpu_isa()] if plan["pairs"] else ""
    return {**plan, "why": why}


_PAIRS = {"avx512_bf16": ", of bfloat16 in pairs", "amx_bf16": ", of bfloat16 pairs by AMX"}

_ATTENTION_FORMS = {
    "few": "one warp, keys and values two tiles ahead",
    "narrow": "16 rows a warp, for few rows, float32 or more than 128 columns",
    "wide": "32 rows a warp share each key",
    "plain": "32 rows a warp share each key, and scores take a scale and a mask alone",
}


def _is_plain(
    *tensors: Tensor,
    scale: float | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    page_table: Tensor | None = None,
    **_: Any,
) -> bool:
    """What csrc/attention/sm80/plan.h asks of a call that takes the plain form."""
    bare = all(x is None for x in (bias, alibi_slopes, page_table))
    aligned = all(s * t.element_size() % 16 == 0 for t in tensors for s in t.stride()[:-1])
    positive = scale is None or scale >= 1e-30
    return bare and aligned and positive and softcap == 0 and dropout_p == 0


@planner("attention")
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool | str = False,
    window: _attention_args.Window = None,
    **options: Any,
) -> dict[str, Any]:
    band = _attention_args.band("attention", causal, window, own_length=False)
    return _attention_facts(query, key, value, key.shape[2], band, options)


@planner("attention_varlen")
def _attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    **options: Any,
) -> dict[str, Any]:
    """Lengths are values, which a plan does not read: every sequence counts as the longest."""
    batch = cu_seqlens_q.shape[0] - 1
    dense = [
        t.new_empty(1).expand(batch, t.shape[1], most, t.shape[2])
        for t, most in ((query, max_seqlen_q), (key, max_seqlen_k), (value, max_seqlen_k))
    ]
    plan = _attention(*dense, **options)
    plan["why"] += f"; {batch} sequences, each counted as the longest"
    return plan


@planner("scaled_dot_product_attention")
def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **_: Any,
) -> dict[str, Any]:
    query, key, value = (with_dims(t, 4).flatten(0, -4) for t in (query, key, value))
    options = {"bias": attn_mask, "dropout_p": dropout_p, "scale": scale}
    return _attention(query, key, value, causal="top_left" if is_causal else False, **options)


@planner("attention_kvcache")
def _attention_kvcache(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    page_table: Tensor | None = None,
    shared_k: Tensor | None = None,
    shared_v: Tensor | None = None,
    causal: bool | str = False,
    window: _attention_args.Window = None,
    **options: Any,
) -> dict[str, Any]:
    keys = k_cache.shape[2] * (1 if page_table is None else page_table.shape[1])
    band = _attention_args.band("attention_kvcache", causal, window, own_length=False)
    options["page_table"] = page_table
    own = _attention_facts(query, k_cache, v_cache, keys, band, options)
    if shared_k is None or shared_v is None:
        return own
    # The part of the keys that beams share, where the rows of all beams meet; the other adds work.
    beams = query.shape[0] // shared_k.shape[0]
    rows = query.unflatten(0, (-1, beams)).transpose(1, 2).flatten(2, 3)
    keys, whole = shared_k.shape[2], _attention_args.band("attention_kvcache", False, None, False)
    plan = _attention_facts(rows, shared_k, shared_v, keys, whole, options)
    plan["why"] += f"; {beams} beams share a prompt's keys"
    for work in ("flops", "bytes"):
        plan[work] += own[work]
    return plan


@planner("lora_linear")
def _lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    dropout_p: float = 0.0,
    **_: Any,
) -> dict[str, Any]:
    out, width = weight.shape
    rank, rows = lora_a.shape[-2], x.numel() // max(width, 1)
    elements = rows * (width + out) + out * width
    adapters = (lora_a.numel() + lora_b.numel()) * lora_a.element_size()
    choice = ("auto", "blas", "own").index(ops.lora_base()) if weight.is_contiguous() else 1
    dtype = dtype_name(x.dtype)
    if x.is_cuda or BACKEND:
        plan = _host.lora_gpu_plan(
            rows,
            width,
            out,
            rank,
            dtype,
            dtype_name(lora_a.dtype),
            choice,
            _capability(x),
            dropout_p > 0.0,
        )
        kernel, why = _LORA_GPU_BASES[plan.pop("base")]
    else:
        plan = _host.lora_plan(rows, out, dtype, choice, torch.get_num_threads())
        base = plan.pop("base")
        kernel, why = _LORA_BASES[base]
        # oneDNN, behind torch's BLAS, multiplies bfloat16 as fast as the CPU does
        plan["pairs"] = base == "blas" and dtype == "bfloat16" and cpu_isa() in _PAIRS
    return {
        "kernel": kernel,
        "why": why,
        "flops": 2.0 * rows * (width * out + rank * (width + out)),
        "bytes": float(elements * x.element_size() + adapters),
        **plan,
    }


@planner("lora_linear_multi")
def _lora_linear_multi(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, adapter_ids: Tensor, **_: Any
) -> dict[str, Any]:
    plan = _lora_linear(x, weight, lora_a, lora_b)
    plan["why"] += f"; {lora_a.shape[0]} adapters, every row with one"
    return plan


def _processors(x: Tensor) -> int:
    """Multiprocessors of x's GPU; the emulator's, and an absent GPU's, are an A100's 108."""
    if not x.is_cuda or not torch.cuda.is_available():
        return 108
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def _capability(x: Tensor) -> int:
    """10 * major + minor of x's GPU; the emulator's, and an absent GPU's, is 80."""
    if not x.is_cuda or not torch.cuda.is_available():
        return 80
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


_LORA_BASES = {
    "blas": (
        "torch's BLAS for x W^T, then one pass for the adapter",
        "BLAS multiplies this dtype at this CPU's full rate, or W's rows are not contiguous",
    ),
    "tiles": (
        "own tiles, x W^T + h B^T in one sum",
        "torch's BLAS runs this dtype below this CPU's full rate",
    ),
    "few": (
        "dot products that read W once, the adapter in the same sum",
        "a few rows: reading W is the work",
    ),
}

_LORA_GPU_BASES = {
    "blas": (
        "h B^T + bias, to which cuBLAS adds x W^T",
        "cuBLAS alone multiplies this dtype at full rate here, or W's rows are not contiguous",
    ),
    "tiles": (
        "tensor-core tiles, x W^T + h B^T in one sum",
        "y is written once, and mma.sync runs at this GPU's full rate or the depth is short",
    ),
    "few": (
        "a decoding step: W read once, the adapter in the same sum",
        "at most 64 rows: reading W is the work",
    ),
}


@planner("beam_topk")
def _beam_topk(logits: Tensor, beam_scores: Tensor, k: int, **_: Any) -> dict[str, Any]:
    half = logits.dtype in (torch.bfloat16, torch.float16)
    if logits.dtype == torch.float64:
        rows, size = logits.numel() // logits.shape[2], logits.element_size()
        moved, flops = size * (logits.numel() + 2 * rows), 4.0 * logits.numel()
        why = "float64 has no kernel of its own"
        return {"kernel": "plain PyTorch", "why": why, "bytes": float(moved), "flops": flops}
    if logits.is_cuda or BACKEND:
        plan = _host.beam_topk_gpu_plan(*logits.shape, k, half, _processors(logits))
    else:
        plan = _host.beam_topk_plan(*logits.shape, k, half, torch.get_num_threads())
    moved = plan.pop("read_bytes") + plan.pop("write_bytes")
    return {
        "kernel": "one pass of chunk maxima and sums, then the chunks above the threshold",
        "why": "one kernel serves every k",
        "bytes": float(moved),
        **plan,
    }
