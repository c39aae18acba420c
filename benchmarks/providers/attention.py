"""Attention: flashkern, torch's fused SDPA in the ways that its users call it, and eager math.

FLOPs are 4 heads queries keys head_dim for the forward pass (half of it when causal, and only real
tokens of a padded batch), 2.5 times that for the backward pass. The error is measured on one group
of heads of one sequence: heads do not mix, so a slice of the inputs gives its exact result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import flashkern as fk
from benchmarks.problem import DTYPE_BYTES, DTYPES, Problem
from benchmarks.profiles import Attention
from benchmarks.sampler import FLASHKERN, Contender


@dataclass
class Inputs:
    case: Attention
    query: Tensor  # (batch, heads, queries, dim)
    key: Tensor
    value: Tensor
    grad: Tensor
    lengths: list[int]  # of each sequence
    pages: Any = None  # of a cache in pages, made once

    @property
    def group(self) -> int:
        return self.case.heads // self.case.kv_heads

    @property
    def probe(self) -> int:
        """The sequence whose error is measured: one with padding, where there is any."""
        return self.case.batch // 2

    def packed(self, x: Tensor) -> Tensor:
        """(tokens, heads, dim) without padding."""
        rows = x.transpose(1, 2)
        return torch.cat([rows[b, :n] for b, n in enumerate(self.lengths)]).contiguous()


def inputs(case: Attention) -> Inputs:
    def draw(heads: int, length: int) -> Tensor:
        x = torch.randn(case.batch, heads, length, case.dim).to(DTYPES[case.dtype])
        return x.requires_grad_(case.mode == "training")

    lengths = [case.kv] * case.batch
    if case.mode in ("padded", "varlen"):
        spread = torch.linspace(case.kv / 8, case.kv, case.batch)
        lengths = [max(1, int(n)) for n in spread]
    return Inputs(
        case,
        draw(case.heads, case.queries),
        draw(case.kv_heads, case.kv),
        draw(case.kv_heads, case.kv),
        torch.randn(case.batch, case.heads, case.queries, case.dim).to(DTYPES[case.dtype]),
        lengths,
    )


# ---- what everyone computes ----


def _repeat(x: Tensor, times: int) -> Tensor:
    return x.repeat_interleave(times, dim=1) if times > 1 else x


def _mask(made: Inputs) -> Tensor | None:
    """True where a query may attend, as transformers builds it for a padded batch."""
    case = made.case
    if case.mode == "padded":
        keys = torch.arange(case.kv)
        mask = keys < torch.tensor(made.lengths).view(-1, 1, 1, 1)
        if case.causal:
            mask = mask & (keys <= torch.arange(case.queries).view(-1, 1))
        return mask.expand(case.batch, 1, case.queries, case.kv).contiguous()
    return None


def _eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Attention as transformers writes it out: a matrix product, a softmax, a matrix product."""
    group = q.shape[1] // k.shape[1]
    scores = q @ _repeat(k, group).transpose(2, 3) * q.shape[-1] ** -0.5
    if causal and q.shape[2] > 1:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return weights @ _repeat(v, group)


def _wrap(name: str, made: Inputs, forward: Callable[..., Tensor], role: str = "peer") -> Contender:
    """A contender that runs `forward(query, key, value)`, and its backward pass when training."""
    q, k, v = made.query, made.key, made.value
    row, group = made.probe, made.group
    length = made.lengths[row] if made.case.mode == "padded" else made.case.queries

    if made.case.mode == "training":

        def train() -> tuple[Tensor, ...]:
            out = forward(q, k, v)
            return out, *torch.autograd.grad(out, (q, k, v), made.grad)

        def slices(results: tuple[Tensor, ...]) -> list[Tensor]:
            counts = (group, group, 1, 1)
            return [x[row : row + 1, :n] for x, n in zip(results, counts, strict=True)]

        return Contender(name, train, role, unpack=slices)

    def infer() -> Tensor:
        with torch.no_grad():
            return forward(q, k, v)

    return Contender(name, infer, role, unpack=lambda out: [out[row : row + 1, :group, :length]])


# ---- providers ----


def _flashkern(made: Inputs) -> Contender:
    case = made.case
    if case.mode == "padded":
        lengths = torch.tensor(made.lengths, dtype=torch.int32)
        return _wrap(
            FLASHKERN,
            made,
            lambda q, k, v: fk.attention(q, k, v, causal=case.causal, kv_lengths=lengths),
            FLASHKERN,
        )
    if case.mode == "decode":
        return _wrap(FLASHKERN, made, lambda q, k, v: fk.attention(q, k, v), FLASHKERN)
    gqa = made.group > 1
    return _wrap(
        FLASHKERN,
        made,
        lambda q, k, v: fk.scaled_dot_product_attention(
            q, k, v, is_causal=case.causal, enable_gqa=gqa
        ),
        FLASHKERN,
    )


def _sdpa(made: Inputs) -> Contender:
    mask, gqa = _mask(made), made.group > 1
    causal = made.case.causal and mask is None and made.case.queries > 1

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=gqa
        )

    return _wrap("torch sdpa", made, forward)


def _sdpa_repeated(made: Inputs) -> Contender:
    mask, group = _mask(made), made.group
    causal = made.case.causal and mask is None and made.case.queries > 1

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = _repeat(k, group), _repeat(v, group)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)

    return _wrap("sdpa, kv repeated", made, forward)


