"""The sequences that a constrained beam search may give, as a trie that kernels can read."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from flashkern._checks import check, check_dtype, check_tensor

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Trie:
    """Which tokens may follow which, for :func:`flashkern.beam_topk`: a trie in compressed rows.

    Node 0 is the root. Node ``n`` has the edges ``starts[n]`` to ``starts[n + 1] - 1``; edge ``e``
    carries ``tokens[e]`` and leads to ``children[e]``. A search keeps a node for each beam, and
    -1 for a beam that has left the trie (:meth:`advance`). Where one sequence begins another, end
    both with a token of their own: a node does not say that a sequence may end at it.

    Args:
        starts: (nodes + 1,) int32, from 0 to the number of edges, never falling.
        tokens: (edges,) int32, from 0, ascending within each node.
        children: (edges,) int32 nodes. An edge may lead anywhere, back to the root too.

    Attributes:
        starts, tokens, children: as above.
        vocab_size: the greatest token plus one; 0 without edges.
        max_degree: the most children that a node has.

    Raises:
        TypeError: something is not an int32 tensor.
        ValueError: shapes, devices or values that are not those of a trie.

    Example:
        >>> import torch, flashkern as fk
        >>> trie = fk.Trie.from_sequences([[5, 1], [5, 2], [7, 0]])
        >>> nodes = torch.zeros(1, 1, dtype=torch.int64)  # one beam, at the root
        >>> logits = torch.zeros(1, 1, 9)
        >>> best = fk.beam_topk(logits, torch.zeros(1, 1), 2, trie=trie, nodes=nodes)
        >>> best.tokens
        tensor([[5, 7]])
        >>> nodes = trie.advance(nodes.gather(1, best.parents), best.tokens)
        >>> best = fk.beam_topk(logits.expand(1, 2, 9), best.scores, 4, trie=trie, nodes=nodes)
        >>> best.tokens, best.parents
        (tensor([[ 1,  2,  0, -1]]), tensor([[0, 0, 1, 0]]))
    """

    def __init__(self, starts: Tensor, tokens: Tensor, children: Tensor) -> None:
        for name, part in (("starts", starts), ("tokens", tokens), ("children", children)):
            check_tensor("Trie", name, part)
            check_dtype("Trie", name, part, (torch.int32,))
            check(part.dim() == 1, "Trie", name, "have one dimension", tuple(part.shape))
            same = part.device == starts.device
            check(same, "Trie", name, f"be on the device of starts, {starts.device}", part.device)
        check(len(starts) > 1, "Trie", "starts", "have nodes + 1 entries, 2 at least", len(starts))
        self.starts, self.tokens = starts.contiguous(), tokens.contiguous()
        self.children = children.contiguous()
        degrees = self.starts.diff()
        self.vocab_size = int(tokens.max()) + 1 if len(tokens) else 0
        self.max_degree = int(degrees.max())
        self._check_values(degrees)
        nodes = torch.arange(len(degrees), device=starts.device).repeat_interleave(degrees)
        self._keys = nodes * self.vocab_size + self.tokens  # ascending: what advance() searches
        rising = bool((self._keys.diff() > 0).all())
        check(rising, "Trie", "tokens", "ascend within each node", "others")

    def _check_values(self, degrees: Tensor) -> None:
        edges, nodes = len(self.tokens), len(degrees)
        rising = bool((degrees >= 0).all()) and (int(self.starts[0]), int(self.starts[-1]))
        must = f"rise from 0 to the number of edges, {edges}"
        check(rising == (0, edges), "Trie", "starts", must, "others")
        least = int(self.tokens.min()) if edges else 0
        check(least >= 0, "Trie", "tokens", "be 0 at least", least)
        shape = self.children.shape
        must = f"hold one node for each edge, {edges}"
        check(shape == self.tokens.shape, "Trie", "children", must, len(self.children))
        inside = bool(((self.children >= 0) & (self.children < nodes)).all())
        check(inside, "Trie", "children", f"be nodes, from 0 to {nodes - 1}", "others")

    @classmethod
    def from_sequences(cls, sequences: Tensor | Sequence[Sequence[int]]) -> Trie:
        """The trie of some sequences of tokens.

        Args:
            sequences: an (n, length) tensor of integers, on whose device the trie will be, or a
                list of lists, of any lengths. Sequences may come in any order, and twice.

        Raises:
            TypeError: a token is not an integer.
            ValueError: a tensor of another shape, or a token below 0 or above 2**31 - 2.
            NotImplementedError: more than 2**31 - 2 nodes.

        Example:
            >>> import flashkern as fk
            >>> trie = fk.Trie.from_sequences([[5, 1], [5, 2], [7, 0]])
            >>> trie.starts.tolist(), trie.tokens.tolist(), trie.children.tolist()
            ([0, 2, 4, 5, 5, 5, 5], [5, 7, 1, 2, 0], [1, 2, 3, 4, 5])
        """
        values, lengths = _flatten(sequences)
        device = values.device
        bounds = (int(values.min()), int(values.max())) if len(values) else (0, 0)
        fit = bounds[0] >= 0 and bounds[1] < 2**31 - 1
        check(fit, "Trie", "sequences", "hold tokens from 0 to 2**31 - 2", bounds)
        # Level by level: a (node, token) pair that is met for the first time is a new edge, to a
        # new node. Nodes are numbered in the order of these pairs, so all levels' pairs ascend.
        vocab, count = bounds[1] + 1, 1
        levels = [torch.empty(0, dtype=torch.int64, device=device)]
        rows = torch.arange(len(lengths), device=device)
        place, node = lengths.cumsum(0) - lengths, torch.zeros_like(rows)
        for depth in range(int(lengths.max()) if len(lengths) else 0):
            going = lengths[rows] > depth
            rows, node = rows[going], node[going]
            pairs, which = (node * vocab + values[place[rows] + depth]).unique(return_inverse=True)
            node, count = which + count, count + len(pairs)
            levels.append(pairs)
        if count > 2**31 - 2:
            raise NotImplementedError(f"Trie: nodes must be below 2**31 - 1, got {count}")
        edges = torch.cat(levels)
        starts = torch.searchsorted(edges // vocab, torch.arange(count + 1, device=device))
        children = torch.arange(1, count, dtype=torch.int32, device=device)
        return cls(starts.int(), (edges % vocab).int(), children)

    @property
    def device(self) -> torch.device:
        """Where the trie's tensors are."""
        return self.starts.device

    def __len__(self) -> int:
        """The number of nodes."""
        return len(self.starts) - 1

    def __repr__(self) -> str:
        edges = len(self.tokens)
        return f"Trie({len(self)} nodes, {edges} edges, at most {self.max_degree} of a node)"

    def __reduce__(self) -> tuple[Any, ...]:
        """A saved trie is checked when it is loaded, which ``torch.load`` does without more."""
        return Trie, (self.starts, self.tokens, self.children)

    def to(self, device: torch.device | str) -> Trie:
        """The same trie on another device."""
        moved = object.__new__(Trie)
        for name, value in vars(self).items():
            setattr(moved, name, value.to(device) if isinstance(value, Tensor) else value)
        return moved

    def advance(self, nodes: Tensor, tokens: Tensor) -> Tensor:
        """The nodes that ``tokens`` lead to from ``nodes``; -1 where no such edge is.

        Args:
            nodes: integers, -1 for none; any shape. From one that is none of the trie's, no edge
                leads anywhere.
            tokens: integers, -1 for none; a shape that broadcasts with it.

        Returns:
            int64, of the common shape.

        Example:
            >>> import torch, flashkern as fk
            >>> trie = fk.Trie.from_sequences([[5, 1], [7, 0]])
            >>> trie.advance(torch.tensor([0, 0, 1, -1]), torch.tensor([7, 1, 1, 5]))
            tensor([ 2, -1,  3, -1])
        """
        check_dtype("Trie", "nodes", nodes, INTEGERS)
        check_dtype("Trie", "tokens", tokens, INTEGERS)
        inside = (tokens >= 0) & (tokens < self.vocab_size)
        wanted = torch.where(inside, nodes.long() * self.vocab_size + tokens, -1)
        if not len(self._keys):
            return wanted.fill_(-1)
        edge = torch.searchsorted(self._keys, wanted).clamp_(max=len(self._keys) - 1)
        found = self._keys[edge] == wanted
        return torch.where(found, self.children[edge].long(), -1)

    def is_leaf(self, nodes: Tensor) -> Tensor:
        """Whether a sequence ends at each of ``nodes``: bool. What is no node, as -1, is no leaf.

        Example:
            >>> import torch, flashkern as fk
            >>> fk.Trie.from_sequences([[5, 1]]).is_leaf(torch.tensor([0, 1, 2, -1]))
            tensor([False, False,  True, False])
        """
        check_dtype("Trie", "nodes", nodes, INTEGERS)
        at = nodes.long().clamp(0, len(self) - 1)
        return (self.starts[at] == self.starts[at + 1]) & (nodes == at)


torch.serialization.add_safe_globals([Trie])


def _flatten(sequences: Tensor | Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """All tokens, one sequence after the other, and each sequence's length."""
    if isinstance(sequences, Tensor):
        must = "be an (n, length) tensor or a list of lists"
        check(sequences.dim() == 2, "Trie", "sequences", must, tuple(sequences.shape))
        values, (count, length) = sequences.flatten(), sequences.shape
        lengths = torch.full((count,), length, device=values.device)
    else:
        try:
            values = torch.tensor(list(chain.from_iterable(sequences)))
            lengths = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int64)
        except (TypeError, ValueError):
            must = "be an (n, length) tensor or a list of lists of integers"
            raise TypeError(f"Trie: sequences must {must}, got {sequences!r:.50}") from None
        values = values if len(values) else values.long()
    check_dtype("Trie", "sequences", values, INTEGERS)
    return values.long(), lengths
