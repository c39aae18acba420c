"""PEFT layers with a swapped class: values, gradients, files and behaviour are PEFT's own."""

import logging

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from peft.tuners.lora.layer import Linear  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM  # noqa: E402

from flashkern.integrations import peft as fk_peft  # noqa: E402

IDS = torch.tensor([[3, 14, 15, 9, 2, 6, 5, 35], [8, 9, 7, 9, 3, 2, 3, 8]])


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=41,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).to(dtype)


def adapted(dtype: torch.dtype = torch.float32, **options):
    defaults = dict(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(llama(dtype), LoraConfig(**(defaults | options)))


def step(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(5)
    ids = IDS.to(model.device)
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return out.logits.detach(), grads


def alike(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert got.dtype == want.dtype
    assert (got - want).norm() <= tolerance * want.norm().clamp_min(1e-6)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names the fused forwards that ran, so that a test knows which path it saw."""
    calls = []
    for name in ("lora_linear", "lora_linear_multi"):
        original = getattr(fk_peft, name)

        def spy(*args, _name=name, _original=original, **kwargs):
            calls.append(_name)
            return _original(*args, **kwargs)

        monkeypatch.setattr(fk_peft, name, spy)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_logits_and_gradients(fused: list[str], dtype: torch.dtype, backend: str) -> None:
    model = adapted(dtype)  # PEFT makes the adapters float32
    model.train()
    before, grads = step(model)
    report = fk_peft.patch(model)
    assert len(report.patched) == 14 and not report.left and not report.waiting
    after, fused_grads = step(model)
    assert fused == ["lora_linear"] * 14
    tolerance = 1e-4 if dtype == torch.float32 else 6e-2
    alike(after, before, tolerance)
    assert fused_grads.keys() == grads.keys() and len(grads) == 28
    for name, grad in grads.items():
        alike(fused_grads[name], grad, 2 * tolerance)
    assert fk_peft.unpatch(model) == 14
    assert torch.equal(step(model)[0], before)
    assert all(type(m) is not fk_peft.FusedLinear for m in model.modules())


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> str:
    """A device with kernels that is not the CPU: meta tensors stand for those of a GPU."""
    monkeypatch.setattr(fk_peft, "_DEVICES", ["meta"], raising=False)
    return "meta"


def test_fused_wherever_the_build_has_kernels(
    fused: list[str], elsewhere: str, backend: str
) -> None:
    on_cpu = fk_peft.patch(adapted())
    assert "on device cpu" in str(on_cpu) and len(on_cpu.waiting) == 14
    model = adapted().to(elsewhere)
    report = fk_peft.patch(model)
    assert len(report.patched) == 14 and not report.waiting
    model(input_ids=IDS.to(elsewhere))
    assert fused == ["lora_linear"] * 14


def test_mixed_batch_elsewhere(
    fused: list[str], elsewhere: str, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """All that the operator reads lies where x does; what the host knows is copied there once."""
    model = adapted()
    model.add_adapter("second", LoraConfig(r=7, target_modules="all-linear"))
    model = model.to(elsewhere).eval()
    fk_peft.patch(model)
    copies, tensor = [], torch.tensor

    def spy(values, **kwargs):
        if values and kwargs.get("device") == torch.device(elsewhere):
            copies.append(values)
        return tensor(values, **kwargs)

    fk_peft._copied.cache_clear()

    monkeypatch.setattr(torch, "tensor", spy)
    ids, names = IDS[[0, 1, 0, 1]].to(elsewhere), ["second", "__base__", "default", "second"]
    for scaling in (2.0, 0.75):
        for layer in model.modules():
            if isinstance(layer, Linear):
                layer.set_scale("second", scaling)
        with torch.inference_mode():
            model(input_ids=ids, adapter_names=names)
    assert fused == ["lora_linear_multi"] * 28
    assert copies == [(0, -1, 1, 0), (2 * 8 / 7, 2.0), (0.75 * 8 / 7, 2.0)]
    model(input_ids=ids, adapter_names=names).logits.sum().backward()  # saves what inference made


def test_state_dict_save_and_load(tmp_path) -> None:
    model = adapted().eval()
    keys, logits = list(model.state_dict()), model(input_ids=IDS).logits
    fk_peft.patch(model)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert fk_peft.patch(loaded).patched
    alike(loaded(input_ids=IDS).logits, logits)
    model.load_state_dict(loaded.state_dict())


def test_several_adapters_disable_merge(fused: list[str]) -> None:
    model = adapted().eval()
    fk_peft.patch(model)
    config = LoraConfig(r=6, target_modules="all-linear", init_lora_weights=False)
    model.add_adapter("second", config)

    def compare() -> int:
        fused.clear()
        got = model(input_ids=IDS).logits
        count = len(fused)
        fk_peft.unpatch(model)
        alike(got, model(input_ids=IDS).logits)
        fk_peft.patch(model)
        return count

    assert compare() == 14
    model.set_adapter("second")
    assert compare() == 14
    model.base_model.set_adapter(["default", "second"])
    assert compare() == 0  # several active adapters: PEFT's own forward
    model.set_adapter("default")
    with model.disable_adapter():
        assert compare() == 0
    model.merge_adapter()
    assert compare() == 0
    model.unmerge_adapter()
    for layer in model.modules():
        if isinstance(layer, Linear):
            layer.set_scale("default", 0.25)
    assert compare() == 14
    merged = model.merge_and_unload()
    assert not any(isinstance(m, Linear) for m in merged.modules())


def test_mixed_batch(fused: list[str]) -> None:
    model = adapted(lora_dropout=0.3).eval()
    config = LoraConfig(r=7, target_modules="all-linear", init_lora_weights=False)
    model.add_adapter("second", config)
    ids = IDS[[0, 1, 0, 1]]
    names = ["second", "__base__", "default", "second"]
    want = model(input_ids=ids, adapter_names=names).logits
    fk_peft.patch(model)
    got = model(input_ids=ids, adapter_names=names).logits
    assert fused == ["lora_linear_multi"] * 14
    alike(got, want, 1e-4)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(input_ids=ids, adapter_names=names[:3])


def test_checkpointing_with_dropout(fused: list[str]) -> None:
    model = adapted(lora_dropout=0.4)
    fk_peft.patch(model)
    model.train()
    logits, grads = step(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    fused.clear()
    again, again_grads = step(model)
    assert len(fused) == 28  # the forward ran twice, with the same masks
    assert torch.equal(again, logits)
    for name, grad in grads.items():
        alike(again_grads[name], grad, 1e-6)
    model.eval()
    assert not torch.equal(model(input_ids=IDS).logits, logits)  # no dropout in eval


def test_autocast(fused: list[str]) -> None:
    model = adapted().eval()
    exact = model(input_ids=IDS).logits
    with torch.autocast("cpu", torch.bfloat16):
        want = model(input_ids=IDS).logits
        fk_peft.patch(model)
        got = model(input_ids=IDS).logits
    assert fused and got.dtype == want.dtype
    assert (got - exact).norm() <= 2 * (want - exact).norm()


def test_guards(fused: list[str]) -> None:
    model = adapted().train()
    fk_peft.patch(model)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 32)

    def reason(part: str) -> None:
        fused.clear()
        assert part in fk_peft.obstacle(layer)
        layer(x)
        assert not fused

    seen = []
    for child in (layer.base_layer, layer.lora_A["default"], layer.lora_dropout["default"]):
        handle = child.register_forward_hook(lambda *_: seen.append(1))
        reason("hooks")
        handle.remove()
    assert len(seen) == 3  # PEFT's forward called the hooks
    layer.base_layer.weight.requires_grad_()
    reason("not frozen")
    layer.base_layer.weight.requires_grad_(False)
    layer.lora_A["default"].to(torch.bfloat16)
    assert "neither float32" in fk_peft.obstacle(layer)
    layer.lora_A["default"].to(torch.float32)
    layer(x)
    assert fused == ["lora_linear"]


def test_what_is_left_and_why(caplog: pytest.LogCaptureFixture) -> None:
    dora = adapted(use_dora=True)
    biased = adapted(lora_bias=True)
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=41, n_embd=32, n_layer=1, n_head=2))
    conv = get_peft_model(gpt2, LoraConfig(target_modules=["c_attn", "wte"], fan_in_fan_out=True))
    with caplog.at_level(logging.INFO, logger="flashkern"):
        report = fk_peft.patch(dora)
    assert "14 PEFT LoRA layers patched" in caplog.text
    assert len(report.waiting) == 14 and "is a variant" in str(report)
    assert "lora_bias" in str(fk_peft.patch(biased))
    report = fk_peft.patch(conv)
    assert not report.patched and len(report.left) == 2
    assert "Conv1D" in str(report) and "Embedding" in str(report)
    assert set(fk_peft.patch(dora).left.values()) == {"it is patched already"}
    for model in (dora.eval(), biased.eval(), conv.eval()):
        logits = model(input_ids=IDS).logits
        fk_peft.unpatch(model)
        assert torch.equal(model(input_ids=IDS).logits, logits)


def test_compiled(fused: list[str]) -> None:
    net = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
    config = LoraConfig(target_modules=["0", "2"], init_lora_weights=False)
    model = get_peft_model(net, config).eval()
    x = torch.randn(5, 16)
    want = model(x)
    fk_peft.patch(model)
    torch._dynamo.reset()
    alike(torch.compile(model, backend="eager")(x), want)
    assert fused
