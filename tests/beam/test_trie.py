"""Trie: what from_sequences makes, how advance walks it, what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flashkern as fk
from flashkern.beam import Trie


def sequences_of(trie: Trie) -> list[tuple[int, ...]]:
    """The paths to all leaves, in their order."""
    starts, tokens, children = (x.tolist() for x in (trie.starts, trie.tokens, trie.children))

    def below(node: int, path: tuple[int, ...]) -> list[tuple[int, ...]]:
        edges = range(starts[node], starts[node + 1])
        paths = [p for e in edges for p in below(children[e], (*path, tokens[e]))]
        return paths if len(edges) else [path]

    return below(0, ())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("count", [1, 7, 500])
def test_tensor(count: int, length: int, dtype: torch.dtype) -> None:
    codes = torch.randint(0, 9, (count, length)).to(dtype)
    trie = Trie.from_sequences(codes)
    assert sequences_of(trie) == sorted({tuple(row) for row in codes.tolist()})
    assert trie.vocab_size == int(codes.max()) + 1
    assert trie.max_degree == int(trie.starts.diff().max())
    assert len(trie) == len(trie.tokens) + 1
    for part in (trie.starts, trie.tokens, trie.children):
        assert part.dtype == torch.int32 and part.is_contiguous()


def test_lists_of_any_lengths() -> None:
    sequences = [[4, 1, 1], [4], [], [0], [4, 1], [9, 9, 9, 9, 9], [0]]
    trie = Trie.from_sequences(sequences)
    assert sequences_of(trie) == [(0,), (4, 1, 1), (9, 9, 9, 9, 9)]
    assert len(trie) == 10


@pytest.mark.parametrize("nothing", [[], [[]], torch.zeros(0, 4, dtype=torch.int64)], ids=str)
def test_nothing(nothing: Any) -> None:
    trie = Trie.from_sequences(nothing)
    assert (len(trie), trie.vocab_size, trie.max_degree) == (1, 0, 0)
    zero = torch.zeros(2, dtype=torch.int64)
    assert trie.advance(zero, zero).tolist() == [-1, -1] and trie.is_leaf(zero).all()
    options: dict[str, Any] = {"trie": trie, "nodes": zero.view(1, 2)}
    assert fk.beam_topk(torch.zeros(1, 2, 3), torch.zeros(1, 2), 2, **options).tokens.lt(0).all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_advance(dtype: torch.dtype) -> None:
    trie = Trie.from_sequences(torch.randint(0, 30, (400, 3)))
    edges = {}
    for node in range(len(trie)):
        for edge in range(int(trie.starts[node]), int(trie.starts[node + 1])):
            edges[node, int(trie.tokens[edge])] = int(trie.children[edge])
    nodes, tokens = torch.randint(-1, len(trie) + 3, (7, 1)), torch.arange(-2, 33)
    found = trie.advance(nodes.to(dtype), tokens.to(dtype))
    assert found.shape == (7, 35) and found.dtype == torch.int64
    pairs = [[edges.get((n, t), -1) for t in tokens.tolist()] for n in nodes.flatten().tolist()]
    assert found.tolist() == pairs and (found >= 0).any()


def test_own_edges() -> None:
    """A node may have several parents, the root among the children."""
    starts, tokens, children = (
        torch.tensor(part, dtype=torch.int32) for part in ([0, 2, 3], [1, 7, 0], [1, 1, 0])
    )
    trie = Trie(starts, tokens, children)
    nodes = torch.tensor([0, 0, 1, 1])
    assert trie.advance(nodes, torch.tensor([1, 7, 0, 1])).tolist() == [1, 1, 0, -1]
    assert not trie.is_leaf(nodes).any()


def test_to_and_repr() -> None:
    trie = Trie.from_sequences([[5, 1], [5, 2]])
    moved = trie.to("meta")
    assert moved.device.type == "meta" and trie.device.type == "cpu"
    assert (moved.vocab_size, moved.max_degree, len(moved)) == (6, 2, 4)
    assert moved.advance(moved.starts, moved.starts).device.type == "meta"
    assert repr(trie) == "Trie(4 nodes, 3 edges, at most 2 of a node)"


FAR = torch.empty(1, dtype=torch.int32, device="meta")


def parts(*lists: list[int]) -> list[Tensor]:
    return [torch.tensor(part, dtype=torch.int32) for part in lists]


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "sequences must have dtype int64, .*float32", lambda: [[1.5]]),
        (TypeError, "sequences must have dtype int64, .*bool", lambda: torch.ones(2, 2).bool()),
        (ValueError, r"sequences must be an \(n, length\) tensor", lambda: torch.arange(4)),
        (ValueError, "sequences must hold tokens from 0 to", lambda: [[3], [-1]]),
        (ValueError, "sequences must hold tokens from 0 to", lambda: [[2**31 - 1]]),
    ],
)
def test_messages_of_sequences(error: Any, message: str, call: Any) -> None:
    with pytest.raises(error, match="^Trie: " + message):
        Trie.from_sequences(call())


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("starts must have nodes \\+ 1 entries", parts([0], [], [])),
        ("starts must rise from 0 to the number of edges, 2", parts([0, 1], [0, 1], [0, 0])),
        ("starts must rise from 0", parts([0, 3, 2], [0, 1], [0, 0])),
        ("starts must rise from 0", parts([1, 2], [0, 1], [0, 0])),
        ("tokens must be 0 at least, got -1", parts([0, 1], [-1], [0])),
        ("tokens must ascend within each node", parts([0, 2], [1, 1], [0, 0])),
        ("tokens must ascend within each node", parts([0, 2], [1, 0], [0, 0])),
        ("children must hold one node for each edge", parts([0, 2], [1, 2], [0])),
        ("children must be nodes, from 0 to 0", parts([0, 1], [1], [1])),
        ("children must be nodes, from 0 to 0", parts([0, 1], [1], [-1])),
        ("tokens must have one dimension", [*parts([0, 1]), torch.zeros(1, 1).int(), *parts([0])]),
        ("tokens must be on the device of starts", [*parts([0, 1]), *[FAR] * 2]),
    ],
)
def test_messages_of_parts(message: str, arguments: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="^Trie: " + message):
        Trie(*arguments)


def test_parts_must_be_int32() -> None:
    with pytest.raises(TypeError, match="Trie: tokens must have dtype int32, got int64"):
        Trie(*parts([0, 1]), torch.zeros(1).long(), *parts([0]))


def test_a_saved_trie_is_loaded_as_tensors_are_and_checked(tmp_path: Path) -> None:
    trie = Trie.from_sequences([[5, 1], [5, 2], [7, 0]])
    torch.save(trie, tmp_path / "trie.pt")
    again = torch.load(tmp_path / "trie.pt")
    assert repr(again) == repr(trie) and torch.equal(again.tokens, trie.tokens)
    trie.children = trie.children + 99
    torch.save(trie, tmp_path / "wrong.pt")
    with pytest.raises(Exception, match="children must be nodes"):
        torch.load(tmp_path / "wrong.pt")
