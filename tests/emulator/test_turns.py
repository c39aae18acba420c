"""In what order the blocks of attention's backward pass may meet at a tile's sums."""

from __future__ import annotations

import numpy as np
import pytest
from machine import HERE, EmulatorError, Kernels


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels(HERE / "turns.cu")


def take(kernels: Kernels, turns: list[tuple[int, int, int]]) -> list[int]:
    words = np.zeros(2, np.int32)
    kernels.call("fk_turns", words, np.array(turns, np.int32), len(turns))
    return list(words)


def test_turns_come_in_order(kernels: Kernels) -> None:
    assert take(kernels, [(1, 0, 3), (1, 1, 3), (0, 0, 1), (1, 2, 3)]) == [0, 2]
    with pytest.raises(EmulatorError, match="deadlock"):
        take(kernels, [(0, 0, 3), (0, 2, 3)])


def test_sequences_that_overlap_end_all_the_same(kernels: Kernels) -> None:
    """Wrong cu_seqlens on a GPU: two sequences count at one tile, and one overtakes the other."""
    one, other = ([(0, mine, 3) for mine in range(3)] for _ in range(2))
    for order in (one + other, one[:2] + other[:1] + one[2:] + other[1:]):
        assert take(kernels, order) == [4, 0]
