"""The shapes of `make gpu-bench`: what the project's bars speak of, within ten minutes on one GPU.

Attention over about 16k tokens of 2048 features; decoding of 32 query heads over 8 key heads; LoRA
beside 4096 features, and 14336 as in a model's MLP; beam steps up to 512 beams of 152k tokens. The
cases take turns by operator, so that a run cut short has seen each of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, zip_longest

from benchmarks.profiles import Attention, Beam, Case, Lora, label

TOKENS, FEATURES = 16384, 2048


def _attention(mode: str) -> Iterator[Attention]:
    for s in (4096, 512, 16384, 1024, 8192, 2048):
        for dim in (128, 64):
            for causal in (True, False):
                h, b = FEATURES // dim, TOKENS // s
                yield Attention(mode, h, h, s, s, dim, "bf16", b, causal, gpu=True)


def _decode() -> Iterator[Attention]:
    for kv in (16384, 4096, 65536):
        for batch in (1, 8, 64):
            for mode in ("decode", "paged"):
                yield Attention(mode, 32, 8, 1, kv, 128, "bf16", batch, gpu=True)


def _lora() -> Iterator[Lora]:
    more = {"dtype": "bf16", "adapter": "bf16", "gpu": True}
    for rows in (2048, 512, 8192):
        for rank in (16, 64):
            for mode in ("forward", "training"):
                yield Lora(mode, rows, 4096, 4096, rank, **more)
    for mode in ("forward", "training"):
        yield Lora(mode, 8192, 4096, 14336, 16, **more)
        yield Lora(mode, 2048, 4096, 4096, 16, dtype="bf16", gpu=True)  # PEFT's default
    for rows in (1, 8, 64):
        yield Lora("decode", rows, 4096, 4096, 16, **more)
        yield Lora("several", rows, 4096, 4096, 16, **more)
    yield Lora("decode", 1, 4096, 14336, 64, **more)
    yield Lora("several", 2048, 4096, 4096, 16, **more)


def _beam() -> Iterator[Beam]:
    for beams in (512, 4, 64):
        for vocab in (151936, 32000):
            for dtype in ("bf16", "f32"):
                yield Beam(beams, vocab, dtype, gpu=True)


def quick() -> list[Case]:
    """Every case, the operators in turn."""
    lists = (_attention("prefill"), _decode(), _lora(), _beam(), _attention("training"))
    return [case for case in chain(*zip_longest(*lists)) if case is not None]


def _small(case: Case) -> Case:
    if isinstance(case, Attention):
        kv = min(case.kv, 64)
        queries = 1 if case.queries == 1 else kv
        heads, groups = min(case.heads, 4), 2 if case.heads != case.kv_heads else 4
        batch = min(case.batch, 2)
        return replace(case, kv=kv, queries=queries, batch=batch, heads=heads, kv_heads=groups)
    if isinstance(case, Lora):
        return replace(case, rows=min(case.rows, 16), inputs=64, outputs=case.outputs // 64)
    return replace(case, beams=min(case.beams, 8), vocab=case.vocab // 64)


def rehearsal() -> list[Case]:
    """Each kind of case once, small enough for a CPU."""
    return list({label(case): case for case in map(_small, quick())}.values())
