"""draw: the picture of what beams share."""

import pytest
import torch

import flashkern as fk


def test_branches_keep_the_order_of_the_sequences() -> None:
    tokens = torch.tensor([[1, 4, 5, 6], [1, 9, 9, 9], [1, 4, 5, 7], [1, 4, 8, 8]])
    assert fk.beam.draw(tokens, start=1).splitlines() == [
        "├─ 4",
        "│  ├─ 5",
        "│  │  ├─ 6",
        "│  │  └─ 7",
        "│  └─ 8 8",
        "└─ 9 9 9",
    ]


def test_text_and_scores() -> None:
    words = {1: "a", 2: "cat", 3: "dog"}
    rows, scores = [[1, 2], [1, 3], [1]], [-1.0, -2.0, -3.0]
    picture = fk.beam.draw(rows, scores=scores, decode=lambda t: " ".join(words[x] for x in t))
    assert picture.splitlines() == [
        "└─ a",
        "   ├─ cat  -1.00",
        "   ├─ dog  -2.00",
        "   └─   -3.00",
    ]


def test_sequences_that_are_alike() -> None:
    assert fk.beam.draw([[3, 4], [3, 4]], scores=[-1.0, -1.5]) == "└─ 3 4  -1.00  -1.50"
    assert fk.beam.draw([]) == ""


def test_scores_of_another_length() -> None:
    with pytest.raises(ValueError, match="draw: scores must have 2 entries, got 1"):
        fk.beam.draw([[1], [2]], scores=[0.0])
