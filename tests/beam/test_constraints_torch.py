"""beam_topk under constraints as a citizen of torch: gradients, vmap, compile; and its messages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from constraints import drawn, random_excluded, random_trie
from torch import Tensor

import flashkern as fk
from flashkern import reference
from flashkern.beam import Trie


@pytest.mark.parametrize("kind", ["excluded", "trie", "both"])
def test_gradients(backend: str, kind: str) -> None:
    """Those of the definition, where some places hold nobody too."""
    constraints = drawn(2, 3, 70, kind, 60)
    results = []
    for function, dtype in ((fk.beam_topk, torch.float32), (reference.beam_topk, torch.float64)):
        torch.manual_seed(1)
        leaves = [torch.randn(2, 3, 70), torch.randn(2, 3)]
        leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        out = function(*leaves, 150, **constraints)
        assert (out[1] < 0).any()
        loss = (out[0].masked_fill(out[1] < 0, 0) * torch.linspace(-1, 2, 150)).sum()
        results.append(torch.autograd.grad(loss + out[3].sin().sum(), leaves))
    for mine, wanted in zip(*results, strict=True):
        torch.testing.assert_close(mine.double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    options = drawn(2, 3, 70, "both", 20)
    trie, nodes, excluded = options["trie"], options["nodes"], options["excluded"]
    inputs = (torch.randn(2, 3, 70).to(dtype).requires_grad_(), torch.randn(2, 3), 150, None)
    below = (excluded, nodes, trie.starts, trie.tokens)
    torch.library.opcheck(torch.ops.flashkern.beam_topk.default, (*inputs, *below))


def test_gradcheck() -> None:
    inputs = [torch.randn(2, 3, 20, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)]
    excluded = torch.arange(16).expand(2, 3, 16)

    def finite(logits: Tensor, scores: Tensor) -> Tensor:
        return fk.beam_topk(logits, scores, 20, excluded=excluded).scores[:, :12]

    assert torch.autograd.gradcheck(finite, [x.requires_grad_() for x in inputs])


def test_vmap() -> None:
    logits, scores = torch.randn(4, 2, 3, 50), torch.randn(4, 2, 3)
    trie = random_trie(50, 60)
    nodes, excluded = torch.randint(-1, 20, (4, 2, 3)), random_excluded(2, 3, 50, 4)

    def step(logits: Tensor, scores: Tensor, nodes: Tensor) -> tuple[Tensor, ...]:
        options: dict[str, Any] = {"trie": trie, "nodes": nodes, "excluded": excluded}
        return tuple(fk.beam_topk(logits, scores, 5, **options))

    mapped = torch.vmap(step)(logits, scores, nodes)
    for i in range(4):
        for mine, wanted in zip(mapped, step(logits[i], scores[i], nodes[i]), strict=True):
            assert torch.equal(mine[i], wanted)


def test_compile_fullgraph() -> None:
    trie = random_trie(50, 60)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(logits: Tensor, scores: Tensor, nodes: Tensor) -> tuple[Tensor, ...]:
        best = fk.beam_topk(logits * 2, scores, 6, trie=trie, nodes=nodes)
        return (*best, trie.advance(nodes.gather(1, best.parents), best.tokens))

    logits, scores, nodes = torch.randn(2, 3, 50), torch.randn(2, 3), torch.randint(-1, 20, (2, 3))
    compiled = step(logits, scores, nodes)
    best = fk.beam_topk(logits * 2, scores, 6, trie=trie, nodes=nodes)
    assert all(torch.equal(a, b) for a, b in zip(compiled, best, strict=False))


# ---- messages ----

X, S, N = torch.zeros(2, 3, 10), torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64)
E = torch.zeros(2, 3, 4, dtype=torch.int64)


def small() -> Trie:
    """Made when a test runs: what collects the tests may fork before (tests/faults)."""
    return Trie.from_sequences([[9, 1], [3]])


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "excluded must be a tensor, got list", {"excluded": [1]}),
        (TypeError, "excluded must have dtype int64, got int32", {"excluded": E.int()}),
        (ValueError, r"excluded must have shape \(B, beams, n\) .*\(2, 3\)", {"excluded": N}),
        (ValueError, r"excluded must have shape .* got \(2, 2, 4\)", {"excluded": E[:, 1:]}),
        (ValueError, "excluded must be on device cpu", {"excluded": E.to("meta")}),
        (ValueError, "nodes must come with a trie", {"nodes": N}),
        (ValueError, "nodes must come with a trie, got None", {"trie": small}),
        (TypeError, "trie must be a flashkern.Trie, got list", {"trie": [1], "nodes": N}),
        (TypeError, "nodes must have dtype int64, .*float32", {"trie": small, "nodes": S}),
        (ValueError, r"nodes must have shape \(B, beams\)", {"trie": small, "nodes": N[0]}),
        (
            ValueError,
            "trie must be on device cpu",
            {"trie": lambda: small().to("meta"), "nodes": N},
        ),
        (
            ValueError,
            "trie must hold tokens below V = 10, got 10",
            {"trie": lambda: Trie.from_sequences([[10]]), "nodes": N},
        ),
        (RuntimeError, "excluded must hold tokens below V = 10, or -1", {"excluded": E + 10}),
        (RuntimeError, "excluded must hold tokens .* got -2", {"excluded": E - 2}),
        (RuntimeError, "nodes must hold .* below 4, or -1, got 4", {"trie": small, "nodes": N + 4}),
        (RuntimeError, "nodes must hold .* got -2", {"trie": small, "nodes": N - 2}),
    ],
)
def test_messages(error: Any, message: str, options: Any) -> None:
    with pytest.raises(error, match="^beam_topk: " + message):
        fk.beam_topk(X, S, 1, **{n: v() if callable(v) else v for n, v in options.items()})


def test_k_is_bounded_by_all_candidates(backend: str) -> None:
    options: dict[str, Any] = {"trie": small(), "nodes": N.to(torch.get_default_device())}
    with pytest.raises(ValueError, match="k must be between 1 and beams \\* V = 30, got 31"):
        fk.beam_topk(torch.zeros(2, 3, 10), torch.zeros(2, 3), 31, **options)
