"""Philox in plain torch against the known answers that its authors published with Random123."""

import pytest
import torch

from flashkern import random


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            0xFFFFFFFFFFFFFFFF,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: int, words: tuple[int, ...]) -> None:
    counters = [torch.tensor(c, dtype=torch.int64) for c in counter]
    assert tuple(random.philox(key, *counters).tolist()) == words


def test_seed_comes_from_torchs_generator() -> None:
    torch.manual_seed(1)
    first = random.draw_seed()
    torch.manual_seed(1)
    assert torch.equal(first, random.draw_seed())
    assert not torch.equal(first, random.draw_seed())


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_keep_rate(p: float) -> None:
    kept = random.lora_keep_mask(random.draw_seed(), p, 200, 333).double().mean().item()
    assert abs(kept - (1 - p)) <= 4 * (p * (1 - p) / (200 * 333)) ** 0.5


def test_an_elements_mask_does_not_depend_on_the_shape_around_it() -> None:
    seed = random.draw_seed()
    large = random.attention_keep_mask(seed, 0.5, 3, 4, 17, 33)
    small = random.attention_keep_mask(seed, 0.5, 2, 3, 5, 30)
    assert torch.equal(large[:2, :3, :5, :30], small)
