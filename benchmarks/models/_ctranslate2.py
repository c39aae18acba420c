"""Read a CTranslate2 Whisper file (binary version 6) into a transformers state dict.

The file is a flat list of named arrays. After a u32 version and the specification's name, each
variable has its name (u16 length, NUL-terminated), rank (u8), dimensions (u32 each), a type code
(u8), a byte count (u32) and its data. Aliases (tied weights) close the file. Weights are float16
(code 4). Query, key and value are stacked in one matrix, as are key and value of cross attention.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

_FLOAT16 = 4


def variables(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The float16 arrays of the file at `path` with their names; settings are left out."""
    with path.open("rb") as file:

        def number(code: str) -> int:
            return struct.unpack("<" + code, file.read(struct.calcsize(code)))[0]

        def string() -> str:
            return file.read(number("H"))[:-1].decode()

        version = number("I")
        if version != 6:
            raise ValueError(f"{path.name}: binary version must be 6, got {version}")
        string(), number("I")  # the specification's name and revision
        for _ in range(number("I")):
            name = string()
            shape = [number("I") for _ in range(number("B"))]
            code, size = number("B"), number("I")
            data = file.read(size)
            if code == _FLOAT16:
                yield name, np.frombuffer(data, np.float16).reshape(shape)


_SCOPES = {
    "self_attention": ("self_attn", "self_attn_layer_norm"),
    "attention": ("encoder_attn", "encoder_attn_layer_norm"),
}
_KINDS = {"gamma": "weight", "beta": "bias", "weight": "weight", "bias": "bias"}


def _layer_entries(scope: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Names inside one transformer layer: `ffn/linear_0/weight` becomes `fc1.weight`, and so on."""
    block, part, kind = scope.split("/")
    kind = _KINDS[kind]
    if block == "ffn":
        name = {"linear_0": "fc1", "linear_1": "fc2", "layer_norm": "final_layer_norm"}[part]
        yield f"{name}.{kind}", array
        return
    attention, norm = _SCOPES[block]
    stacked = {
        "self_attention": {"linear_0": ("q_proj", "k_proj", "v_proj"), "linear_1": ("out_proj",)},
        "attention": {
            "linear_0": ("q_proj",),
            "linear_1": ("k_proj", "v_proj"),
            "linear_2": ("out_proj",),
        },
    }
    if part == "layer_norm":
        yield f"{norm}.{kind}", array
        return
    names = stacked[block][part]
    for name, piece in zip(names, np.split(array, len(names)), strict=True):
        if (name, kind) != ("k_proj", "bias"):  # Whisper has none: the file stores zeros
            yield f"{attention}.{name}.{kind}", piece


def whisper_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The float32 state dict of transformers' WhisperForConditionalGeneration."""
    top = {
        "embeddings/weight": "embed_tokens.weight",
        "position_encodings/encodings": "embed_positions.weight",
        "layer_norm/gamma": "layer_norm.weight",
        "layer_norm/beta": "layer_norm.bias",
    }
    state: dict[str, torch.Tensor] = {}

    def put(name: str, array: np.ndarray) -> None:
        state[f"model.{name}"] = torch.from_numpy(array.astype(np.float32))

    for name, array in variables(path):
        side, _, rest = name.partition("/")
        if rest.startswith("layer_") and not rest.startswith("layer_norm"):
            layer, _, inner = rest.partition("/")
            for entry, piece in _layer_entries(inner, array):
                put(f"{side}.layers.{layer.removeprefix('layer_')}.{entry}", piece)
        else:
            put(f"{side}.{top.get(rest, rest.replace('/', '.'))}", array)
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    return state
