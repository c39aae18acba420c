"""Attention: softmax(scale Q K^T + bias, masked) V, exact, without its matrix of scores in memory.

One definition (:func:`flashkern.reference.attention`), one family of kernels, four faces:
:func:`attention` for dense batches, :func:`attention_varlen` for packed ones,
:func:`attention_kvcache` for generation and :func:`scaled_dot_product_attention` for callers of
torch's own function. :func:`merge_attention` joins partial results.

Dao, Fu, Ermon, Rudra, Ré: FlashAttention (2022). Dao: FlashAttention-2 (2023).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashkern import _attention_args as args
from flashkern._attention_args import Window
from flashkern._attention_kvcache import attention_kvcache
from flashkern._attention_ops import forward
from flashkern._checks import FLOATS, check, check_dtype, check_tensor, integer

__all__ = ["attention", "attention_kvcache", "attention_varlen", "merge_attention"]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool | str = False,
    window: Window = None,
    scale: float | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Any:
    """Attention over dense batches.

    With o = Sk - Sq (o = 0 for ``causal="top_left"``), row i and key j have the logit
    ``softcap(scale * q_i . k_j) - slope * |i + o - j| + bias``; masked keys have none. The softmax
    of a row, after dropout, weighs the rows of ``value``. A row that may attend to nothing gives 0.

    Args:
        query: (B, H, Sq, D); float32, bfloat16, float16 or, on a CPU, float64; D a multiple of 8
            up to 256.
        key: (B, Hkv, Sk, D); Hkv divides H: query head h reads key head h // (H / Hkv).
        value: (B, Hkv, Sk, Dv); Dv a multiple of 8 up to 256.
        causal: True or ``"bottom_right"``: the last row sees every key. ``"top_left"``: the first
            row sees the first key alone.
        window: (left, right): row i sees keys from i + o - left to i + o + right; None for
            unbounded on a side. With ``causal``, right is 0.
        scale: factor of the scores; ``D ** -0.5`` when None.
        softcap: c > 0 replaces a score s by ``c * tanh(s / c)``; 0 for none.
        bias: bool (True: attend) or float (added), broadcastable to (B, H, Sq, Sk).
        alibi_slopes: (H,) or (B, H). Not differentiable.
        sinks: (H,), one more logit for each row, without a value.
        kv_lengths: (B,) integers: keys from kv_lengths[b] on are not seen, none where it is
            negative. The diagonal stays.
        dropout_p: probability of dropping a weight, in [0, 1). The mask is a function of a seed
            drawn from torch's generator (:mod:`flashkern.random`).
        return_lse: also return the log-sum-exp of each row's logits.

    Returns:
        The output, (B, H, Sq, Dv), in query's dtype. With ``return_lse`` a pair of it and lse,
        (B, H, Sq), float32 (float64 beside float64), natural logarithm, without dropout, -inf for
        a row that may attend to nothing. Both differentiable in query, key, value, float bias and
        sinks, once.

    Raises:
        TypeError: a dtype, or something that is not a tensor.
        ValueError: a shape, a device or a number.

    Example:
        >>> import torch, flashkern as fk
        >>> query, key, value = torch.randn(3, 2, 4, 10, 64).unbind()
        >>> fk.attention(query, key, value, causal=True, window=(3, None)).shape
        torch.Size([2, 4, 10, 64])
        >>> output, lse = fk.attention(query, key[:, :1], value[:, :1], return_lse=True)
        >>> lse.shape
        torch.Size([2, 4, 10])
    """
    op = "attention"
    query, key, value = args.autocast(query, key, value)
    layout = "(batch, heads, sequence, head_dim)"
    args.check_matrices(op, "query key value", query, key, value, 4, layout)
    batch, heads, rows, _ = query.shape
    columns = key.shape[2]
    if key.shape[0] != batch:
        check(False, op, "key", f"have query's batch of {batch}", key.shape[0])
    band = args.band(op, causal, window, own_length=False)
    scale, softcap, dropout_p = args.numbers(op, query, scale, softcap, dropout_p)
    result = forward(
        *args.contiguous_rows(query, key, value),
        *args.optional(
            op, query, (batch, heads, rows, columns), bias, alibi_slopes, sinks, kv_lengths),
        None, None, None, args.seed_for(query, dropout_p),
        rows, columns, *band, scale, softcap, dropout_p,
    )  # fmt: skip
    return result if return_lse else result[0]


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool | str = False,
    window: Window = None,
    scale: float | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Any:
    """Attention over sequences of many lengths, packed end to end without padding.

    Sequence b has the query rows ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]`` and the keys
    ``cu_seqlens_k[b]`` to ``cu_seqlens_k[b + 1]``. Each is an :func:`attention` of its own, and
    its diagonal ends at its own last key. Rows of ``query`` that no sequence holds give 0.

    Args:
        query: (Tq, H, D), the rows of all sequences.
        key: (Tk, Hkv, D).
        value: (Tk, Hkv, Dv).
        cu_seqlens_q: (B + 1,) integers that never fall, from 0 or more to Tq or less.
        cu_seqlens_k: (B + 1,) integers that never fall, from 0 or more to Tk or less.
        max_seqlen_q: the most rows that a sequence has.
        max_seqlen_k: the most keys that a sequence has.
        bias: broadcastable to (B, H, max_seqlen_q, max_seqlen_k); each sequence uses its corner.
        kv_lengths: (B,): only so many keys of a sequence are seen, and the diagonal ends there.

    The other arguments are those of :func:`attention`.

    Returns:
        The output, (Tq, H, Dv); with ``return_lse`` also lse, (H, Tq).

    Raises:
        TypeError: a dtype, or something that is not a tensor.
        ValueError: a shape, a device or a number.
        RuntimeError: cu_seqlens that fall, leave the tensors or pass max_seqlen. On a GPU nothing
            waits to look: a sequence ends where its tensor or max_seqlen does.

    Example:
        >>> import torch, flashkern as fk
        >>> query, key, value = torch.randn(3, 12, 4, 64).unbind()
        >>> starts = torch.tensor([0, 5, 12], dtype=torch.int32)
        >>> fk.attention_varlen(query, key, value, starts, starts, 7, 7, causal=True).shape
        torch.Size([12, 4, 64])
    """
    op = "attention_varlen"
    query, key, value = args.autocast(query, key, value)
    layout = "(tokens, heads, head_dim)"
    args.check_matrices(op, "query key value", query, key, value, 3, layout)
    starts_q = args.int_argument(op, "cu_seqlens_q", cu_seqlens_q, query, (None,))
    if starts_q is None or starts_q.shape[0] == 0:
        check(False, op, "cu_seqlens_q", "have shape (batch + 1,)", cu_seqlens_q)
    batch = starts_q.shape[0] - 1  # type: ignore[union-attr]
    starts_k = args.int_argument(op, "cu_seqlens_k", cu_seqlens_k, query, (batch + 1,))
    check_tensor(op, "cu_seqlens_k", starts_k)
    for name, most in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if integer(op, name, most) < 0:
            check(False, op, name, "not be negative", most)
    shape = (batch, query.shape[1], max_seqlen_q, max_seqlen_k)
    band = args.band(op, causal, window, own_length=True)
    scale, softcap, dropout_p = args.numbers(op, query, scale, softcap, dropout_p)
    result = forward(
        *args.contiguous_rows(query, key, value),
        *args.optional(op, query, shape, bias, alibi_slopes, sinks, kv_lengths),
        starts_q, starts_k, None, args.seed_for(query, dropout_p),
        max_seqlen_q, max_seqlen_k, *band, scale, softcap, dropout_p,
    )  # fmt: skip
    return result if return_lse else result[0]


def merge_attention(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Joins attention over parts of the keys into attention over all of them, exactly.

    Parts may be shards of a context, a shared prefix and its suffixes, or splits of a long cache.
    A sink must be given to one part alone.

    Args:
        outputs: tensors (..., D), normalised within their part.
        lses: tensors (...), natural logarithm, -inf where a part had nothing to attend to.

    Returns:
        The output, (..., D), in the dtype of the first output, and its lse, (...). Sums are in the
        dtype of lse. Differentiable, also where parts are empty.

    Raises:
        ValueError: no parts, or parts of different numbers or shapes.

    Example:
        >>> import torch, flashkern as fk
        >>> query, key, value = torch.randn(3, 1, 2, 6, 64).unbind()
        >>> left = fk.attention(query, key[:, :, :4], value[:, :, :4], return_lse=True)
        >>> right = fk.attention(query, key[:, :, 4:], value[:, :, 4:], return_lse=True)
        >>> output, lse = fk.merge_attention(*zip(left, right))
        >>> torch.allclose(output, fk.attention(query, key, value), atol=1e-5)
        True
    """
    op = "merge_attention"
    outputs, lses = list(outputs), list(lses)
    check(len(outputs) > 0, op, "outputs", "hold at least one tensor", "none")
    check(len(outputs) == len(lses), op, "lses", f"hold {len(outputs)} tensors", len(lses))
    for name, tensors in (("outputs", outputs), ("lses", lses)):
        for t in tensors:
            check_tensor(op, name, t)
            check_dtype(op, name, t, FLOATS)
            if t.shape != tensors[0].shape:
                must = f"have the same shape, {tuple(tensors[0].shape)}"
                check(False, op, name, must, tuple(t.shape))
    if outputs[0].shape[:-1] != lses[0].shape:
        must = (
            f"have the shape of outputs but for the last dimension, {tuple(outputs[0].shape[:-1])}"
        )
        check(False, op, "lses", must, tuple(lses[0].shape))
    stacked = torch.stack(lses)
    # A row that is empty in every part stays out of the logsumexp, whose gradient there is NaN.
    nothing = (stacked == -torch.inf).all(dim=0)
    finite = stacked.masked_fill(nothing, 0).logsumexp(dim=0)
    lse = finite.masked_fill(nothing, -torch.inf)
    weights = (stacked - finite).exp()
    output = sum(w.unsqueeze(-1) * o.to(w.dtype) for w, o in zip(weights, outputs, strict=True))
    assert isinstance(output, Tensor)
    return output.to(outputs[0].dtype), lse
