"""explain says which kernel a call runs, what it costs, and refuses what the call would refuse."""

from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

import flashkern as fk
from flashkern import _ops


def test_attention_prefill_and_decode() -> None:
    q = torch.randn(2, 8, 256, 64)
    plan = fk.explain(fk.attention, q, q, q)
    assert plan.flops == 4 * 2 * 8 * 256 * 256 * 64
    assert plan.kernel == "matrix" and plan.limit == "compute"
    half = fk.explain(fk.attention, q, q, q, causal=True)
    assert half.flops == 4 * 2 * 8 * 64 * 256 * 257 / 2
    cache = torch.randn(2, 8, 4096, 64)
    step = fk.explain(fk.attention, q[:, :, :1], cache, cache)
    assert step.kernel == "decode" and step.limit == "memory"
    assert "why" in str(step) and "limit  memory" in str(step)


def test_bfloat16_is_multiplied_in_pairs_where_the_cpu_does(isa: str) -> None:
    q = torch.randn(1, 2, 256, 64)
    plain, half = (fk.explain(fk.attention, t, t, t) for t in (q, q.bfloat16()))
    assert ("pairs" in half.why) == isa.endswith("_bf16") and "pairs" not in plain.why
    assert plain.peak_flops and half.peak_flops  # measured: no more can be said of them


def test_lora_and_beam() -> None:
    x, w = torch.randn(5, 64), torch.randn(32, 64)
    plan = fk.explain(fk.lora_linear, x, w, torch.randn(8, 64), torch.randn(32, 8))
    assert plan.flops == 2 * 5 * (64 * 32 + 8 * 96)
    beam = fk.explain("beam_topk", torch.randn(1, 4, 1000), torch.zeros(1, 4), 8)
    assert beam.bytes >= 4 * 1000 * 4 and beam.tile["chunk"] > 0
    trie, nodes = fk.Trie.from_sequences([[1, 2]]), torch.zeros(1, 4, dtype=torch.int64)
    call = (torch.randn(1, 4, 1000), torch.zeros(1, 4), 8)
    assert fk.explain("beam_topk", *call, trie=trie, nodes=nodes).bytes == beam.bytes


@pytest.mark.parametrize(
    ("options", "form"),
    [
        ({}, "plain"),
        ({"softcap": 2.0}, "wide"),
        ({"scale": -1.0}, "wide"),
        ({"causal": True}, "plain"),
    ],
)
def test_attention_on_a_gpu_that_is_not_there(options: dict[str, Any], form: str) -> None:
    with FakeTensorMode():
        q = torch.empty(2, 8, 256, 128, device="cuda", dtype=torch.bfloat16)
        cache = torch.empty(2, 2, 4096, 128, device="cuda", dtype=torch.bfloat16)
        new = torch.empty(2, 8, 1, 128, device="cuda", dtype=torch.bfloat16)
        plan = fk.explain(fk.attention, q, q, q, **options)
        step = fk.explain(fk.attention, new, cache, cache)
    assert plan.kernel == form and plan.tile["tile_rows"] == 128 and plan.tile["blocks"] == 32
    assert plan.flops == 4 * 2 * 8 * 128 * (256 * 257 / 2 if "causal" in options else 256 * 256)
    assert step.kernel == "few" and step.tile["splits"] == 4096 // step.tile["split_keys"]
    assert step.tile["blocks"] == 2 * 2 * step.tile["splits"]
    assert plan.peak_flops is None and plan.memory_seconds is None and plan.limit == "unknown"
    assert "on cuda/sm_80" in str(plan) and "limit  unknown" in str(plan)


def test_attention_on_this_back_end(backend: str) -> None:
    q = torch.empty(1, 2, 256, 64)
    plan = fk.explain(fk.attention, q, q, q)
    cpu = backend not in ("emulated", "cuda")
    assert plan.device == ("cpu" if cpu else backend)
    assert plan.kernel == ("matrix" if cpu else "narrow")
    assert (plan.peak_flops is not None) == cpu and ("threads" in str(plan)) == cpu


