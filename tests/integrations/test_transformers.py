"""attn_implementation="fkern" against each model's own attention, on tiny random models."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers as hf

import flashkern
import flashkern.integrations.transformers as fkt
from tests.integrations.tiny import LLAMA, MODELS, Tiny, inputs

DECODERS = [name for name, tiny in MODELS.items() if tiny.kind == "decoder"]
WRITERS = [name for name, tiny in MODELS.items() if tiny.kind in ("decoder", "seq2seq", "speech")]
ATTENTIONS = {"bart": 6, "marian": 6, "t5": 6, "whisper": 6}  # calls in one forward pass, else 2


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    fkt.enable()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are tiny
    yield
    torch.set_num_threads(threads)
    fkt.disable()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The operator and the keyword arguments of every call of flashkern's attention, in order."""
    seen: list[dict[str, Any]] = []

    def spy_on(name: str) -> None:
        real = getattr(flashkern, name)

        def spy(query: Any, key: Any, *rest: Any, **options: Any) -> Any:
            given = {"causal": False, "window": None, "bias": None, "kv_lengths": None, **options}
            seen.append({"operator": name, "keys": key.shape[-2], **given})
            return real(query, key, *rest, **options)

        monkeypatch.setattr(flashkern, name, spy)

    spy_on("attention")
    spy_on("attention_varlen")
    return seen


@functools.cache
def built(name: str) -> tuple[Any, Any]:
    """The same random model twice, as its authors run it and on flashkern: not to be changed."""
    tiny: Tiny = MODELS[name]
    theirs = tiny.build(tiny.oracle).eval()
    ours = tiny.build(tiny.oracle if tiny.patched else fkt.NAME).eval()
    if tiny.patched:
        assert fkt.patch(ours) == 2
    return theirs, ours


def pair(name: str) -> tuple[Any, Any]:
    """Both models, on the device where new tensors land."""
    theirs, ours = built(name)
    device = torch.empty(0).device
    return theirs.to(device), ours.to(device)


def output(model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    result = model(**given)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


def assert_same(got: torch.Tensor, expected: torch.Tensor, real: torch.Tensor) -> None:
    real = real.bool().expand(got.shape[:2])
    error = (got[real] - expected[real]).abs().max().item()
    assert error <= 2e-5 * max(1.0, expected[real].abs().max().item())


@pytest.mark.parametrize("name", MODELS)
def test_outputs_equal_the_models_own(name: str, calls: list[dict[str, Any]]) -> None:
    kind = MODELS[name].kind
    padded = ["none"] if kind in ("vision", "speech") else ["none", "left", "right", "holes"]
    theirs, ours = pair(name)
    for padding in padded:
        given, real = inputs(kind, padding)
        calls.clear()
        with torch.no_grad():
            assert_same(output(ours, given), output(theirs, given), real)
        assert len(calls) == ATTENTIONS.get(name, 2)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_writes_the_same_tokens(name: str, cache: str | None) -> None:
    tiny = MODELS[name]
    if cache == "static" and not tiny.static:
        pytest.skip(f"transformers gives {name} no static cache")
    theirs, ours = pair(name)
    given, _ = inputs(tiny.kind, "left" if tiny.kind == "decoder" else "right")
    given.pop("decoder_input_ids", None)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    if cache is not None:
        options["cache_implementation"] = cache
    assert torch.equal(ours.generate(**given, **options), theirs.generate(**given, **options))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bart"])
@pytest.mark.parametrize("beams", [1, 3])
def test_greedy_and_beam_search_write_the_same_tokens(name: str, beams: int, backend: str) -> None:
    theirs, ours = pair(name)
    given, _ = inputs(MODELS[name].kind, "right")
    given.pop("decoder_input_ids", None)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    assert torch.equal(ours.generate(**given, **options), theirs.generate(**given, **options))


@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_the_models_own(name: str) -> None:
    given, real = inputs(MODELS[name].kind, "right")
    if MODELS[name].kind in ("vision", "speech"):
        given, real = inputs(MODELS[name].kind)
    grads = []
    for model in pair(name):
        model.zero_grad()
        out = output(model, given) * real.bool().unsqueeze(-1)
        (out * torch.linspace(-1, 1, out.shape[-1])).mean().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    expected, got = grads
    assert got.keys() == expected.keys()
    largest = max(grad.abs().max().item() for grad in expected.values())
    for parameter, grad in expected.items():
        error = (got[parameter] - grad).norm().item()
        assert error <= 1e-3 * grad.norm().item() + 1e-5 * largest, parameter


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "bloom"])
def test_dropout_follows_the_seed_of_torch(name: str, calls: list[dict[str, Any]]) -> None:
    ours = copy.deepcopy(pair(name)[1]).train()
    given, _ = inputs(MODELS[name].kind)

    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return output(ours, given)

    with torch.no_grad():
        assert torch.equal(run(1), run(1))
        assert not torch.equal(run(1), run(2))
    assert all(call["dropout_p"] == 0.1 for call in calls)


