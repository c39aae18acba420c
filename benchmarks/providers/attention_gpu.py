"""Attention's peers on a GPU: each back end of torch's SDPA by itself, FlexAttention, eager math.

A back end that cannot run a case (or that this torch lacks) raises, and the report says so.
FlexAttention compiles for each shape, so it is asked at one length only.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import flashkern as fk
from benchmarks.profiles import Attention
from benchmarks.providers import attention
from benchmarks.sampler import FLASHKERN, Contender

PAGE = 16
_FLEX_LENGTH = 4096
_EAGER_PAIRS = 16 << 20  # of queries and keys in one call: their scores are kept in memory
_BACKENDS = {
    "torch flash": SDPBackend.FLASH_ATTENTION,
    "torch cudnn": SDPBackend.CUDNN_ATTENTION,
    "torch efficient": SDPBackend.EFFICIENT_ATTENTION,
}
Inputs = attention.Inputs
Factory = Callable[[Inputs], Contender]


def _backend(name: str) -> Factory:
    def factory(made: Inputs) -> Contender:
        causal, gqa = made.case.causal and made.case.queries > 1, made.group > 1

        def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(_BACKENDS[name]):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)

        return attention._wrap(name, made, forward)

    return factory


def _folded(name: str) -> Factory:
    """One query: the query heads of a group as rows of one head."""

    def factory(made: Inputs) -> Contender:
        case, group = made.case, made.group

        def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            folded = q.reshape(case.batch, case.kv_heads, group, case.dim)
            with sdpa_kernel(_BACKENDS[name]):
                return F.scaled_dot_product_attention(folded, k, v).reshape(q.shape)

        return attention._wrap(f"{name}, heads folded", made, forward)

    return factory


def _flex(made: Inputs) -> Contender:
    if find_spec("triton") is None:
        raise ImportError("FlexAttention needs triton, which is not installed")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    mask = None
    if made.case.causal:
        sizes = (None, None, made.case.queries, made.case.kv)
        mask = create_block_mask(lambda b, h, i, j: i >= j, *sizes, device=made.query.device.type)
    return attention._wrap(
        "FlexAttention", made, lambda q, k, v: compiled(q, k, v, block_mask=mask)
    )


# ---- a cache in pages ----


def _paged(made: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys and values of `made` in shuffled pages (pages, kv_heads, 16, dim); table; lengths."""
    if made.pages is not None:
        return made.pages
    case = made.case
    count = case.kv // PAGE
    order = torch.randperm(case.batch * count)
    table = torch.empty_like(order, dtype=torch.int32)
    table[:] = order
    pools = []
    for x in (made.key, made.value):
        pages = x.view(case.batch, case.kv_heads, count, PAGE, case.dim).transpose(1, 2)
        pool = torch.empty(case.batch * count, case.kv_heads, PAGE, case.dim, dtype=x.dtype)
        pool[order] = pages.reshape(pool.shape)
        pools.append(pool)
    lengths = torch.full((case.batch,), case.kv, dtype=torch.int32)
    made.pages = (*pools, table.view(case.batch, count), lengths)
    return made.pages


def _paged_flashkern(made: Inputs) -> Contender:
    keys, values, table, lengths = _paged(made)

    def forward(q: Tensor, *_: Tensor) -> Tensor:
        return fk.attention_kvcache(q, keys, values, cache_lengths=lengths, page_table=table)

    return attention._wrap(FLASHKERN, made, forward, FLASHKERN)


def _paged_gathered(made: Inputs) -> Contender:
    """What torch alone can do: the pages copied into one piece, then its flash back end."""
    case = made.case
    keys, values, table, _ = _paged(made)

    def forward(q: Tensor, *_: Tensor) -> Tensor:
        k, v = (
            pool[table].transpose(1, 2).reshape(case.batch, case.kv_heads, case.kv, case.dim)
            for pool in (keys, values)
        )
        folded = q.reshape(case.batch, case.kv_heads, made.group, case.dim)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(folded, k, v).reshape(q.shape)

    return attention._wrap("pages copied, torch flash", made, forward)


def factories(case: Attention) -> dict[str, Factory]:
    if case.mode == "paged":
        return {FLASHKERN: _paged_flashkern, "pages copied, torch flash": _paged_gathered}
    found: dict[str, Factory] = {FLASHKERN: attention._flashkern}
    if case.mode == "decode":
        found |= {f"{n}, heads folded": _folded(n) for n in ("torch flash", "torch cudnn")}
        found["torch flash"] = _backend("torch flash")
        return found
    found |= {name: _backend(name) for name in _BACKENDS}
    if case.queries == _FLEX_LENGTH:
        found["FlexAttention"] = _flex
    if case.batch * case.heads * case.queries * case.kv <= 32 * _EAGER_PAIRS:
        found["torch eager"] = attention._math
    return found
