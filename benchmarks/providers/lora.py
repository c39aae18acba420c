"""LoRA linear: flashkern, PEFT's own layer, a hand-written torch form, and the frozen linear alone.

The frozen linear does less work than the others: it is the limit that an adapter's cost is measured
from, not a peer. A and B are float32 beside bf16 weights, as PEFT keeps them, unless a case says
otherwise. With one adapter of 8 for each row, torch's forms are PEFT's mixed batch, adapter by
adapter, and two batched products over gathered adapters. With dropout each
contender draws its own mask; the exact result is computed with the mask of the one that is judged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flashkern as fk
from benchmarks.problem import DTYPE_BYTES, DTYPES, Problem
from benchmarks.profiles import Lora
from benchmarks.sampler import CONTROL, FLASHKERN, Contender

SCALING = 2.0
ADAPTERS = 8  # of mode "several"
ERROR_SEED = 7  # set before the call whose result is judged


@dataclass
class Inputs:
    case: Lora
    x: Tensor  # (rows, in)
    weight: Tensor  # (out, in), frozen
    a: Tensor  # (rank, in)
    b: Tensor  # (out, rank)
    grad: Tensor  # (rows, out)
    ids: Tensor | None = None  # (rows,): then a and b have one more dimension in front


def inputs(case: Lora) -> Inputs:
    dtype, train = DTYPES[case.dtype], case.mode == "training"
    x = torch.randn(case.rows, case.inputs).to(dtype).requires_grad_(train)
    weight = (torch.randn(case.outputs, case.inputs) * case.inputs**-0.5).to(dtype)
    several = (ADAPTERS,) if case.mode == "several" else ()
    of = DTYPES[case.adapter]
    a = (torch.randn(*several, case.rank, case.inputs) * case.inputs**-0.5).to(of)
    b = (torch.randn(*several, case.outputs, case.rank) * case.rank**-0.5).to(of)
    grad = torch.randn(case.rows, case.outputs).to(dtype)
    ids = torch.randint(0, ADAPTERS, (case.rows,)) if several else None
    return Inputs(case, x, weight, a.requires_grad_(train), b.requires_grad_(train), grad, ids)


def _wrap(
    name: str,
    made: Inputs,
    forward: Callable[[], Tensor],
    leaves: tuple[Tensor, ...],
    role: str = "peer",
) -> Contender:
    def train() -> list[Tensor]:
        out = forward()
        return [out, *torch.autograd.grad(out, leaves, made.grad)]

    def infer() -> list[Tensor]:
        with torch.no_grad():
            return [forward()]

    return Contender(name, train if made.case.mode == "training" else infer, role)


def _flashkern(made: Inputs) -> Contender:
    p = made.case.dropout

    def forward() -> Tensor:
        return fk.lora_linear(made.x, made.weight, made.a, made.b, scaling=SCALING, dropout_p=p)

    return _wrap(FLASHKERN, made, forward, (made.x, made.a, made.b), FLASHKERN)


def _peft(made: Inputs) -> Contender:
    from peft import LoraConfig, get_peft_model

    case = made.case
    base = nn.Sequential()
    base.add_module("proj", nn.Linear(case.inputs, case.outputs, bias=False, dtype=made.x.dtype))
    base.proj.weight.data = made.weight
    config = LoraConfig(
        r=case.rank,
        lora_alpha=SCALING * case.rank,
        lora_dropout=case.dropout,
        target_modules=["proj"],
    )
    layer = get_peft_model(base, config).base_model.model.proj
    layer.train(case.mode == "training")
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    a.data, b.data = made.a.detach().clone(), made.b.detach().clone()
    return _wrap("peft", made, lambda: layer(made.x), (made.x, a, b))


def _addmm(made: Inputs) -> Contender:
    """What one would write by hand: the update is added by the matrix product that makes it."""
    p = made.case.dropout

    def forward() -> Tensor:
        y = F.linear(made.x, made.weight)
        x = F.dropout(made.x, p) if p else made.x
        low = x.to(made.a.dtype) @ made.a.T
        if y.dtype == low.dtype:
            return torch.addmm(y, low, made.b.T, alpha=SCALING)
        return torch.addmm(y.to(low.dtype), low, made.b.T, alpha=SCALING).to(y.dtype)

    return _wrap("torch addmm", made, forward, (made.x, made.a, made.b))


def _frozen(made: Inputs) -> Contender:
    return _wrap("frozen linear", made, lambda: F.linear(made.x, made.weight), (made.x,), "limit")


# ---- one of several adapters for each row ----


def _several(made: Inputs) -> Contender:
    def forward() -> Tensor:
        return fk.lora_linear_multi(made.x, made.weight, made.a, made.b, made.ids, scaling=SCALING)

    return _wrap(FLASHKERN, made, forward, (), FLASHKERN)


def _by_adapter(made: Inputs) -> Contender:
    """PEFT's mixed batch: the rows of one adapter after those of another."""
    assert made.ids is not None
    groups = [(n, (made.ids == n).nonzero()[:, 0]) for n in made.ids.unique().tolist()]

    def forward() -> Tensor:
        y = F.linear(made.x, made.weight)
        for n, rows in groups:
            low = made.x[rows].to(made.a.dtype) @ made.a[n].T
            y[rows] += ((low @ made.b[n].T) * SCALING).to(y.dtype)
        return y

    return _wrap("adapter by adapter", made, forward, ())


