"""The linear layers that beam search swaps for its while."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed")

from flashkern.integrations import _few_rows
from flashkern.integrations._beam_search import beam_search
from flashkern.integrations._few_rows import FewRowsLinear, few_rows
from tests.integrations.tiny import MODELS, VOCAB


@pytest.fixture(autouse=True)
def small_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_few_rows, "LEAST_BYTES", 0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_torch(dtype: torch.dtype, bias: bool) -> None:
    layer = nn.Linear(72, 40, bias=bias, dtype=dtype, device="cpu")
    exact = copy.deepcopy(layer).double()
    with torch.no_grad(), few_rows(layer):
        for shape in ((1,), (4,), (5, 1), (2, 3), (16, 1), (17,), (0,)):
            x = torch.randn(*shape, 72, dtype=dtype, device="cpu")
            tolerance = 1e-5 if dtype is torch.float32 else 2e-2
            torch.testing.assert_close(
                layer(x).double(), exact(x.double()), atol=tolerance, rtol=tolerance
            )


class Scaled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def test_which_layers_and_until_when() -> None:
    with torch.device("cpu"):
        model = nn.ModuleDict({n: nn.Linear(8, 8) for n in ("plain", "patched", "wide")})
        model["scaled"] = Scaled(8, 8)
        model["exact"] = nn.Linear(8, 8, dtype=torch.float64)
    model["patched"].forward = model["plain"].forward  # type: ignore[method-assign]
    before, keys = {n: type(m) for n, m in model.items()}, list(model.state_dict())
    with pytest.raises(KeyError), few_rows(model):
        assert {n for n, m in model.items() if type(m) is FewRowsLinear} == {"plain", "wide"}
        assert list(model.state_dict()) == keys
        with few_rows(model):  # a search within a search, or beside it
            pass
        assert type(model["plain"]) is FewRowsLinear
        raise KeyError
    assert {n: type(m) for n, m in model.items()} == before


def test_gradients_and_autocast_are_torchs() -> None:
    layer = nn.Linear(8, 8, device="cpu")
    x = torch.randn(3, 8, device="cpu", requires_grad=True)
    with few_rows(layer):
        layer(x).sum().backward()
        assert layer.weight.grad is not None and x.grad is not None
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_a_search_runs_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS[name].build("eager").eval().to("cpu")
    rows = []
    forward = FewRowsLinear.forward

    def noted(self: FewRowsLinear, input: torch.Tensor) -> torch.Tensor:
        rows.append(input.numel() // input.shape[-1])
        return forward(self, input)

    monkeypatch.setattr(FewRowsLinear, "forward", noted)
    ids = torch.randint(3, VOCAB, (1, 6), device="cpu")
    kwargs = {"num_beams": 4, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ours = model.generate(ids, custom_generate=beam_search, **kwargs)
    assert 4 in rows
    assert torch.equal(ours, model.generate(ids, **kwargs))
    assert not any(type(m) is FewRowsLinear for m in model.modules())
