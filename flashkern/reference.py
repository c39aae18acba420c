"""Each operator in a few lines of plain PyTorch, any dtype: the definition that the tests use."""

import torch
from torch import Tensor
from torch.nn import functional as F

from flashkern.random import lora_keep_mask

# ---- beam top-k ----


def beam_topk(
    logits: Tensor, beam_scores: Tensor, k: int, logsumexp: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The k best continuations of each row's beams: scores, tokens, parents, logsumexp.

    ``logits`` (B, beams, V), ``beam_scores`` (B, beams), ``logsumexp`` (B, beams) or None. Each
    step of ``((logit - shift) - log_sum) + beam_score`` is rounded on its own; equal scores go to
    the smaller beam, then the smaller token; NaN comes first.
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
    vocab = logits.shape[-1]
    best, index = ranked[:, :k], index[:, :k]
    return best, index % vocab, index // vocab, logsumexp


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
