"""The two sets of beams of a search, running and finished, and what moves between them.

A step takes the best candidates of all running beams (`select`, `select_processed`,
`select_stochastic`), then `advance` sorts them: those that just finished into one set, the best of
the others into the other. No step waits for the device: `stopped` is a tensor.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashkern._trie import Trie
from flashkern.beam import beam_topk
from flashkern.integrations._penalties import Penalties

NEVER = -1.0e9  # added to a score to rule a candidate out; transformers' own value


class Beams(NamedTuple):
    tokens: Tensor  # (batch, n, max_length), prompt included
    scores: Tensor  # (batch, n)
    parents: Tensor  # (batch, n, max_length - prompt): the row that each token came from, or -1
    nodes: Tensor | None = None  # (batch, n): where in a trie the running ones are
    log_probs: Tensor | None = None  # (batch, n): beside the scores of a stochastic search

    def take(self, index: Tensor) -> Beams:
        wide = index.unsqueeze(-1)
        return Beams(
            self.tokens.take_along_dim(wide, 1),
            self.scores.gather(1, index),
            self.parents.take_along_dim(wide, 1),
            None if self.nodes is None else self.nodes.gather(1, index),
            None if self.log_probs is None else self.log_probs.gather(1, index),
        )

    def lasting(self) -> Beams:
        """Without what only running beams have."""
        return Beams(*self[:3])


def join(sets: list[Beams]) -> Beams:
    """Finished beams of several searches over the same prompts, best first."""
    if len(sets) == 1:
        return sets[0]
    joined = Beams(*(torch.cat(parts, 1) for parts in zip(*(s[:3] for s in sets), strict=True)))
    return joined.take(joined.scores.argsort(dim=1, descending=True, stable=True))


class Search:
    """A beam search over the rows of one group of each prompt's beams: all, or some of them.

    Args:
        input_ids: (batch * beams, length), the group's rows.
        config: generate's.
        beams: the group's beams of each prompt.
        first_rows: (batch, 1), the number of each prompt's first row of the group in the model's
            batch.
        trie: what may follow a prompt.
        widths: (batch,), how many of the beams a prompt uses; None for all.
        stochastic: candidates are drawn without replacement (`select_stochastic`).
    """

    def __init__(
        self,
        input_ids: Tensor,
        config: Any,
        beams: int,
        first_rows: Tensor,
        trie: Trie | None = None,
        widths: Tensor | None = None,
        stochastic: bool = False,
    ) -> None:
        self.config, self.beams, self.first_rows = config, beams, first_rows
        self.trie = None if trie is None else trie.to(input_ids.device)
        self.max_length = config.max_length
        self.length_penalty = 0.0 if stochastic else config.length_penalty
        self.batch, self.prompt = input_ids.shape[0] // beams, input_ids.shape[1]
        self.length = self.prompt  # of the running sequences
        self.fill = _fill(config)
        eos = config._eos_token_tensor
        # Enough that num_beams candidates go on even when all others end with an EOS token.
        factor = max(2, 1 + (0 if eos is None else eos.shape[0]))
        self.kept = factor * beams
        shape, device = (self.batch, beams), input_ids.device
        if widths is None:
            widths = torch.full((self.batch,), beams, device=device)
        self.used = _first(beams, widths)  # (batch, beams)
        self.may_finish = _first(self.kept, widths)  # (batch, kept)
        self.may_follow = _first(self.kept, factor * widths)
        tokens = input_ids.new_full((*shape, self.max_length), self.fill, dtype=torch.int64)
        tokens[:, :, : self.prompt] = input_ids.unflatten(0, shape)
        parents = torch.full((*shape, self.max_length - self.prompt), -1, dtype=torch.int32)
        # All beams hold the same prompt: only the first may speak in the first step.
        scores = torch.zeros(shape, device=device)
        scores[:, 1:] = NEVER
        scores = scores.masked_fill(~self.used, -torch.inf)
        never = torch.full(shape, NEVER, device=device)
        nodes = None if trie is None else torch.zeros(shape, dtype=torch.int64, device=device)
        log_probs = torch.zeros(shape, device=device) if stochastic else None
        self.running = Beams(tokens, scores, parents.to(device), nodes, log_probs)
        self.finished = Beams(tokens.clone(), never, parents.to(device))
        self.is_finished = ~self.used
        self.improvable = torch.ones((self.batch, 1), dtype=torch.bool, device=device)
        self.all_hit = torch.zeros((), dtype=torch.bool, device=device)

    def sequences(self, beams: Beams | None = None, more: int = 0) -> Tensor:
        """The sequences so far of the running or the given beams: (rows, length)."""
        tokens = (self.running if beams is None else beams).tokens
        return tokens[:, :, : self.length + more].flatten(0, 1)

    def last_parents(self) -> Tensor:
        """(batch, beams), rows of the model's batch."""
        return self.running.parents[..., self.length - 1 - self.prompt]

    def taken(self, best: Beams, hits: Tensor) -> Tensor:
        """(batch, beams), the tokens of the best candidates, those that go on before others."""
        ends = hits.unflatten(0, (self.batch, self.kept)).int()
        first = ends.argsort(dim=1, stable=True)[:, : self.beams]
        return best.tokens[..., self.length].gather(1, first)

    # ---- a step's candidates ----

    def select(self, logits: Tensor, penalties: Penalties, chosen: Tensor) -> Beams | None:
        """The best candidates of all beams, from raw logits (batch, beams, V).

        None where penalties change or rule out too many for that. ``chosen``: see `Penalties`.
        """
        sequences, vocab = self.sequences(), logits.shape[2]
        if not penalties.touch_few(sequences, vocab):
            return None
        banned = penalties.banned(sequences)
        banned = banned.where(banned < vocab, -1)
        touched = penalties.touched(sequences, banned, vocab, chosen)
        nodes = self.running.nodes
        if self.trie is not None and nodes is not None:
            ahead = self.trie.advance(nodes.view(-1, 1), touched)
            touched = touched.masked_fill(ahead < 0, -1)
        excluded = torch.cat([banned, touched], 1)
        if self.trie is None and (vocab - excluded.shape[1]) * self.beams < self.kept:
            return None
        best = beam_topk(
            logits,
            self.running.scores,
            self.kept,
            excluded=excluded.unflatten(0, (-1, self.beams)) if excluded.shape[1] else None,
            trie=self.trie,
            nodes=nodes,
        )
        if touched.shape[1] == 0:
            return self._extend(best.scores, best.tokens, best.parents)
        found = touched.clamp(min=0)
        scores = logits.gather(2, found.unflatten(0, (-1, self.beams))).flatten(0, 1).float()
        scores = scores - best.logsumexp.view(-1, 1)
        scores = penalties.rescored(sequences, touched, scores, vocab, chosen)
        scores = scores.masked_fill(touched < 0, -torch.inf)
        scores = (scores + self.running.scores.view(-1, 1)).view(self.batch, -1)
        merged, index = torch.cat([best.scores, scores], 1).topk(self.kept)
        beams = torch.arange(self.beams, device=logits.device).repeat_interleave(touched.shape[1])
        tokens = torch.cat([best.tokens, found.view(self.batch, -1)], 1)
        parents = torch.cat([best.parents, beams.expand(self.batch, -1)], 1)
        return self._extend(merged, tokens.gather(1, index), parents.gather(1, index))

    def select_processed(self, log_probs: Tensor) -> Beams:
        """The same from processed log-probabilities (batch, beams, V), best first or drawn."""
        vocab = log_probs.shape[-1]
        if self.running.log_probs is not None:
            return self._select_stochastic(log_probs)
        total = (log_probs + self.running.scores.unsqueeze(-1)).flatten(1)
        if self.config.do_sample:
            dead = (total == -torch.inf).all(1, keepdim=True)  # within a trie: draw any of these
            chances = total.masked_fill(dead, 0).softmax(-1)
            index = torch.multinomial(chances, num_samples=self.kept)
            scores = total.gather(1, index)
        else:
            scores, index = total.topk(self.kept)
        return self._extend(scores, index % vocab, index // vocab)

    def _select_stochastic(self, log_probs: Tensor) -> Beams:
        """Sequences without replacement (Kool et al. 2019, arXiv 1903.06059).

        A beam's score is its log-probability plus Gumbel noise. Its children's noisy ones are
        drawn given that the greatest of them is the beam's own: with Z the greatest as drawn
        freely, G becomes -log(exp(-score) - exp(-Z) + exp(-G)), here in their appendix's form.
        """
        assert self.running.log_probs is not None
        total = log_probs + self.running.log_probs.unsqueeze(-1)
        noisy = total - torch.empty_like(total).exponential_().log()
        greatest = noisy.amax(-1, keepdim=True)
        score = self.running.scores.unsqueeze(-1)
        v = score - noisy + torch.log1p(-(noisy - greatest).exp())
        scores = score - v.clamp(min=0) - torch.log1p((-v.abs()).exp())
        scores = scores.masked_fill(total == -torch.inf, -torch.inf)
        best, index = scores.flatten(1).topk(self.kept)
        vocab = log_probs.shape[-1]
        extended = self._extend(best, index % vocab, index // vocab)
        return extended._replace(log_probs=total.flatten(1).gather(1, index))

    def _extend(self, scores: Tensor, tokens: Tensor, parents: Tensor) -> Beams:
        scores = scores.masked_fill(~self.may_follow, -torch.inf)
        extended = self.running.take(parents)._replace(scores=scores)
        if self.trie is not None and extended.nodes is not None:
            nodes = self.trie.advance(extended.nodes, tokens.where(scores > -torch.inf, -1))
            extended = extended._replace(nodes=nodes)
            tokens = tokens.where(scores > -torch.inf, max(self.fill, 0))
        extended.tokens[:, :, self.length] = tokens
        extended.parents[:, :, self.length - self.prompt] = (parents + self.first_rows).int()
        return extended

    # ---- running and finished ----

    def advance(self, best: Beams, hits: Tensor) -> None:
        """Sorts the candidates into running and finished beams; ``hits``: they met a criterion."""
        hits = hits.unflatten(0, (self.batch, self.kept))
        held_back = best._replace(scores=best.scores + hits.float() * NEVER)
        running = held_back.take(held_back.scores.topk(self.beams).indices)
        self.running = running._replace(scores=running.scores.masked_fill(~self.used, -torch.inf))
        self._finish(best, hits)
        self.length += 1
        self._judge()
        self.all_hit = (hits | ~self.may_follow).all()

    def _finish(self, best: Beams, hits: Tensor) -> None:
        """The best num_beams of the finished beams and the candidates that just finished."""
        just_finished = hits & self.may_finish  # the rest only stand by as running beams
        scores = best.scores / (self.length + 1 - self.prompt) ** self.length_penalty
        full = self.is_finished.all(-1, keepdim=True) & (self.config.early_stopping is True)
        for ruled_out in (full, ~self.improvable, ~just_finished):
            scores = scores + ruled_out.float() * NEVER
        pairs = zip(self.finished[:3], best._replace(scores=scores)[:3], strict=True)
        merged = Beams(*(torch.cat(pair, dim=1) for pair in pairs))
        index = merged.scores.topk(self.beams).indices
        self.finished = merged.take(index)
        is_finished = torch.cat((self.is_finished, just_finished), dim=1).gather(1, index)
        self.is_finished = is_finished | ~self.used

    def _judge(self) -> None:
        """Whether a running beam may still beat the worst finished one; once no, always no."""
        penalty, length = self.length_penalty, self.length
        if self.config.early_stopping == "never" and penalty > 0.0:
            length = self.max_length
        hoped = self.running.scores[:, :1] / (length - self.prompt) ** penalty
        worst = self.finished.scores.masked_fill(~self.used, torch.inf).amin(1, keepdim=True)
        worst = worst.where(self.is_finished, torch.full_like(worst, NEVER))
        better = (hoped > worst) & self.used
        self.improvable = self.improvable & better.any(-1, keepdim=True)

    def stopped(self) -> Tensor:
        """Whether no step can change what is returned: () bool."""
        full = self.is_finished.all() & (self.config.early_stopping is True)
        return full | self.all_hit | ~self.improvable.any()


def _first(count: int, limits: Tensor) -> Tensor:
    """(batch, count) bool: the first ones of each row."""
    return torch.arange(count, device=limits.device) < limits.unsqueeze(1)


def _fill(config: Any) -> int:
    """What stands behind a sequence's end; transformers takes a padding token 0 for none."""
    pad, eos = config._pad_token_tensor, config._eos_token_tensor
    if eos is None:
        return -1
    return int(pad) if pad is not None and bool(pad) else int(eos[0])
