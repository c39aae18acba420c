"""Touches every GPU kernel once, on small shapes with ragged edges: what compute-sanitizer runs.

    compute-sanitizer --tool memcheck python tests/gpu/every_kernel.py

It runs on a GPU; with FLASHKERN_BACKEND=emulated over the emulator, and on a CPU otherwise.
Results are only asked to be finite: the tests ask for more.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

import flashkern as fk
from flashkern import _ops

ON_GPU = torch.cuda.is_available() and not os.environ.get("FLASHKERN_BACKEND")
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_(grad)


def attention(dtype: torch.dtype, grad: bool) -> Iterator[Sequence[Tensor]]:
    """Every tile of head_dims, with every feature on and with none."""
    for dim in (40, 64, 128, 256):
        q, k, v = (
            draw(2, h, n, dim, dtype=dtype, grad=grad) for h, n in ((4, 67), (2, 83), (2, 83))
        )
        everything = {
            "window": (50, 3),
            "softcap": 20.0,
            "alibi_slopes": torch.rand(4),
            "bias": draw(1, 4, 67, 83, grad=grad),
            "sinks": draw(4, grad=grad),
            "kv_lengths": torch.tensor([83, 31], dtype=torch.int32),
            "dropout_p": 0.2,
        }
        for options in ({}, {"causal": True}, everything):
            out, lse = fk.attention(q, k, v, return_lse=True, **options)
            yield [out, lse.masked_fill(lse == -torch.inf, 0)]
            if grad:
                wanted = [q, k, v, *(o for o in (options.get("bias"), options.get("sinks"))
                                     if o is not None)]  # fmt: skip
                yield torch.autograd.grad(out.float().square().sum() + lse.sum(), wanted)


def decode(dtype: torch.dtype) -> Iterator[Sequence[Tensor]]:
    """One query over few keys and over enough to be split, in one piece, in pages, by beams."""
    for tokens in (50, 6000):
        cache = [draw(2, 2, tokens + 8, 64, dtype=dtype) for _ in range(2)]
        lengths = torch.tensor([tokens, tokens // 3], dtype=torch.int32)
        q, k, v = (draw(2, h, 1, 64, dtype=dtype) for h in (8, 2, 2))
        yield [fk.attention_kvcache(q, *cache, cache_lengths=lengths, k=k, v=v, causal=True)]
    pages = [draw(40, 2, 16, 64, dtype=dtype) for _ in range(2)]
    table = torch.randperm(40, dtype=torch.int32).view(2, 20)
    lengths = torch.tensor([300, 17], dtype=torch.int32)
    yield [fk.attention_kvcache(q, *pages, cache_lengths=lengths, k=k, v=v, page_table=table)]
    beams: dict[str, Tensor] = {
        "cache_lengths": torch.full((2,), 90, dtype=torch.int32),
        "beam_table": torch.randint(2, (1, 2, 6008), dtype=torch.int32),
        "shared_k": draw(1, 2, 700, 64, dtype=dtype),
        "shared_v": draw(1, 2, 700, 64, dtype=dtype),
    }
    yield [fk.attention_kvcache(q, *cache, k=k, v=v, **beams)]


def lora(dtype: torch.dtype, adapter: torch.dtype) -> Iterator[Sequence[Tensor]]:
    weight = draw(200, 136, dtype=dtype).div_(12)
    for rows in (1, 5, 33, 190):
        x = draw(rows, 136, dtype=dtype, grad=True)
        a, b = draw(20, 136, dtype=adapter, grad=True), draw(200, 20, dtype=adapter, grad=True)
        for p in (0.0, 0.3):
            y = fk.lora_linear(x, weight, a, b, scaling=0.5, dropout_p=p)
            yield [y]
            if _ops.has_kernel("lora_linear_backward", DEVICE):
                yield torch.autograd.grad(y.float().square().mean(), (x, a, b))
        several = [draw(3, *t.shape, dtype=adapter, grad=True) for t in (a, b)]
        ids = torch.randint(-1, 3, (rows,))
        y = fk.lora_linear_multi(x, weight, *several, ids, scaling=0.5)
        yield [y]
        if _ops.has_kernel("lora_linear_backward", DEVICE):
            yield torch.autograd.grad(y.float().square().mean(), (x, *several))


def beam(dtype: torch.dtype) -> Iterator[Sequence[Tensor]]:
    """Few candidates, more than shared memory holds, and rows cut over several blocks."""
    for beams, vocab, k in ((3, 1001, 6), (4, 1500, 3000), (1, 70001, 40), (300, 97, 600)):
        logits = draw(2, beams, vocab, dtype=dtype)
        best = fk.beam_topk(logits, -torch.rand(2, beams), k)
        yield [best.scores, best.logsumexp]
        trie = fk.Trie.from_sequences(torch.randint(0, vocab, (400, 2)))
        nodes = torch.randint(0, 300, (2, beams))
        excluded = torch.randint(-1, vocab, (2, beams, 7))
        for options in ({}, {"logsumexp": best.logsumexp}):
            some = fk.beam_topk(
                logits, best.logsumexp, k, trie=trie, nodes=nodes, excluded=excluded, **options
            )
            yield [some.scores[some.tokens >= 0], some.logsumexp]


def everything() -> Iterator[tuple[str, Sequence[Tensor]]]:
    has = {name: _ops.has_kernel(name, DEVICE) for name in
           ("attention_forward", "attention_backward", "lora_linear", "beam_topk")}  # fmt: skip
    print("without a kernel here:", [name for name, there in has.items() if not there] or "none")
    for dtype in DTYPES:
        if has["attention_forward"]:
            for result in attention(dtype, has["attention_backward"]):
                yield f"attention {dtype}", result
            for result in decode(dtype):
                yield f"decode {dtype}", result
        if has["lora_linear"]:
            for adapter in {dtype, torch.float32}:
                for result in lora(dtype, adapter):
                    yield f"lora {dtype} {adapter}", result
        if has["beam_topk"]:
            for result in beam(dtype):
                yield f"beam {dtype}", result


def main() -> None:
    torch.manual_seed(0)
    count = 0
    with torch.device(DEVICE):
        for name, results in everything():
            assert all(bool(x.isfinite().all()) for x in results), name
            count += 1
    print(f"every kernel ran: {count} results on {DEVICE}")


if __name__ == "__main__":
    main()