def test_refusals() -> None:
    q = torch.randn(1, 2, 4, 64)
    with pytest.raises(ValueError, match="explain: op must be one of"):
        fk.explain(torch.add, q, q)
    with pytest.raises(ValueError, match="window must"):
        fk.explain(fk.attention, q, q, q, window=(-3, 0))


def test_nothing_is_computed_and_no_seed_is_drawn() -> None:
    q = torch.randn(1, 2, 4, 64)
    before = torch.get_rng_state()
    fk.explain(fk.attention, q, q, q, dropout_p=0.5)
    assert torch.equal(before, torch.get_rng_state())


def test_fake_tensors_of_an_absent_gpu() -> None:
    with FakeTensorMode():
        half = {"device": "cuda", "dtype": torch.bfloat16}
        q, x = torch.empty(8, 256, 64, **half), torch.empty(512, 1024, **half)
        weight, a = torch.empty(768, 1024, **half), torch.empty(16, 1024, **half)
        b = torch.empty(768, 16, **half)
        plans = [
            fk.explain(fk.scaled_dot_product_attention, q, q, q),
            fk.explain(fk.lora_linear, x, weight, a, b),
            fk.explain(fk.beam_topk, q, torch.empty(8, 256, device="cuda"), 4),
        ]
    has_kernels = _ops.has_kernel("attention_forward", "cuda")
    for plan in plans:
        assert plan.device == "cuda" and plan.peak_flops is None
        assert plan.built == has_kernels
        headline = str(plan).splitlines()[0]
        assert headline.endswith("on cuda/sm_80" + ": no kernel in this build" * (not has_kernels))


def test_beams_that_share_keys() -> None:
    """The rows of all beams meet the shared keys; the work is that of both parts."""
    query, own = torch.randn(8, 4, 1, 32), torch.randn(8, 2, 16, 32)
    shared = torch.randn(2, 2, 500, 32)
    lengths = torch.full((8,), 16)
    alone = fk.explain("attention_kvcache", query, own, own, cache_lengths=lengths)
    plan = fk.explain(
        fk.attention_kvcache, query, own, own, cache_lengths=lengths, shared_k=shared,
        shared_v=shared,
    )  # fmt: skip
    assert "4 beams share a prompt's keys" in plan.why and plan.tile["rows"] == 8
    assert plan.flops == alone.flops + 2 * 8 * 4 * 500 * 64


def test_float64_is_for_cpus_alone_but_in_beam_topk() -> None:
    with FakeTensorMode():
        q = torch.empty(1, 2, 8, 64, device="cuda", dtype=torch.float64)
        with pytest.raises(TypeError, match="attention: tensors must not be float64 on a GPU"):
            fk.explain(fk.attention, q, q, q)
    logits = torch.randn(1, 2, 8).double()
    plan = fk.explain(fk.beam_topk, logits, logits[:, :, 0], 4)
    assert plan.kernel == "plain PyTorch"


def test_packed_sequences_and_many_adapters() -> None:
    q, starts = torch.randn(12, 2, 64), torch.tensor([0, 5, 12])
    plan = fk.explain(fk.attention_varlen, q, q, q, starts, starts, 7, 7, causal=True)
    dense = torch.randn(2, 2, 7, 64)
    assert plan.flops == fk.explain(fk.attention, dense, dense, dense, causal=True).flops
    assert "2 sequences, each counted as the longest" in plan.why
    x, w, ids = torch.randn(5, 64), torch.randn(32, 64), torch.zeros(5, dtype=torch.int64)
    a, b = torch.randn(3, 8, 64), torch.randn(3, 32, 8)
    plan = fk.explain(fk.lora_linear_multi, x, w, a, b, ids)
    assert plan.flops == 2 * 5 * (64 * 32 + 8 * 96) and "3 adapters" in plan.why


def test_the_backward_pass_stands_among_the_work() -> None:
    q = torch.randn(1, 2, 64, 64)
    _, _, tile, work, _ = str(fk.explain(fk.attention, q, q, q)).splitlines()
    assert tile.startswith("  tile") and "backward" not in tile
    assert work.startswith("  work") and work.endswith("; backward 5.243 MFLOP")
