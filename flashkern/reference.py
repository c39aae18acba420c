"""Each operator in a few lines of plain PyTorch, any dtype: the definition that the tests use."""

import torch
from torch import Tensor

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
