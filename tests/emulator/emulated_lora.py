"""The sm_80 LoRA launchers, run by the emulator, in place of the operators of flashkern."""

import ctypes
from ctypes import c_char_p, c_int, c_int64, c_uint64, c_void_p
from typing import Any

import pytest
import torch
from torch import Tensor

import flashkern.lora

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BASES = {"blas": 0, "own": 1, "few": 2}


class Adapters(ctypes.Structure):
    _fields_ = [
        ("count", c_int64),
        ("rank", c_int64),
        ("dtype", c_int),
        ("a", c_void_p),
        ("b", c_void_p),
        ("scale", c_void_p),
        ("ids", c_void_p),
    ]


class Forward(ctypes.Structure):
    _fields_ = [
        *[(name, c_int64) for name in ("rows", "in", "out")],
        *[(name, c_int) for name in ("dtype", "base")],
        ("x", c_void_p),
        ("x_row", c_int64),
        *[(name, c_void_p) for name in ("weight", "bias", "y", "h")],
        ("adapters", Adapters),
        *[(name, c_uint64) for name in ("seed", "threshold")],
    ]


class Backward(ctypes.Structure):
    _fields_ = [
        *[(name, c_int64) for name in ("rows", "in", "out")],
        *[(name, c_int) for name in ("dtype", "base")],
        ("x", c_void_p),
        ("x_row", c_int64),
        ("dy", c_void_p),
        ("dy_row", c_int64),
        *[(name, c_void_p) for name in ("h", "weight", "dx", "da", "db")],
        ("adapters", Adapters),
        *[(name, c_uint64) for name in ("seed", "threshold")],
    ]


def pointer(t: Tensor | None) -> int | None:
    return None if t is None or t.numel() == 0 else t.data_ptr()


def packed(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def rows_of(t: Tensor) -> Tensor:
    rows = t.reshape(-1, t.shape[-1])
    return rows if rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1] else rows.contiguous()


class EmulatedLora:
    """Looks like ``flashkern._ops.ops`` to a test that calls the operators themselves."""

    def __init__(self, library: str) -> None:
        self.library = ctypes.CDLL(library)
        self.base = "own"
        for name in ("fk_lora_forward", "fk_lora_backward"):
            getattr(self.library, name).restype = c_char_p

    def set_seed(self, seed: int) -> None:
        self.library.fk_emulator_seed(c_uint64(seed))

    def _call(self, name: str, params: ctypes.Structure) -> None:
        message = getattr(self.library, name)(ctypes.byref(params))
        if message:
            raise RuntimeError(message.decode())

    def _adapters(self, a: Tensor, b: Tensor, ids: Any, scalings: Any, scaling: float, p: float):
        several = ids is not None
        kept = 0.0 if p == 1.0 else 1 / (1 - p)
        scale = scalings * kept if several else torch.tensor([scaling * kept], dtype=torch.float64)
        count = a.shape[0] if several else 1
        assert scale.dtype == torch.float64 and (not several or ids.dtype == torch.int64)
        fields = (count, a.shape[-2], DTYPES[a.dtype], *map(pointer, (a, b, scale, ids)))
        return Adapters(*fields), (a, b, scale, ids)

    def lora_linear(
        self, x, weight, lora_a, lora_b, bias, ids, scalings, scaling, dropout_p, seed
    ) -> tuple[Tensor, Tensor]:
        if x.dtype not in DTYPES:
            pytest.skip("float64 has no CUDA kernels")
        flat, weight = rows_of(x), weight.contiguous()
        rows, out = flat.shape[0], weight.shape[0]
        y = torch.full((rows, out), torch.nan, dtype=x.dtype)
        h = torch.full((rows, lora_a.shape[-2]), torch.nan)
        if self.base == "blas":
            y = torch.nn.functional.linear(flat, weight, bias).contiguous()
        base = "few" if self.base == "own" and rows <= 64 else self.base  # as plan.h chooses
        held = (lora_a.contiguous(), lora_b.contiguous(), packed(ids), packed(scalings))
        adapters, kept = self._adapters(*held, scaling, dropout_p)
        params = Forward(
            *(rows, weight.shape[1], out, DTYPES[x.dtype], BASES[base]),
            *(pointer(flat), flat.stride(0), pointer(weight), pointer(bias), pointer(y)),
            *(pointer(h), adapters, *mask(dropout_p, seed)),
        )
        self._call("fk_lora_forward", params)
        return y.view(*x.shape[:-1], out), h

    def lora_linear_backward(
        self, grad, x, weight, lora_a, lora_b, h, ids, scalings, scaling, dropout_p, seed, *needs
    ) -> tuple[Tensor, Tensor, Tensor]:
        dy, flat, weight = rows_of(grad), rows_of(x), weight.contiguous()
        held = (lora_a.contiguous(), lora_b.contiguous(), packed(ids), packed(scalings))
        adapters, kept = self._adapters(*held, scaling, dropout_p)
        results = [
            torch.full(t.shape if need else (0,), torch.nan, dtype=t.dtype)
            for t, need in zip((x, *held[:2]), needs, strict=True)
        ]
        if self.base == "blas" and needs[0]:
            results[0] = (dy @ weight).reshape(x.shape).contiguous()
        params = Backward(
            *(flat.shape[0], weight.shape[1], weight.shape[0]),
            *(DTYPES[x.dtype], BASES[self.base], pointer(flat), flat.stride(0)),
            *(pointer(dy), dy.stride(0), pointer(h), pointer(weight), *map(pointer, results)),
            *(adapters, *mask(dropout_p, seed)),
        )
        self._call("fk_lora_backward", params)
        return tuple(results)

    def put_in_place(self, patch: pytest.MonkeyPatch, *modules: Any) -> None:
        """The operators of flashkern.lora, and of tests that hold them by name, run here."""
        emulated = self

        class Op(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
                output = emulated.lora_linear(*args)
                flashkern.lora._setup_context(ctx, args, output)
                return output

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
                return flashkern.lora._backward(ctx, *grads)

        class Ops:
            lora_linear = staticmethod(Op.apply)
            lora_linear_backward = staticmethod(emulated.lora_linear_backward)

        patch.setattr(flashkern.lora, "_forward", Op.apply)
        patch.setattr(flashkern.lora, "_backward_pass", self.lora_linear_backward)
        for module in modules:
            if hasattr(module, "ops"):
                patch.setattr(module, "ops", Ops)


def mask(dropout_p: float, seed: Tensor | None) -> tuple[int, int]:
    if dropout_p == 0.0 or seed is None:
        return 0, 0
    return int(seed) & (2**64 - 1), round(dropout_p * 2**32)