def _gathered(made: Inputs) -> Contender:
    if made.case.rows > 64:
        raise ImportError("a copy of A and B for each row is too much")

    def forward() -> Tensor:
        low = torch.bmm(made.a[made.ids], made.x.to(made.a.dtype)[:, :, None])
        update = torch.bmm(made.b[made.ids], low)[:, :, 0]
        y = F.linear(made.x, made.weight)
        return y + (update * SCALING).to(y.dtype)

    return _wrap("adapters gathered", made, forward, ())


def factories(case: Lora) -> dict[str, Callable[[Inputs], Contender]]:
    if case.mode == "several":
        return {
            FLASHKERN: _several,
            "adapter by adapter": _by_adapter,
            "adapters gathered": _gathered,
            "frozen linear": _frozen,
        }
    return {
        FLASHKERN: _flashkern,
        "peft": _peft,
        "torch addmm": _addmm,
        "frozen linear": _frozen,
    }


def _mask(made: Inputs, name: str) -> Tensor | float:
    """What dropout multiplies x with when the contender `name` runs behind ERROR_SEED."""
    p = made.case.dropout
    if not p:
        return 1.0
    torch.manual_seed(ERROR_SEED)
    if name in (FLASHKERN, CONTROL):
        from flashkern.random import draw_seed, lora_keep_mask

        return lora_keep_mask(draw_seed(), p, made.case.rows, made.case.inputs) / (1 - p)
    # PEFT casts x to the adapter's dtype before dropout, the hand-written form does not.
    dtype = made.a.dtype if name == "peft" else made.x.dtype
    return F.dropout(torch.ones(made.x.shape, dtype=dtype), p).double()


def _update(x: Tensor, a: Tensor, b: Tensor, ids: Tensor | None) -> Tensor:
    """The rows' updates, each by its own adapter."""
    assert ids is not None
    out = x.new_zeros(x.shape[0], b.shape[1])
    for n in range(ADAPTERS):
        out[ids == n] = (x[ids == n] @ a[n].T) @ b[n].T
    return out


def problem(case: Lora, made: Inputs, contenders: list[Contender]) -> Problem:
    def exact(name: str) -> list[Tensor]:
        x, a, b = (t.detach().double() for t in (made.x, made.a, made.b))
        leaves = [t.requires_grad_(case.mode == "training") for t in (x, a, b)]
        y = x @ made.weight.double().T
        if case.mode == "several" and name != "frozen linear":
            return [y + SCALING * _update(x, a, b, made.ids)]
        if name != "frozen linear":
            y = y + SCALING * ((x * _mask(made, name)) @ a.T) @ b.T
        if case.mode != "training":
            return [y]
        wanted = leaves if name != "frozen linear" else leaves[:1]
        return [y.detach(), *torch.autograd.grad(y, wanted, made.grad.double())]

    dense = 2 * case.rows * case.inputs * case.outputs
    low = 2 * case.rows * case.rank * (case.inputs + case.outputs)
    size = DTYPE_BYTES[case.dtype]
    adapters = DTYPE_BYTES[case.adapter] * (made.a.numel() + made.b.numel())
    rows = size * case.rows * (case.inputs + case.outputs)
    weight = size * case.inputs * case.outputs
    training = case.mode == "training"
    flops = 2 * dense + 3 * low if training else dense + low
    traffic = weight + 2 * (rows + adapters) if training else weight + rows + adapters
    facts = {"rows": case.rows, "inputs": case.inputs, "outputs": case.outputs}
    facts |= {"rank": case.rank, "dropout": case.dropout}
    return Problem(contenders, flops, traffic, exact, case.dropout > 0, facts)
