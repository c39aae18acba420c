"""Every shape that is measured, in one place: what "quick" and "full" mean.

quick  what `make bench` runs: shapes of real models, small enough for two cores and two minutes.
full   the grids that the plots and the tables in docs/ come from.

A case is a plain description; providers/ turns it into calls. Its `label` is its name in every
report and the key by which two result files are compared.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Attention:
    """Batch, query and key-value heads, sequence lengths, head_dim.

    mode: "prefill" (forward), "training" (forward and backward), "decode" (one query per sequence),
    "paged" (the same from a cache in pages of 16 tokens), "padded" (a batch of unequal lengths up
    to `kv`), "varlen" (the same without the padding).
    """

    mode: str
    heads: int
    kv_heads: int
    queries: int
    kv: int
    dim: int
    dtype: str = "f32"
    batch: int = 1
    causal: bool = True
    threads: int = 0  # 0: all cores
    gpu: bool = False  # measured beside a GPU's peers
    operator = "attention"

    @property
    def shape(self) -> str:
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        one = self.mode in ("decode", "paged")
        length = f"1x{self.kv}" if one else f"{self.kv}"
        tail = " causal" if self.causal and not one else ""
        batch = f"B{self.batch} " if self.batch > 1 else ""
        return f"{batch}H{heads} S{length} D{self.dim}{tail}"


@dataclass(frozen=True)
class Lora:
    """Rows of x, in and out features of W, rank.

    mode: "training" (both passes), "forward", "decode" (a forward pass of few rows), "several" (one
    of 8 adapters for each row).
    """

    mode: str
    rows: int
    inputs: int
    outputs: int
    rank: int
    dtype: str = "f32"  # of x and W
    dropout: float = 0.0
    threads: int = 0
    adapter: str = "f32"  # of A and B: float32, as PEFT keeps them
    gpu: bool = False
    operator = "lora"

    @property
    def shape(self) -> str:
        tail = f" drop{self.dropout:g}" if self.dropout else ""
        tail += f" {self.adapter} adapter" if self.adapter != "f32" else ""
        return f"{self.rows}x{self.inputs}->{self.outputs} r{self.rank}{tail}"


@dataclass(frozen=True)
class Beam:
    """One step of beam search over `batch` x `beams` rows of logits: the 2 x beams best."""

    beams: int
    vocab: int
    dtype: str = "f32"
    batch: int = 1
    threads: int = 0
    gpu: bool = False
    mode: str = "step"
    operator = "beam"

    @property
    def shape(self) -> str:
        batch = f"B{self.batch} " if self.batch > 1 else ""
        return f"{batch}{self.beams} beams V{self.vocab}"


Case = Attention | Lora | Beam


def label(case: Case) -> str:
    """A case's name, the same in every run: "attention prefill H8 S512 D64 causal f32"."""
    threads = f" {case.threads}t" if case.threads else ""
    return f"{case.operator} {case.mode} {case.shape} {case.dtype}{threads}"


@dataclass(frozen=True)
class Profile:
    """Cases, and the seconds that sampling one of them may take."""

    cases: tuple[Case, ...]
    seconds: float
    models: tuple[str, ...]
    model_seconds: float


def _prefill(s: int, heads: int = 8, kv: int = 8, dim: int = 64, **more) -> Attention:
    return Attention("prefill", heads, kv, s, s, dim, **more)


def _training(s: int, heads: int = 8, kv: int = 8, dim: int = 64, **more) -> Attention:
    return Attention("training", heads, kv, s, s, dim, **more)


def _decode(kv: int, heads: int = 32, groups: int = 8, dim: int = 128, **more) -> Attention:
    return Attention("decode", heads, groups, 1, kv, dim, **more)


def _thread_counts() -> list[int]:
    """1, 2, 4, ... below the number of cores: the full count is measured anyway."""
    cores = os.cpu_count() or 1
    counts = [1]
    while counts[-1] * 2 < cores:
        counts.append(counts[-1] * 2)
    return [c for c in counts if c < cores]


def _scaling(*cases: Case) -> tuple[Case, ...]:
    return tuple(replace(case, threads=n) for case in cases for n in _thread_counts())


_QUICK_ATTENTION = (
    _prefill(256),
    _prefill(512),
    _prefill(1024),
    _prefill(2048),
    _prefill(1024, causal=False),
    _prefill(1024, 9, 3),  # SmolLM2-135M
    _prefill(1024, 8, 2, 128, dtype="bf16"),
    _prefill(128, 12, 12, 32, batch=8, causal=False),  # MiniLM
    _training(512),
    _training(512, 9, 3),
    _training(512, dtype="bf16"),
    _decode(4096),
    _decode(4096, dtype="bf16"),
    _decode(1024, 9, 3, 64, batch=8),
    Attention("padded", 12, 12, 256, 256, 32, batch=8, causal=False),
    Attention("padded", 9, 3, 512, 512, 64, batch=4),
    Attention("varlen", 9, 3, 512, 512, 64, batch=4),
)

