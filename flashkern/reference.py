"""Each operator in a few lines of plain PyTorch, any dtype: the definition that the tests use."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flashkern.random import lora_keep_mask

# ---- attention ----


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    keep: Tensor | None = None,
    own_length: bool = False,
) -> tuple[Tensor, Tensor]:
    """The output and lse of :func:`flashkern.attention`.

    ``keep`` is the dropout mask (:func:`flashkern.random.attention_keep_mask`). ``own_length`` ends
    the diagonal at kv_lengths, as attention_kvcache and attention_varlen do. Weights are
    exp(score - lse): of a row whose scores are all near -1e9, only float64 holds the lse.
    """
    batch, heads, rows, head_dim = query.shape
    columns = key.shape[2]
    key = key.repeat_interleave(heads // key.shape[1], dim=1)
    value = value.repeat_interleave(heads // value.shape[1], dim=1)
    scores = query @ key.transpose(-1, -2) * (head_dim**-0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)

    length = query.new_full((1,), columns, dtype=torch.int64)
    if kv_lengths is not None:
        length = kv_lengths.long().clamp(0, columns)
    length = length.view(-1, 1, 1, 1)
    offset = torch.zeros_like(length) if causal == "top_left" else columns - rows
    if own_length and causal != "top_left":
        offset = length - rows
    i = torch.arange(rows, device=query.device).view(-1, 1)
    j = torch.arange(columns, device=query.device)
    distance = j - i - offset
    if alibi_slopes is not None:
        slopes = alibi_slopes.view(-1, heads, 1, 1).to(scores.dtype)
        scores = scores - slopes * distance.abs()
    left, right = window or (None, None)
    if causal:
        right = 0
    visible = j < length
    if left is not None:
        visible = visible & (distance >= -left)
    if right is not None:
        visible = visible & (distance <= right)
    if bias is not None and bias.dtype == torch.bool:
        visible = visible & bias
    elif bias is not None:
        scores = scores + bias.to(scores.dtype)
    scores = scores.masked_fill(~visible, -math.inf)

    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, heads, 1, 1).expand(batch, heads, rows, 1)
        scores = torch.cat([scores, column], dim=-1)
    lse = scores.logsumexp(dim=-1)
    base = lse.masked_fill(lse == -math.inf, 0).unsqueeze(-1)
    probabilities = (scores - base).exp()[..., :columns]
    if keep is not None:
        probabilities = probabilities * keep / (1 - dropout_p)
    return probabilities @ value, lse


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    keep: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The output and lse of :func:`flashkern.attention_varlen`: one sequence after another."""
    outputs, lses = [], []
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(starts_q) - 1):
        q = query[starts_q[b] : starts_q[b + 1]].transpose(0, 1).unsqueeze(0)
        k = key[starts_k[b] : starts_k[b + 1]].transpose(0, 1).unsqueeze(0)
        v = value[starts_k[b] : starts_k[b + 1]].transpose(0, 1).unsqueeze(0)
        rows, columns = q.shape[2], k.shape[2]

        def part(mask: Tensor | None, b: int = b, i: int = rows, j: int = columns) -> Any:
            """The corner of a (batch, heads, max_q, max_k) tensor that this sequence uses."""
            return mask if mask is None else mask[b % mask.shape[0], None, :, :i, :j]

        slopes = alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[b % slopes.shape[0]]
        lengths = None if kv_lengths is None else kv_lengths[b : b + 1]
        output, lse = attention(
            q, k, v, bias=part(bias), keep=part(keep), alibi_slopes=slopes,
            kv_lengths=lengths, own_length=True, **options,
        )  # fmt: skip
        outputs.append(output[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outputs), torch.cat(lses, dim=1)


def gather_pages(cache: Tensor, page_table: Tensor) -> Tensor:
    """(pages, heads, page_size, dim) as (batch, heads, tokens, dim), by the table."""
    pages = cache[page_table.long()]
    return pages.transpose(1, 2).flatten(2, 3)


def gather_beams(cache: Tensor, table: Tensor) -> Tensor:
    """(prompts * beams, heads, tokens, dim), each token from the row that the table names."""
    rows = cache.unflatten(0, table.shape[:2])
    index = table.long()[:, :, None, :, None].expand_as(rows)
    return rows.gather(1, index).flatten(0, 1)


def join_shared(shared: Tensor, own: Tensor, lengths: Tensor | None) -> Tensor:
    """Each prompt's tokens, (prompts, heads, S, dim), and behind them those of its beams' own."""
    beams, room = own.shape[0] // shared.shape[0], shared.shape[2]
    joined = torch.cat([shared.repeat_interleave(beams, 0), torch.zeros_like(own)], 2)
    for b in range(own.shape[0]):
        start = room if lengths is None else int(lengths[b // beams])
        joined[b, :, start : start + own.shape[2]] = own[b]
    return joined


def attention_kvcache(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_lengths: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    page_table: Tensor | None = None,
    beam_table: Tensor | None = None,
    shared_k: Tensor | None = None,
    shared_v: Tensor | None = None,
    shared_lengths: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The output and lse of :func:`flashkern.attention_kvcache`; the cache stays as it is."""
    lengths = cache_lengths.long()
    if page_table is not None:
        k_cache, v_cache = gather_pages(k_cache, page_table), gather_pages(v_cache, page_table)
    if k is not None and v is not None:
        k_cache, v_cache = k_cache.clone(), v_cache.clone()
        for b, start in enumerate(lengths.tolist()):
            k_cache[b, :, start : start + k.shape[2]] = k[b]
            v_cache[b, :, start : start + v.shape[2]] = v[b]
        lengths = lengths + k.shape[2]
    if beam_table is not None:
        k_cache, v_cache = gather_beams(k_cache, beam_table), gather_beams(v_cache, beam_table)
    if shared_k is not None and shared_v is not None:
        k_cache = join_shared(shared_k, k_cache, shared_lengths)
        v_cache = join_shared(shared_v, v_cache, shared_lengths)
        beams = len(lengths) // shared_k.shape[0]
        sizes = torch.full_like(lengths[::beams], shared_k.shape[2])
        sizes = sizes if shared_lengths is None else shared_lengths.long()
        lengths = lengths + sizes.repeat_interleave(beams)
    unseen = torch.arange(k_cache.shape[2]) >= lengths.view(-1, 1, 1)
    return attention(
        query, k_cache.masked_fill(unseen.unsqueeze(-1), 0),
        v_cache.masked_fill(unseen.unsqueeze(-1), 0),
        kv_lengths=lengths, own_length=True, **options,
    )  # fmt: skip


def merge_attention(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The output and lse of :func:`flashkern.merge_attention`."""
    stacked = torch.stack(list(lses))
    nothing = (stacked == -math.inf).all(dim=0)  # there logsumexp would have NaN for a gradient
    lse = stacked.masked_fill(nothing, 0).logsumexp(dim=0)
    parts = [o * (x - lse).exp().unsqueeze(-1) for o, x in zip(outputs, lses, strict=True)]
    return torch.stack(parts).sum(dim=0), lse.masked_fill(nothing, -math.inf)


# ---- beam top-k ----


def allowed_tokens(
    logits: Tensor, excluded: Tensor | None, trie: Any = None, nodes: Tensor | None = None
) -> Tensor:
    """Which tokens each beam may take: (B, beams, V), bool."""
    allowed = torch.full_like(logits, nodes is None, dtype=torch.bool)
    if nodes is not None:
        for beam, node in enumerate(nodes.flatten().tolist()):
            children = trie.tokens[trie.starts[node] : trie.starts[node + 1]] if node >= 0 else []
            allowed.flatten(0, 1)[beam, children] = True
    if excluded is not None:  # -1 falls into a column of its own, behind the last
        columns = logits.shape[-1] + 1
        allowed = F.pad(allowed, (0, 1)).scatter(2, excluded % columns, False)[..., :-1]
    return allowed


def beam_topk(
    logits: Tensor,
    beam_scores: Tensor,
    k: int,
    logsumexp: Tensor | None = None,
    *,
    excluded: Tensor | None = None,
    trie: Any = None,
    nodes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The k best continuations of each row's beams: scores, tokens, parents, logsumexp.

    ``logits`` (B, beams, V), ``beam_scores`` (B, beams), ``logsumexp`` (B, beams) or None. Each
    step of ``((logit - shift) - log_sum) + beam_score`` is rounded on its own; equal scores go to
    the smaller beam, then the smaller token; NaN comes first. What is not allowed comes last, as
    the token -1 of beam 0 with a score of -inf.
    """
    x = logits if logits.dtype == torch.float64 else logits.float()
    if logsumexp is None:
        shift = x.detach().amax(-1)
        shift = shift.masked_fill(shift == -torch.inf, 0)
        total = (x - shift.unsqueeze(-1)).exp().sum(-1)
        masked = total == 0
        log_sum = total.masked_fill(masked, 1).log()
        logsumexp = (shift + log_sum).masked_fill(masked, -torch.inf)
    else:
        shift, log_sum = logsumexp, torch.zeros_like(logsumexp)
    scores = ((x - shift.unsqueeze(-1)) - log_sum.unsqueeze(-1)) + beam_scores.unsqueeze(-1)
    scores = scores.masked_fill(x == -torch.inf, -torch.inf) + 0.0  # no negative zero
    ranked, index = scores.flatten(1).sort(dim=-1, descending=True, stable=True)
    allowed = allowed_tokens(x, excluded, trie, nodes).flatten(1).gather(1, index)
    kept = allowed.int().argsort(dim=1, descending=True, stable=True)[:, :k]
    best, index, allowed = (value.gather(1, kept) for value in (ranked, index, allowed))
    token, parent = index % logits.shape[-1], index // logits.shape[-1]
    best, token = best.masked_fill(~allowed, -torch.inf), token.masked_fill(~allowed, -1)
    return best, token, parent.masked_fill(~allowed, 0), logsumexp


# ---- LoRA linear ----


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    bias: Tensor | None = None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """x W^T + bias + scaling (dropout(x) A^T) B^T, with dropout as a function of the seed."""
    kept = x
    if dropout_p > 0.0 and seed is not None:
        columns = x.shape[-1]
        mask = lora_keep_mask(seed, dropout_p, x.numel() // max(columns, 1), columns)
        scale = 0.0 if dropout_p == 1.0 else 1.0 / (1.0 - dropout_p)
        kept = x * mask.view(x.shape) * scale
    return F.linear(x, weight, bias) + scaling * ((kept @ lora_a.T) @ lora_b.T)


def lora_linear_multi(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    adapter_ids: Tensor,
    *,
    bias: Tensor | None = None,
    scaling: float | Tensor = 1.0,
) -> Tensor:
    """:func:`lora_linear` with adapter adapter_ids[i] for row i, none where that is -1."""
    y = F.linear(x, weight, bias)
    ids = adapter_ids.reshape(x.shape[:-1])
    for n in range(lora_a.shape[0]):
        s = scaling[n] if isinstance(scaling, Tensor) else scaling
        y = y + s * ((x @ lora_a[n].T) @ lora_b[n].T) * (ids == n).unsqueeze(-1)
    return y
