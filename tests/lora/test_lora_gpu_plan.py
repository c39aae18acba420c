"""Who computes the base product on which GPU, and how a call is cut there."""

from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

import flashkern as fk
from flashkern import _host

CHOICES = {"auto": 0, "blas": 1, "own": 2}


def plan(rows: int, choice: str = "auto", **options: Any) -> dict[str, Any]:
    shape: dict[str, Any] = {"depth": 4096, "columns": 4096, "rank": 16, "dtype": "bfloat16"}
    return _host.lora_gpu_plan(rows, choice=CHOICES[choice], **(shape | options))


@pytest.mark.parametrize("capability", [80, 86, 89, 120])
def test_own_tiles_where_mma_is_the_full_rate(capability: int) -> None:
    cut = plan(4096, capability=capability)
    assert cut["base"] == cut["backward_base"] == "tiles"


@pytest.mark.parametrize("capability", [90, 100, 103, 110])
def test_blas_where_wgmma_is(capability: int) -> None:
    cut = plan(4096, capability=capability)
    assert cut["base"] == cut["backward_base"] == "blas"
    short = plan(4096, capability=capability, depth=512)
    assert (short["base"], short["backward_base"]) == ("tiles", "blas")  # dx sums over columns
    assert plan(4096, "own", capability=capability)["base"] == "tiles"
    assert plan(65, capability=capability)["base"] == "blas"


@pytest.mark.parametrize("capability", [80, 90])
def test_few_rows_read_the_weight_once(capability: int) -> None:
    cut = plan(64, capability=capability)
    assert cut["base"] == "few" and cut["launches"] == 1 and cut["shrink_blocks"] == 0
    assert cut["blocks"] == 4096 // cut["tile_columns"]
    assert plan(64, capability=capability, dropout=True)["shrink_blocks"] > 0
    assert plan(64, capability=capability, rank=17)["shrink_blocks"] > 0  # of a float32 adapter
    assert plan(64, capability=capability, rank=32, adapter="bfloat16")["shrink_blocks"] == 0
    assert plan(64, capability=capability, depth=4095)["base"] == "tiles"  # rows of odd addresses
    assert plan(64, "blas", capability=capability)["base"] == "blas"


@pytest.mark.parametrize("capability", [80, 90])
def test_float32_is_blas(capability: int) -> None:
    assert plan(4, dtype="float32", capability=capability)["base"] == "blas"
    assert plan(4, "own", dtype="float32", capability=capability)["base"] == "tiles"


@pytest.mark.parametrize("rows", [65, 1000, 50000])
def test_a_shrink_is_split_where_rows_do_not_fill_the_machine(rows: int) -> None:
    cut = plan(rows)
    assert cut["shrink_blocks"] == -(-rows // 64) * cut["shrink_parts"]
    assert cut["launches"] == 2  # whichever block comes last adds the parts
    parts = cut["shrink_parts"] if cut["shrink_parts"] > 1 else 0
    assert cut["workspace_bytes"] >= 4 * 16 * rows * parts
    assert cut["shrink_parts"] > 1 or rows == 50000


@pytest.mark.parametrize("capability,kernel", [(80, "tensor-core tiles"), (90, "cuBLAS")])
def test_explain_speaks_of_the_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: int, kernel: str
) -> None:
    monkeypatch.setattr("flashkern._plans._capability", lambda x: capability)
    with FakeTensorMode():
        shapes = [(500, 2048), (2048, 2048), (8, 2048), (2048, 8)]
        x, weight, a, b = (torch.empty(s, dtype=torch.bfloat16, device="cuda") for s in shapes)
        plan = fk.explain(fk.lora_linear, x, weight, a, b)
        turned = fk.explain(fk.lora_linear, x, weight.T, a, b)
    assert kernel in plan.kernel and plan.tile["tile_rows"] == 128
    assert "cuBLAS" in turned.kernel
