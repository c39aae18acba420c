"""One step of beam search: from logits and beam scores to the 2 x beams best continuations.

transformers  a float32 copy of the logits, log_softmax, the beams' scores added, topk over beams x
              vocabulary, division and remainder: the lines of its own `_beam_search`.
beamgrad      its decoder reads logits by itself but has no single step: two steps are decoded, of
              which the first reads one row, and the time is counted per row. It keeps `beams` and
              not 2 x beams candidates, which is a little less work.

Beside a GPU:

torch chain   log_softmax in float32, the beams' scores added, topk: the least that torch can do.
cupy          the same from CuPy's reductions and its argpartition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import flashkern as fk
from benchmarks.problem import DTYPE_BYTES, DTYPES, Problem
from benchmarks.profiles import Beam
from benchmarks.sampler import FLASHKERN, Contender


@dataclass
class Inputs:
    case: Beam
    logits: Tensor  # (batch, beams, vocab)
    scores: Tensor  # (batch, beams) float32
    k: int


def inputs(case: Beam) -> Inputs:
    logits = (3 * torch.randn(case.batch, case.beams, case.vocab)).to(DTYPES[case.dtype])
    scores = -torch.rand(case.batch, case.beams).cumsum(-1)
    return Inputs(case, logits, scores, 2 * case.beams)


def _flashkern(made: Inputs) -> Contender:
    return Contender(
        FLASHKERN,
        lambda: fk.beam_topk(made.logits, made.scores, made.k),
        FLASHKERN,
        unpack=lambda best: [best.scores],
    )


def _transformers(made: Inputs) -> Contender:
    batch, vocab = made.case.batch, made.case.vocab

    def call() -> tuple[Tensor, Tensor, Tensor]:
        logits = made.logits.to(torch.float32, copy=True)
        scores = torch.log_softmax(logits, dim=-1) + made.scores[:, :, None]
        best, index = torch.topk(scores.reshape(batch, -1), k=made.k)
        return best, index % vocab, index // vocab

    return Contender("transformers", call, unpack=lambda best: [best[0]])


def _beamgrad(made: Inputs) -> Contender:
    import beamgrad

    beams = made.case.beams
    options = beamgrad.BeamOptions(beam_size=beams, eos_token=-1)
    two_steps = made.logits.unsqueeze(1).repeat(1, 2, 1, 1)

    def call() -> object:
        return beamgrad.decode(two_steps, options, from_logits=True)

    return Contender("beamgrad", call, scale=beams / (beams + 1), unpack=lambda _: [])


def _chain(made: Inputs) -> Contender:
    def call() -> tuple[Tensor, Tensor]:
        scores = torch.log_softmax(made.logits, dim=-1, dtype=torch.float32)
        return torch.topk((scores + made.scores[:, :, None]).flatten(1), k=made.k)

    return Contender("torch chain", call, unpack=lambda best: [best[0]])


def _cupy(made: Inputs) -> Contender:
    if made.case.dtype == "bf16":
        raise ImportError("CuPy has no bfloat16")
    import cupy

    if not made.logits.is_cuda:
        raise ImportError("CuPy needs a GPU")
    logits, scores = (cupy.from_dlpack(x) for x in (made.logits, made.scores))

    def call() -> Tensor:
        shifted = logits - logits.max(axis=-1, keepdims=True)
        shifted -= cupy.log(cupy.exp(shifted).sum(axis=-1, keepdims=True))
        flat = (shifted + scores[:, :, None]).reshape(logits.shape[0], -1)
        best = cupy.take_along_axis(flat, cupy.argpartition(-flat, made.k)[:, : made.k], axis=1)
        return torch.from_dlpack(-cupy.sort(-best, axis=1))

    return Contender("cupy", call, unpack=lambda best: [best])


def factories(case: Beam) -> dict[str, Callable[[Inputs], Contender]]:
    if case.gpu:
        return {
            FLASHKERN: _flashkern,
            "torch chain": _chain,
            "transformers": _transformers,
            "cupy": _cupy,
        }
    return {FLASHKERN: _flashkern, "transformers": _transformers, "beamgrad": _beamgrad}


def problem(case: Beam, made: Inputs, contenders: list[Contender]) -> Problem:
    def exact(name: str) -> list[Tensor]:
        if name == "beamgrad":
            return []  # its scores are those of two steps
        rows = made.logits.flatten(0, 1)
        # Rows in chunks: 512 x 150k in float64 is more memory than a small machine has.
        best = [
            part.double().log_softmax(-1).topk(min(made.k, case.vocab)).values
            for part in rows.split(64)
        ]
        scores = torch.cat(best).view(case.batch, case.beams, -1) + made.scores[:, :, None].double()
        return [scores.flatten(1).topk(made.k).values]

    traffic = DTYPE_BYTES[case.dtype] * made.logits.numel() + 4 * made.scores.numel()
    facts = {"batch": case.batch, "beams": case.beams, "vocab": case.vocab, "k": made.k}
    return Problem(contenders, 0, traffic, exact, facts=facts)