def test_causal_masks_reach_the_kernel_as_arguments(calls: list[dict[str, Any]]) -> None:
    _, llama = pair("llama")
    for padding, operator, lengths, bias in (
        ("none", "attention", None, None),
        ("right", "attention", [13, 9, 4], None),
        ("left", "attention_varlen", None, None),
        ("holes", "attention", None, (3, 1, 1, 13)),
    ):
        calls.clear()
        with torch.no_grad():
            llama(**inputs("decoder", padding)[0])
        call = calls[0]
        assert call["operator"] == operator
        assert call["causal"] == (True if operator == "attention_varlen" else "bottom_right")
        got = call["kv_lengths"]
        assert got is None if lengths is None else got.tolist() == lengths
        assert call["bias"] is None if bias is None else call["bias"].shape == bias


def test_windows_reach_the_kernel_as_arguments(calls: list[dict[str, Any]]) -> None:
    _, gemma = pair("gemma3")
    with torch.no_grad():
        gemma(**inputs("decoder")[0])
    assert [call["window"] for call in calls] == [(4, None), None]
    assert all(call["bias"] is None for call in calls)
    _, bert = pair("modernbert")
    calls.clear()
    with torch.no_grad():
        bert(**inputs("encoder")[0])
    windows = [call["window"] for call in calls]
    assert windows.count(None) == 1
    (window,) = (w for w in windows if w is not None)
    assert window[0] == window[1]


def test_a_static_cache_is_read_up_to_the_last_query(calls: list[dict[str, Any]]) -> None:
    _, llama = pair("llama")
    given, _ = inputs("decoder")
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    llama.generate(**given, **options)
    assert calls[0]["causal"] == "bottom_right"
    assert [call["keys"] for call in calls[::2]] == [13, 14, 15, 16]
    calls.clear()
    llama.generate(**inputs("decoder", "left")[0], **options)
    assert [call["keys"] for call in calls[::2]] == [13, 14, 15, 16]


def test_compiled_generation_with_a_static_cache() -> None:
    theirs, ours = copy.deepcopy(pair("llama"))
    given, _ = inputs("decoder", "left")
    options = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": "static"}
    expected = theirs.generate(**given, **options)
    ours.forward = torch.compile(ours.forward, backend="eager", fullgraph=True)
    assert torch.equal(ours.generate(**given, **options), expected)


def test_chunked_prefill_continues_a_cache() -> None:
    for name in ("llama", "mistral", "gemma3", "bloom"):
        theirs, ours = pair(name)
        ids = inputs("decoder")[0]["input_ids"]
        with torch.no_grad():
            whole = theirs(ids).logits[:, 6:]
            cache = ours(ids[:, :6], use_cache=True).past_key_values
            rest = ours(ids[:, 6:], past_key_values=cache).logits
        assert_same(rest, whole, torch.ones(3, 7))


def test_packed_sequences_do_not_see_each_other() -> None:
    theirs, ours = pair("llama")
    ids = inputs("decoder")[0]["input_ids"][:1]
    positions = torch.cat([torch.arange(5), torch.arange(8)])[None]
    with torch.no_grad():
        packed = ours(ids, position_ids=positions, use_cache=False).logits
        first, second = theirs(ids[:, :5]).logits, theirs(ids[:, 5:]).logits
    assert_same(packed, torch.cat([first, second], 1), torch.ones(1, 13))


def test_a_4d_mask_of_the_user_is_used_as_it_is() -> None:
    theirs, ours = pair("llama")
    ids = inputs("decoder")[0]["input_ids"]
    keep = torch.ones(13, 13, dtype=torch.bool).tril()
    keep[5:, 2] = False
    added = torch.zeros(13, 13).masked_fill(~keep, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=added.expand(3, 1, 13, 13)).logits
        for mask in (keep, added):
            got = ours(ids, attention_mask=mask.expand(3, 1, 13, 13)).logits
            assert_same(got, expected, torch.ones(3, 13))


def test_gradient_checkpointing_repeats_the_same_dropout() -> None:
    grads = []
    for checkpointing in (False, True):
        model = MODELS["gpt2"].build(fkt.NAME).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        model(**inputs("decoder", "right")[0], use_cache=False).logits.square().mean().backward()
        grads.append(model.transformer.wte.weight.grad)
    torch.testing.assert_close(grads[0], grads[1])


def test_head_dims_that_are_no_multiple_of_eight() -> None:
    config = {**LLAMA, "head_dim": 6}
    torch.manual_seed(0)
    theirs = hf.LlamaForCausalLM(hf.LlamaConfig(**config, attn_implementation="eager")).eval()
    ours = copy.deepcopy(theirs)
    ours.set_attn_implementation(fkt.NAME)
    given, real = inputs("decoder")
    with torch.no_grad():
        assert_same(ours(**given).logits, theirs(**given).logits, real)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["llama", "gemma2", "t5", "bloom"])
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    given, real = inputs(MODELS[name].kind, "none")
    theirs, ours = copy.deepcopy(pair(name))
    with torch.no_grad():
        exact = output(theirs.double(), given)[real.bool()]
        expected = output(theirs.to(dtype), given)[real.bool()].double()
        got = output(ours.to(dtype), given)[real.bool()].double()
    assert (got - exact).norm() <= 2 * (expected - exact).norm() + 1e-6 * exact.norm()


def test_autocast() -> None:
    theirs, ours = pair("llama")
    given, real = inputs("decoder")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, expected = ours(**given).logits.float(), theirs(**given).logits.float()
    assert (got - expected).norm() <= 0.05 * expected.norm()


def test_compiled_models() -> None:
    theirs, ours = pair("gpt2")
    given, real = inputs("decoder", "right")
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert_same(compiled(**given).logits, theirs(**given).logits, real)
