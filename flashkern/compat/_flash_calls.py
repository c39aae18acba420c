"""What flash_attn's functions have in common: their options, layouts and names of arguments."""

from typing import Any

from torch import Tensor

from flashkern._checks import check, check_tensor

# flashkern's name of an argument: flash_attn's.
NAMES = {
    "query": "q",
    "key": "k",
    "value": "v",
    "scale": "softmax_scale",
    "window": "window_size",
    "cache_lengths": "cache_seqlens",
    "page_table": "block_table",
}

Window = tuple[int, int]


def _window(window_size: Window) -> tuple[int | None, int | None] | None:
    """flash_attn writes -1 where flashkern writes None."""
    left, right = window_size
    return (None if left < 0 else left, None if right < 0 else right)


def call_options(
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Window,
    softcap: float,
    alibi_slopes: Tensor | None,
) -> dict[str, Any]:
    return {
        "dropout_p": dropout_p,
        "scale": softmax_scale,
        "causal": bool(causal),
        "window": _window(window_size),
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "return_lse": True,
    }


def check_layout(op: str, layout: tuple[str, ...], q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises unless the three are tensors with these dimensions."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(op, name, tensor)
        if tensor.dim() != len(layout):
            must = f"have {len(layout)} dimensions, ({', '.join(layout)})"
            check(False, op, name, must, tuple(tensor.shape))


def scale_of(q: Tensor, softmax_scale: float | None) -> float | None:
    """The scale by q's own head_dim, not by a padded one."""
    if softmax_scale is None and isinstance(q, Tensor) and q.dim():
        return max(q.shape[-1], 1) ** -0.5
    return softmax_scale