def _sdpa_folded(made: Inputs) -> Contender:
    """One query token: the query heads of a group become rows of one head (transformers' pack)."""
    case, group = made.case, made.group

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        folded = q.reshape(case.batch, case.kv_heads, group, case.dim)
        return F.scaled_dot_product_attention(folded, k, v).reshape(q.shape)

    return _wrap("sdpa, heads folded", made, forward)


def _sdpa_causal(made: Inputs) -> Contender:
    """Padding on the right needs no mask when attention is causal: real queries never see it."""
    gqa = made.group > 1

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)

    return _wrap("sdpa, causal only", made, forward)


def _math(made: Inputs) -> Contender:
    mask, causal = _mask(made), made.case.causal and made.case.mode in ("prefill", "training")
    return _wrap("torch eager", made, lambda q, k, v: _eager(q, k, v, mask, causal))


def _varlen(made: Inputs) -> Contender:
    case = made.case
    starts = torch.tensor([0, *made.lengths]).cumsum(0).to(torch.int32)
    q, k, v = (made.packed(x) for x in (made.query, made.key, made.value))
    longest = max(made.lengths)

    def call() -> Tensor:
        with torch.no_grad():
            return fk.attention_varlen(
                q, k, v, starts, starts, longest, longest, causal=case.causal
            )

    return Contender(FLASHKERN, call, FLASHKERN, unpack=_unpack_varlen(made))


def _varlen_loop(made: Inputs) -> Contender:
    case, gqa = made.case, made.group > 1
    parts = [made.packed(x).split(made.lengths) for x in (made.query, made.key, made.value)]
    views = [[x.transpose(0, 1).unsqueeze(0) for x in part] for part in parts]

    def call() -> Tensor:
        with torch.no_grad():
            outs = [
                F.scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=gqa)
                for q, k, v in zip(*views, strict=True)
            ]
            return torch.cat([out.squeeze(0).transpose(0, 1) for out in outs])

    return Contender("sdpa, one by one", call, unpack=_unpack_varlen(made))


def _unpack_varlen(made: Inputs) -> Callable[[Tensor], list[Tensor]]:
    row = made.probe
    start = sum(made.lengths[:row])
    end = start + made.lengths[row]
    return lambda out: [out[start:end, : made.group].transpose(0, 1).unsqueeze(0)]


def _varlen_padded(made: Inputs) -> Contender:
    """SDPA on the padded batch with a mask, not charged for padding and unpadding."""
    padded = Inputs(**{**vars(made), "case": _as_padded(made.case)})
    contender = _sdpa(padded)
    contender.name = "sdpa, padded"
    return contender


def _as_padded(case: Attention) -> Attention:
    return Attention(**{**vars(case), "mode": "padded"})


def factories(case: Attention) -> dict[str, Callable[[Inputs], Contender]]:
    if case.gpu:
        from benchmarks.providers import attention_gpu

        return attention_gpu.factories(case)
    if case.mode == "varlen":
        return {
            FLASHKERN: _varlen,
            "sdpa, one by one": _varlen_loop,
            "sdpa, padded": _varlen_padded,
        }
    found: dict[str, Callable[[Inputs], Contender]] = {FLASHKERN: _flashkern, "torch sdpa": _sdpa}
    if case.mode == "padded" and case.causal:
        found["sdpa, causal only"] = _sdpa_causal
    if case.heads != case.kv_heads:
        if case.mode == "decode":
            found["sdpa, heads folded"] = _sdpa_folded
        else:
            found["sdpa, kv repeated"] = _sdpa_repeated
    found["torch eager"] = _math
    return found


# ---- the work and the truth ----


def _work(made: Inputs) -> tuple[int, int]:
    case = made.case
    pairs = sum(n * n for n in made.lengths) if case.queries > 1 else case.batch * case.kv
    flops = 4 * case.heads * pairs * case.dim
    if case.causal and case.queries > 1:
        flops //= 2
    queries = sum(made.lengths) if case.queries > 1 else case.batch
    keys = sum(made.lengths)
    elements = 2 * case.dim * (queries * case.heads + keys * case.kv_heads)  # q, out; k, v
    size = elements * DTYPE_BYTES[case.dtype]
    if case.mode == "training":
        return flops * 7 // 2, 2 * size
    return flops, size


def problem(case: Attention, made: Inputs, contenders: list[Contender]) -> Problem:
    def exact(_: str) -> list[Tensor]:
        row, group, length = made.probe, made.group, made.lengths[made.probe]
        q_length = length if case.queries > 1 else 1
        q = made.query.detach()[row : row + 1, :group, :q_length].double()
        k, v = (x.detach()[row : row + 1, :1, :length].double() for x in (made.key, made.value))
        leaves = [x.requires_grad_(case.mode == "training") for x in (q, k, v)]
        out = _eager(*leaves, None, case.causal)
        if case.mode != "training":
            return [out]
        grad = made.grad[row : row + 1, :group].double()
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    flops, size = _work(made)
    facts: dict[str, Any] = {"batch": case.batch, "queries": case.queries, "keys": case.kv}
    facts |= {"head_dim": case.dim, "heads": case.heads, "kv_heads": case.kv_heads}
    facts["causal"] = case.causal
    return Problem(contenders, flops, size, exact, facts=facts)