_QUICK_LORA = (
    Lora("training", 512, 768, 768, 8),
    Lora("training", 512, 768, 768, 16, dropout=0.05),
    Lora("training", 512, 2048, 2048, 16),
    Lora("training", 256, 2048, 2048, 64),
    Lora("training", 128, 768, 768, 8, dtype="bf16"),
    Lora("decode", 1, 4096, 4096, 16),
    Lora("decode", 8, 2048, 2048, 8, dtype="bf16"),
)

_QUICK_BEAM = (
    Beam(4, 32000),
    Beam(4, 128256),
    Beam(4, 151936, dtype="bf16"),
    Beam(16, 8192),
    Beam(16, 128256),
    Beam(512, 8192),
    Beam(512, 8192, dtype="bf16"),
)

_FULL_ATTENTION = (
    *(_prefill(s, d_model, d_model, dim, dtype=t, causal=c)
      for d_model, dim in ((8, 64), (8, 128)) for t in ("f32", "bf16") for c in (True, False)
      for s in (128, 256, 512, 1024, 2048, 4096)),
    *(_prefill(s, 8, 8, 64, dtype="f16") for s in (512, 2048)),
    *(_prefill(s, 32, 8, 128, dtype=t) for t in ("f32", "bf16") for s in (512, 2048)),
    *(_prefill(s, 9, 3) for s in (256, 512, 1024, 2048)),
    *(_prefill(1024, 4, 4, dim) for dim in (32, 96, 192, 256)),
    _prefill(128, 12, 12, 32, batch=8, causal=False),
    _prefill(512, 12, 12, 32, batch=8, causal=False),
    *(_training(s, 8, 8, dim, dtype=t, causal=c)
      for dim in (64, 128) for t in ("f32", "bf16") for c in (True, False)
      for s in (256, 512, 1024, 2048)),
    *(_training(s, 9, 3) for s in (512, 1024)),
    *(_training(s, 32, 8, 128) for s in (512, 1024)),
    *(_decode(kv, dtype=t, batch=b) for b in (1, 8) for t in ("f32", "bf16", "f16")
      for kv in (512, 4096, 16384)),
    *(_decode(kv, 8, 8, 64, batch=4) for kv in (1024, 8192)),
    _decode(1024, 9, 3, 64, batch=8),
    *(Attention("padded", 12, 12, s, s, 32, batch=b, causal=False)
      for b in (8, 32) for s in (128, 256, 512)),
    *(Attention(mode, 9, 3, s, s, 64, batch=4, dtype=t)
      for mode in ("padded", "varlen") for t in ("f32", "bf16") for s in (256, 512, 1024)),
)  # fmt: skip

_FULL_LORA = (
    *(Lora("training", rows, d, d, r, dropout=p, dtype=t)
      for t in ("f32", "bf16") for rows, d in ((512, 768), (512, 2048)) for r in (8, 16, 64)
      for p in (0.0, 0.05)),
    Lora("training", 2048, 768, 768, 16),
    Lora("training", 512, 4096, 4096, 16),
    Lora("training", 512, 576, 1536, 16),
    *(Lora("decode", rows, d, d, r, dtype=t)
      for t in ("f32", "bf16") for rows in (1, 8) for d in (2048, 4096) for r in (8, 16, 64)),
)  # fmt: skip

_FULL_BEAM = tuple(
    Beam(k, v, dtype=t, batch=b)
    for t in ("f32", "bf16")
    for k, b in ((4, 1), (4, 8), (16, 1), (512, 1))
    for v in (8192, 32000, 128256, 151936)
)

_MODELS = ("first_token", "generate", "beams", "finetune", "embed", "transcribe")  # tasks.py

PROFILES = {
    "quick": Profile(
        (
            *_QUICK_ATTENTION,
            *_QUICK_LORA,
            *_QUICK_BEAM,
            *_scaling(_prefill(1024), Lora("training", 512, 2048, 2048, 16), Beam(16, 128256)),
        ),
        seconds=2.0,
        models=_MODELS,
        model_seconds=10.0,
    ),
    "full": Profile(
        (
            *_FULL_ATTENTION,
            *_FULL_LORA,
            *_FULL_BEAM,
            *_scaling(
                _prefill(2048),
                _training(1024),
                _decode(4096),
                Lora("training", 512, 2048, 2048, 16),
                Beam(16, 128256),
                Beam(512, 8192),
            ),
        ),
        seconds=6.0,
        models=_MODELS,
        model_seconds=40.0,
    ),
}
