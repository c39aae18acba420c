"""explain says which kernel a call runs, what it costs, and refuses what the call would refuse."""

import pytest
import torch

import flashkern as fk


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


def test_lora_and_beam() -> None:
    x, w = torch.randn(5, 64), torch.randn(32, 64)
    plan = fk.explain(fk.lora_linear, x, w, torch.randn(8, 64), torch.randn(32, 8))
    assert plan.flops == 2 * 5 * (64 * 32 + 8 * 96)
    beam = fk.explain("beam_topk", torch.randn(1, 4, 1000), torch.zeros(1, 4), 8)
    assert beam.bytes >= 4 * 1000 * 4 and beam.tile["chunk"] > 0


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
