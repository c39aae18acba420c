"""torch's scaled_dot_product_attention, with torch's own signature and meaning, by our kernels."""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from flashkern import _attention_args as args
from flashkern._checks import FLOATS, check, check_dtype, check_tensor, renamed
from flashkern.attention import attention

_OP = "scaled_dot_product_attention"


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """:func:`torch.nn.functional.scaled_dot_product_attention`, argument for argument.

    As there, ``is_causal`` puts the diagonal at the top left, ``dropout_p`` always applies, leading
    dimensions broadcast, and a row that may attend to nothing gives 0. Dropout draws another mask
    than torch's from the same generator. A head_dim that is not a multiple of 8 is padded with
    zeros, a copy.

    Args:
        query: (..., H, L, E), any number of leading dimensions, none included.
        key: (..., H, S, E), or with ``enable_gqa`` (..., Hkv, S, E) with Hkv dividing H.
        value: (..., H, S, Ev), or with ``enable_gqa`` (..., Hkv, S, Ev).
        attn_mask: bool (True: attend) or float (added), broadcastable to (..., H, L, S).
        dropout_p: probability of dropping an attention weight, in [0, 1): torch takes 1 as well,
            which leaves nothing.
        is_causal: row i sees keys 0 to i. Not together with ``attn_mask``.
        scale: factor of the scores; ``E ** -0.5`` when None.
        enable_gqa: query heads may share key and value heads.

    Returns:
        (..., H, L, Ev), in query's dtype.

    Raises:
        TypeError: a dtype, or something that is not a tensor.
        ValueError: a shape, a device or a number, or both ``attn_mask`` and ``is_causal``.

    Example:
        >>> import torch, flashkern as fk
        >>> query, key, value = torch.randn(3, 2, 4, 10, 64).unbind()
        >>> ours = fk.scaled_dot_product_attention(query, key, value, is_causal=True)
        >>> theirs = torch.nn.functional.scaled_dot_product_attention(
        ...     query, key, value, is_causal=True)
        >>> torch.allclose(ours, theirs, atol=1e-5)
        True
    """
    if is_causal and attn_mask is not None:
        check(False, _OP, "attn_mask", "be None when is_causal is set", "both")
    if not _plain(query, key, value, attn_mask, enable_gqa):
        try:
            return _general(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        except Exception as error:
            raise renamed(error, _OP, {"bias": "attn_mask"}) from None
    causal = "top_left" if is_causal else False
    try:
        return attention(
            query, key, value, causal=causal, bias=attn_mask, dropout_p=dropout_p, scale=scale
        )
    except Exception as error:
        raise renamed(error, _OP, {"bias": "attn_mask"}) from None


def _plain(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, enable_gqa: bool
) -> bool:
    """Whether attention() takes these tensors as they are."""
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            check_tensor(_OP, name, tensor)
    q, k, v = query.shape, key.shape, value.shape
    return (
        len(q) == len(k) == len(v) == 4
        and q[0] == k[0] == v[0]
        and k[1] == v[1]
        and (enable_gqa or q[1] == k[1])
        and q[3] % 8 == 0
        and v[3] % 8 == 0
        and (mask is None or (isinstance(mask, Tensor) and mask.dim() <= 4))
    )


def with_dims(t: Tensor, dims: int) -> Tensor:
    """With leading dimensions of one, so many at least."""
    return t.reshape((1,) * (dims - t.dim()) + t.shape)


def _general(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """Any layout that torch takes, brought to four dimensions."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_dtype(_OP, name, tensor, FLOATS)
        most, have = args.MAX_HEAD_DIM, tensor.shape[-1] if tensor.dim() else 0
        check(have <= most, _OP, name, f"have a head_dim of {most} at most", have)
        check(tensor.dim() >= 2, _OP, name, "have two dimensions or more", tuple(tensor.shape))
    if key.shape[-2] != value.shape[-2]:
        check(False, _OP, "value", f"have key's {key.shape[-2]} rows", value.shape[-2])
    dims = max(query.dim(), key.dim(), value.dim())
    query4, key4, value4 = (with_dims(t, max(dims, 3)) for t in (query, key, value))
    heads = query4.shape[-3]
    if enable_gqa:
        key4, value4 = _share_heads(key4, value4, heads)
    elif heads == 1 or heads not in (key4.shape[-3], value4.shape[-3]):
        heads = max(key4.shape[-3], value4.shape[-3], heads)
    kv_heads = key4.shape[-3] if enable_gqa else heads
    try:
        lead = torch.broadcast_shapes(*(t.shape[:-3] for t in (query4, key4, value4)))
        query4 = query4.expand(*lead, heads, -1, -1)
        key4 = key4.expand(*lead, kv_heads, -1, -1)
        value4 = value4.expand(*lead, kv_heads, -1, -1)
    except RuntimeError:
        shapes = [tuple(t.shape) for t in (query, key, value)]
        check(False, _OP, "query, key and value", "broadcast in their leading dimensions", shapes)
    batch = math.prod(lead)
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    query4, key4, value4 = (t.reshape(batch, *t.shape[-3:]) for t in (query4, key4, value4))
    shape = (*lead, heads, query.shape[-2], key.shape[-2])
    output = attention(
        *map(pad_head, (query4, key4, value4)),
        causal="top_left" if is_causal else False,
        bias=_flat_mask(mask, shape, batch),
        dropout_p=dropout_p,
        scale=head_dim**-0.5 if scale is None else scale,
    )
    output = cut_head(output, value_dim, query4)
    output = output.reshape(*lead, heads, query.shape[-2], value_dim)
    return output.reshape(output.shape[len(output.shape) - dims :]) if dims == 2 else output


def _share_heads(key: Tensor, value: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Key and value with one number of heads: the greater one where they differ."""
    most = max(key.shape[-3], value.shape[-3])
    for name, tensor in (("key", key), ("value", value)):
        have = tensor.shape[-3]
        divides = have > 0 and heads % have == 0 and most % have == 0
        check(divides, _OP, name, f"have a number of heads that divides query's {heads}", have)
    return tuple(t.repeat_interleave(most // t.shape[-3], -3) if t.shape[-3] != most else t
                 for t in (key, value))  # type: ignore[return-value]  # fmt: skip


def pad_head(tensor: Tensor) -> Tensor:
    """The tensor with its last dimension padded by zeros to a multiple of 8."""
    missing = -tensor.shape[-1] % 8
    return pad(tensor, (0, missing)) if missing else args.contiguous_last(tensor)


def cut_head(output: Tensor, value_dim: int, query: Tensor) -> Tensor:
    """Without the padding of the last dimension, in memory of its own, laid out as query is.

    Callers view torch's output as (batch, rows, heads * head_dim).
    """
    if output.shape[-1] == value_dim:
        return output
    output = output[..., :value_dim]
    if query.stride(-3) < query.stride(-2):
        return output.transpose(-3, -2).contiguous().transpose(-3, -2)
    return output.contiguous()


def _flat_mask(mask: Tensor | None, shape: tuple[int, ...], batch: int) -> Tensor | None:
    """A mask for (..., H, L, S) with its leading dimensions made one; size 1 stays 1."""
    if mask is None:
        return None
    check_tensor(_OP, "attn_mask", mask)
    if mask.dim() <= 4 and len(shape) <= 4:
        return mask
    try:
        mask.expand(shape)
    except RuntimeError:
        check(False, _OP, "attn_mask", f"be broadcastable to {shape}", tuple(mask.shape))
    if math.prod(mask.shape[:-3]) == 1:
        return mask.reshape(mask.shape[-3:]) if mask.dim() > 3 else mask
    return mask.expand(*shape[:-3], *mask.shape[-3:]).reshape(batch, *mask.shape[-3:])
