"""What the beams of a search share, drawn with characters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from flashkern._checks import check


def _text(tokens: list[int], decode: Callable[[list[int]], str] | None) -> str:
    return " ".join(map(str, tokens)) if decode is None else decode(tokens)


def draw(
    sequences: Tensor | Sequence[Sequence[int]],
    *,
    scores: Sequence[float] | Tensor | None = None,
    decode: Callable[[list[int]], str] | None = None,
    start: int = 0,
) -> str:
    """A tree of the sequences that a beam search returns: shared beginnings are written once.

    Args:
        sequences: (n, length) tokens, the best first; branches keep that order.
        scores: (n,), written behind each sequence's end.
        decode: makes text of tokens, ``tokenizer.decode`` for instance; None writes numbers.
        start: the first token to draw: a prompt's length leaves the prompt out.

    Returns:
        The picture, one branch on each line.

    Raises:
        ValueError: scores of another length than sequences.

    Example:
        >>> import torch, flashkern as fk
        >>> tokens = torch.tensor([[5, 1, 2], [5, 1, 3], [7, 0, 0]])
        >>> print(fk.beam.draw(tokens, scores=[-0.5, -1.25, -2.0]))
        ├─ 5 1
        │  ├─ 2  -0.50
        │  └─ 3  -1.25
        └─ 7 0 0  -2.00
    """
    rows = [[int(token) for token in row[start:]] for row in sequences]
    if scores is not None:
        check(len(scores) == len(rows), "draw", "scores", f"have {len(rows)} entries", len(scores))
    ends = [""] * len(rows) if scores is None else [f"  {float(s):.2f}" for s in scores]
    return "\n".join(_branches(list(zip(rows, ends, strict=True)), decode))


def _branches(rows: list[tuple[list[int], str]], decode: Any) -> list[str]:
    """The lines of some (tokens, end)."""
    groups: dict[int | None, list[tuple[list[int], str]]] = {}
    for tokens, end in rows:
        groups.setdefault(tokens[0] if tokens else None, []).append((tokens, end))
    lines = []
    for number, group in enumerate(groups.values()):
        last = number == len(groups) - 1
        shared = _shared([tokens for tokens, _ in group])
        head = _text(group[0][0][:shared], decode)
        rest = [(tokens[shared:], end) for tokens, end in group]
        done = all(not tokens for tokens, _ in rest)
        scores = "".join(end for _, end in rest) if done else ""
        lines.append(("└─ " if last else "├─ ") + head + scores)
        if not done:
            lines += [("   " if last else "│  ") + line for line in _branches(rest, decode)]
    return lines


def _shared(rows: list[list[int]]) -> int:
    """How many tokens all rows begin with."""
    count = 0
    while all(len(row) > count and row[count] == rows[0][count] for row in rows):
        count += 1
    return count
