"""Drop-ins on the back end's own device: torch's switch, transformers, PEFT."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from flashkern.integrations import torch_sdpa

pytestmark = pytest.mark.kernels("attention_forward")
IDS = [[3, 14, 15, 9, 2, 6, 5, 35], [8, 9, 7, 9, 3, 2, 3, 8]]


def llama(**options: object) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=41, hidden_size=64, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, eos_token_id=40, pad_token_id=0, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(torch.get_default_device()).eval()


def test_the_switch_of_torch(backend: str) -> None:
    """Whoever computes it with the switch on, it is what torch computes with it off."""
    tensors = [torch.randn(2, 4, 65, 64, requires_grad=True) for _ in range(3)]
    results = []
    for on in (False, True):
        if on:
            torch_sdpa.enable()
        try:
            out = F.scaled_dot_product_attention(*tensors, is_causal=True)
            results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
        finally:
            if on:
                torch_sdpa.disable()
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3)


def test_transformers_writes_the_same_tokens(backend: str) -> None:
    pytest.importorskip("transformers")
    from flashkern.integrations import transformers as fkt

    ids = torch.tensor(IDS)
    fkt.enable()
    written = []
    for name in ("eager", "fkern"):
        model = llama(attn_implementation=name)
        written.append(model.generate(ids, max_new_tokens=12, do_sample=False))
    assert torch.equal(*written)


@pytest.mark.kernels("lora_linear", "lora_linear_backward")
def test_peft_layers_compute_the_same(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    from flashkern.integrations import peft as fkp

    calls, lora_linear = [], fkp.lora_linear

    def spy(*args: torch.Tensor, **options: object) -> torch.Tensor:
        calls.append(args[0].device.type)
        return lora_linear(*args, **options)

    monkeypatch.setattr(fkp, "lora_linear", spy)
    ids = torch.tensor(IDS)
    config = peft.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(llama(), config).train()
    results = []
    for patched in (False, True):
        if patched:
            report = fkp.patch(model)
            assert len(report.patched) == 14 and not report.waiting and not report.left
        model.zero_grad()
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append([out.logits.detach(), *grads])
    assert calls == [torch.get_default_device().type] * 14
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3)
