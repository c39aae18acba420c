"""Dropout masks as functions: Philox4x32-10, the same bits on every back end.

A mask is never stored. Its key is a seed drawn from torch's own generator, so ``torch.manual_seed``
and activation checkpointing hold; its counter is an element's place. The functions here are the
definition that tests compare the kernels with.

Source: Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011).
"""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def draw_seed(device: torch.device | None = None) -> Tensor:
    """Draws a dropout seed, an int64 tensor of one element, from the generator of a device.

    On a GPU nothing waits for it: kernels read it there, and a replayed CUDA graph draws anew.
    """
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def _mul(m: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of m * x for 32-bit values held in int64, without overflow."""
    low = (x & 0xFFFF) * m
    high = (x >> 16) * m + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(key: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> Tensor:
    """Philox4x32-10 words of broadcastable int64 counters: shape (..., 4), values in [0, 2^32)."""
    x = list(torch.broadcast_tensors(c0, c1, c2, c3))
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(10):
        high0, low0 = _mul(0xD2511F53, x[0])
        high1, low1 = _mul(0xCD9E8D57, x[2])
        x = [high1 ^ x[1] ^ k0, low1, high0 ^ x[3] ^ k1, low0]
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return torch.stack(x, dim=-1)


def _keep(words: Tensor, columns: int, p: float) -> Tensor:
    return words.flatten(-2)[..., :columns] >= round(p * 2**32)


def attention_keep_mask(
    seed: Tensor, p: float, batch: int, heads: int, rows: int, columns: int
) -> Tensor:
    """Which attention probabilities dropout keeps: bool (batch, heads, rows, columns).

    Counter (column // 4, row, head, batch), word column % 4; kept when word >= round(p * 2**32).
    """
    quads = torch.arange((columns + 3) // 4)
    b = torch.arange(batch).view(-1, 1, 1, 1)
    h = torch.arange(heads).view(-1, 1, 1)
    i = torch.arange(rows).view(-1, 1)
    return _keep(philox(int(seed), quads, i, h, b), columns, p)


def lora_keep_mask(seed: Tensor, p: float, rows: int, columns: int) -> Tensor:
    """Which elements of x dropout keeps before the down projection: bool (rows, columns).

    Counter (column // 4, row, 0, 0), word column % 4; kept when word >= round(p * 2**32).
    """
    quads, zero = torch.arange((columns + 3) // 4), torch.zeros((), dtype=torch.int64)
    return _keep(philox(int(seed), quads, torch.arange(rows).view(-1, 1), zero, zero), columns, p)
