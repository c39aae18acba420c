"""Threads among each other: what works, what each misuse is told, what lands late."""

from __future__ import annotations

import ctypes
import functools

import numpy as np
import pytest
from machine import HERE, EmulatorError, Kernels

SEEDS = range(6)


@functools.cache
def kernels(variant: str = "plain") -> Kernels:
    return Kernels(HERE / "machine_room.cu", variant)


def run(name: str, size: int, variant: str = "plain", seed: int = 1, cooperative: int = 0):
    out = np.zeros(size, np.int32)
    room = kernels(variant)
    room.seed(seed)
    function = room.library["fk_case"]
    function.restype = ctypes.c_char_p
    error = function(name.encode(), ctypes.c_void_p(out.ctypes.data), cooperative)
    if error is not None:
        raise EmulatorError(error.decode())
    return out


@pytest.fixture(params=["plain", "race"])
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("seed", SEEDS)
def test_shuffles_and_votes(seed: int, variant: str) -> None:
    out = run("shuffles", 320, variant, seed).reshape(32, 10)
    lane = np.arange(32)
    v = 100 + lane
    np.testing.assert_array_equal(out[:, 0], np.full(32, 105))
    np.testing.assert_array_equal(out[:, 1], v[lane // 8 * 8 + (lane + 1) % 8])
    np.testing.assert_array_equal(out[:, 2], v[lane ^ 3])
    np.testing.assert_array_equal(out[:, 3], v[np.where(lane % 16 >= 2, lane - 2, lane)])
    np.testing.assert_array_equal(out[:, 4], v[np.where(lane % 16 < 14, lane + 2, lane)])
    votes = sum(1 << i for i in range(0, 32, 3))
    np.testing.assert_array_equal(out[:, 5].view(np.uint32), np.full(32, votes))
    np.testing.assert_array_equal(out[:, 6], np.full(32, 2))
    np.testing.assert_array_equal(out[:, 7], np.full(32, v.sum()))
    np.testing.assert_array_equal(out[:, 8], np.full(32, (v ^ 21).max()))
    match = [sum(1 << i for i in range(32) if i % 5 == n % 5) for n in lane]
    np.testing.assert_array_equal(out[:, 9].view(np.uint32), match)


@pytest.mark.parametrize("seed", SEEDS)
def test_two_masks_in_one_warp(seed: int, variant: str) -> None:
    np.testing.assert_array_equal(run("halves", 32, variant, seed), [120] * 16 + [376] * 16)


def test_votes_of_a_block(variant: str) -> None:
    np.testing.assert_array_equal(run("block_votes", 96, variant), np.full(96, 32 * 4 + 1))


def test_a_barrier_waits_for_those_who_are_left(variant: str) -> None:
    np.testing.assert_array_equal(run("early_return", 64, variant), np.arange(64)[::-1])


def test_atomics(variant: str) -> None:
    out = run("atomics", 6, variant)
    assert out[0] == 192 and out[1] == 63 and out[2:3].view(np.float32)[0] == 96
    assert out[3] == out[4] > 0
    assert out[5] == 192 % 10


@pytest.mark.parametrize("seed", SEEDS)
def test_named_barriers_hand_over(seed: int, variant: str) -> None:
    expected = 100 * np.arange(4)[:, None] + np.arange(32)[::-1]
    np.testing.assert_array_equal(run("hand_over", 128, variant, seed).reshape(4, 32), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_mbarrier_pipeline(seed: int, variant: str) -> None:
    data, out = np.arange(160, dtype=np.int32), np.zeros(160, np.int32)
    kernels(variant).seed(seed)
    kernels(variant).call("fk_copies", 0, data, out)
    np.testing.assert_array_equal(out.reshape(5, 32), data.reshape(5, 32)[:, ::-1])


@pytest.mark.parametrize("seed", SEEDS)
def test_last_block(seed: int, variant: str) -> None:
    assert run("last_block", 16, variant, seed)[1] == 28


@pytest.mark.parametrize("cooperative", [0, 1])
@pytest.mark.parametrize("seed", SEEDS)
def test_order_between_blocks(seed: int, cooperative: int, variant: str) -> None:
    assert run("fences", 6, variant, seed, cooperative)[1] == 4
    assert run("released_for_all", 96, variant, seed, cooperative)[1] == 64


@pytest.mark.parametrize("cooperative", [0, 1])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "name", ["no_fences", "no_fence_before", "no_fence_after", "released_for_one"]
)
def test_no_order_between_blocks(name: str, seed: int, cooperative: int) -> None:
    told = r"race in global memory[\s\S]*is not ordered after the write of[\s\S]*machine_room.cu:"
    with pytest.raises(EmulatorError, match=told):
        run(name, 96, "race", seed, cooperative)


@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_that_wait_for_each_other(seed: int, variant: str) -> None:
    assert run("chain", 2, variant, seed, cooperative=1)[1] == 31


def test_registers_pass_between_warps() -> None:
    np.testing.assert_array_equal(run("registers", 384), np.arange(384) // 32)


MISUSE = {
    "half_barrier": r"deadlock[\s\S]*threads 0-31 wait at __syncthreads, 32 of 64 arrived "
    r"\(machine_room.cu:\d+\)[\s\S]*threads 32-63 wait at barrier_sync 3, 32 of 64 arrived",
    "diverged_shuffle": r"a warp's lanes must meet at the same primitive",
    "returned_lane": r"has returned, but its lane|which has returned",
    "foreign_mask": r"at __shfl_sync with a mask that does not name it",
    "two_lines": r"a warp must reach a barrier as one",
    "odd_count": r"its count must be a multiple of 32, at most 64, got 48",
    "two_counts": r"counts (32|64) threads, but those that arrived at .* count (64|32)",
    "arrives_twice": r"at barrier_arrive 1 arrives twice before it completes",
    "no_init": r"mbarrier_wait of an mbarrier that is not initialised",
    "lost_phase": r"deadlock[\s\S]*threads 0-31 wait at mbarrier_wait\(parity 0\) at shared "
    r"\+ 4096: phase 0, awaits 1 arrivals and 0 bytes \(machine_room.cu",
    "spins_for_ever": r"deadlock[\s\S]*mbarrier_try_wait\(parity 0\)",
    "too_many_arrivals": r"2 arrivals, but the phase awaits only 1",
    "greedy": r"deadlock[\s\S]*setmaxnreg for 240 registers, 0 free",
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", MISUSE)
def test_misuse_is_told(name: str, seed: int) -> None:
    with pytest.raises(EmulatorError, match=MISUSE[name]):
        run(name, 64, seed=seed)


def test_after_an_error_the_next_launch_is_whole() -> None:
    with pytest.raises(EmulatorError):
        run("half_barrier", 1)
    test_votes_of_a_block("plain")


def test_a_spin_on_a_block_that_never_comes_is_a_deadlock() -> None:
    with pytest.raises(EmulatorError, match=r"deadlock[\s\S]*(load_acquire|__nanosleep)"):
        for seed in SEEDS:  # blocks run one by one in random order: some seed starts wrong
            run("chain", 2, seed=seed)


def test_the_end_of_shared_memory_is_guarded() -> None:
    out = np.array([1026], np.int32)  # 1024 words, the mbarrier, and this is beyond
    out_of = 4096 + 128
    out[0] = out_of // 4
    function = kernels().library["fk_case"]
    function.restype = ctypes.c_char_p
    error = function(b"past_the_end", ctypes.c_void_p(out.ctypes.data), 0)
    assert f"wrote at shared + {out_of}, beyond its {out_of} bytes" in error.decode()


def test_launches_are_checked() -> None:
    room = kernels()
    with pytest.raises(EmulatorError, match="1056 threads in a block, at most 1024"):
        room.call("fk_launch", 1056, 4224, 1)
    with pytest.raises(EmulatorError, match="uses 4224 bytes .* but the launch gave 4096"):
        room.call("fk_launch", 32, 4096, 1)
    with pytest.raises(EmulatorError, match="shared memory of a kernel"):
        room.call("fk_launch", 32, 233 << 10, 1)
    room.capability(8, 0)
    with pytest.raises(EmulatorError, match="clusters need compute capability 9.0"):
        room.call("fk_launch", 32, 4224, 2)
    with pytest.raises(EmulatorError, match="shared memory of a kernel"):
        room.call("fk_launch", 32, 200 << 10, 1)
    room.capability(9, 0)
    room.call("fk_launch", 32, 200 << 10, 2)


def test_a_copy_without_a_wait_never_lands() -> None:
    data, out = np.arange(64, dtype=np.int32), np.zeros(64, np.int32)
    kernels().call("fk_copies", 1, data, out)
    np.testing.assert_array_equal(out, np.full(64, -1))


def test_only_the_groups_waited_for_have_landed() -> None:
    data, out = np.arange(128, dtype=np.int32), np.zeros(128, np.int32)
    kernels().call("fk_copies", 2, data, out)
    np.testing.assert_array_equal(out, np.where(data < 64, data, -1))


def test_races_are_told() -> None:
    told = (
        r"race at shared \+ \d+[\s\S]*machine_room.cu:\d+[\s\S]*"
        r"is not ordered after the (read|write) of[\s\S]*machine_room.cu:\d+"
    )
    with pytest.raises(EmulatorError, match=told):
        run("no_syncwarp", 64, "race")
    data, out = np.arange(128, dtype=np.int32), np.zeros(128, np.int32)
    for which in (1, 2):
        with pytest.raises(EmulatorError, match=r"still under way from .*cp.async at machine_room"):
            kernels("race").call("fk_copies", which, data, out)
