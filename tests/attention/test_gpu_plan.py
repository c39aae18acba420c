"""How the GPU forward kernel cuts a call, and what it asks of a GPU."""

import itertools
from typing import Any

import pytest

from flashkern import _host

SMALLEST_SHARED = 99 * 1024  # of a block on sm_86 and sm_89


def plan(
    batch: int, heads: int, kv_heads: int, rows: int, keys: int, dim: int, **options: Any
) -> dict[str, Any]:
    return _host.attention_gpu_plan(batch, heads, kv_heads, rows, keys, dim, dim, **options)


@pytest.mark.parametrize("dim", range(8, 257, 8))
def test_every_tile_fits_every_gpu(dim: int) -> None:
    for rows, float32 in itertools.product((1, 16, 17, 300), (False, True)):
        cut = plan(2, 4, 2, rows, 500, dim, float32=float32)
        assert cut["shared_bytes"] <= SMALLEST_SHARED
        assert dim <= cut["dim"] <= max(32, 2 * dim)
        assert cut["split_keys"] % cut["tile_keys"] == 0


def test_prefill_is_not_split() -> None:
    cut = plan(2, 32, 8, 1024, 1024, 128)
    assert cut["splits"] == 1 and cut["workspace_bytes"] == 0
    assert cut["blocks"] == 2 * 8 * (4 * 1024 // cut["tile_rows"])


def test_decode_packs_the_group_and_splits_the_keys() -> None:
    cut = plan(1, 32, 8, 1, 16384, 128)
    assert cut["tile_rows"] == 16
    assert cut["splits"] == 16384 // cut["split_keys"] == 64
    assert cut["blocks"] == 8 * cut["splits"]
    assert cut["workspace_bytes"] == 8 * cut["splits"] * 4 * (128 + 4) * 4


@pytest.mark.parametrize(
    ("keys", "split_keys", "splits"),
    [(128, 128, 1), (129, 128, 2), (4096, 128, 32), (8192, 128, 64), (8193, 192, 64)]
    + [(32768, 512, 64), (32769, 512, 65), (131072, 512, 256)],
)
def test_a_step_has_64_splits_where_they_have_keys_enough(
    keys: int, split_keys: int, splits: int
) -> None:
    """There is room for 64 from 8192 keys on: lengths in device memory may be less than these."""
    cut = plan(1, 16, 1, 1, keys, 128)
    assert (cut["split_keys"], cut["splits"]) == (split_keys, splits)
    chunk = plan(1, 17, 1, 1, keys, 128)
    assert (chunk["split_keys"], chunk["splits"]) == (512, -(-keys // 512))


def test_a_chunk_of_decoding_is_split_too() -> None:
    cut = plan(1, 32, 8, 32, 8192, 128)
    assert cut["splits"] == 16 and cut["blocks"] == 8 * 16
    assert plan(1, 32, 8, 33, 8192, 128)["splits"] == 1


@pytest.mark.parametrize("beams", [1, 16, 100])
def test_what_beams_share_is_split_for_any_number_of_them(beams: int) -> None:
    cut = plan(2 * beams, 64, 8, 1, 100, 128, beams=beams, shared_keys=8192)
    assert cut["splits"] == 1 and cut["shared_splits"] == 16
    assert cut["shared_blocks"] == 2 * 8 * 16 * -(-8 * beams // 128)


def test_splits_depend_on_the_sequence_alone() -> None:
    for batch in (1, 7, 100):
        assert plan(batch, 8, 8, 1, 4096, 64)["splits"] == plan(1, 8, 8, 1, 4096, 64)["splits"]


def test_a_ragged_batch_has_room_for_all_kinds() -> None:
    """Whole tiles of all packed rows and one more for each sequence; splits of all packed keys.

    In the workspace 512 keys are a part of 128 rows, or four of 16.
    """
    cut = plan(30, 8, 8, 1000, 4096, 64, packed_q=1500, packed_k=9000)
    assert cut["splits"] == 4096 // 128
    tiles, splits = 1500 // cut["tile_rows"] + 30, 9000 // 128 + 30
    assert cut["blocks"] == 8 * (tiles + splits)
    assert cut["workspace_bytes"] == 8 * (9000 // 512 + 30) * 128 * (64 + 4) * 4
    step = plan(30, 8, 8, 1, 4096, 64, packed_q=30, packed_k=9000)
    assert step["workspace_bytes"] == 8 * (9000 // 512 + 30) * 4 * (64 + 4) * 4
    large = plan(30, 136, 8, 1000, 512, 64, packed_q=1500, packed_k=1500)
    assert large["splits"] == 1 and large["blocks"] == 8 * (17 * 1500 // large["tile_rows"] + 30)
    even = plan(3, 8, 8, 1000, 128, 64, packed_q=3000, packed_k=384)
    assert even["splits"] == 1 and even["blocks"] == 3 * 8 * -(-1000 // even["tile_rows"])


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_the_form_follows_the_rows(dim: int) -> None:
    def forms(**options: Any) -> list[str]:
        cuts = [plan(1, 4, 1, rows, 4096, dim, **options) for rows in (4, 5, 16, 17, 1024)]
        assert len({cut["tile_keys"] for cut in cuts}) == 1  # so a row's bits are the same in each
        return [cut["form"] for cut in cuts]

    two = dim <= 128
    assert forms() == ["few", "narrow", "narrow"] + 2 * ["plain" if two else "narrow"]
    assert forms(plain=False) == ["few", "narrow", "narrow"] + 2 * ["wide" if two else "narrow"]
    assert forms(float32=True) == ["few"] + 4 * ["narrow"]


def test_nothing_to_do_needs_nothing() -> None:
    assert plan(0, 8, 8, 4, 4, 64)["blocks"] == 0
    assert plan(2, 8, 8, 0, 4, 64)["blocks"] == 0
