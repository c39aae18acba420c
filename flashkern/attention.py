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
from flashkern._attention_ops import APPEND, BEAMS, forward, needs_grad
from flashkern._checks import check, check_device, check_tensor
from flashkern._dispatch import reworded


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
        kv_lengths: (B,) integers: keys from kv_lengths[b] on are not seen. The diagonal stays.
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
        cu_seqlens_q: (B + 1,) integers, rising from 0 to Tq.
        cu_seqlens_k: (B + 1,) integers, rising from 0 to Tk.
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
        if most < 0:
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


def _append(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor | None,
    lengths: Tensor,
    pages: Tensor | None,
) -> Tensor:
    """Writes k and v behind each sequence's tokens; the new lengths."""
    op = "attention_kvcache"
    check_tensor(op, "k", k)
    check_tensor(op, "v", v)
    assert v is not None
    rows = k.shape[2] if k.dim() == 4 else 0
    for name, new, cache in (("k", k, k_cache), ("v", v, v_cache)):
        want = (lengths.shape[0], cache.shape[1], rows, cache.shape[3])
        if tuple(new.shape) != want:
            check(False, op, name, f"have shape {want}", tuple(new.shape))
        if new.dtype != cache.dtype:
            raise TypeError(
                f"{op}: {name} must have the dtype of its cache, {cache.dtype}, got {new.dtype}"
            )
        if new.device != cache.device:
            check_device(op, name, new, cache)
        if needs_grad(new, cache):
            check(False, op, name, "be detached where it goes into a cache", "requires_grad=True")
        if cache.stride(3) != 1:
            must = "have a contiguous last dimension"
            check(False, op, f"{name}_cache", must, f"strides {cache.stride()}")
    k, v = args.contiguous_last(k), args.contiguous_last(v)
    try:
        APPEND(k_cache, v_cache, k, v, lengths, pages)
    except RuntimeError as error:
        raise reworded(error) from None
    return lengths + rows


def _beams(*arguments: Any) -> tuple[Tensor, Tensor]:
    if needs_grad(*(a for a in arguments if isinstance(a, Tensor))):
        raise NotImplementedError(
            "attention_kvcache: beams have no backward pass; detach the query, or gather the keys "
            "and call attention"
        )
    try:
        return BEAMS(*arguments)
    except RuntimeError as error:
        raise reworded(error) from None


def attention_kvcache(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_lengths: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    page_table: Tensor | None = None,
    beam_table: Tensor | None = None,
    shared_k: Tensor | None = None,
    shared_v: Tensor | None = None,
    shared_lengths: Tensor | None = None,
    causal: bool | str = False,
    window: Window = None,
    scale: float | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Any:
    """Appends new keys and values to a cache, then attends to what each sequence has cached.

    Sequence b has ``cache_lengths[b]`` tokens before the call. The new ones, if any, are written
    behind them in place; ``cache_lengths`` is left for the caller to raise. The diagonal of
    ``causal`` and ``window`` ends at each sequence's own length, the new tokens included.

    Args:
        query: (B, H, Sq, D).
        k_cache: (B, Hkv, T, D), or with ``page_table`` (pages, Hkv, page_size, D).
        v_cache: (B, Hkv, T, Dv), or with ``page_table`` (pages, Hkv, page_size, Dv).
        cache_lengths: (B,) integers. int32 saves a conversion.
        k, v: (B, Hkv, Snew, D) and (B, Hkv, Snew, Dv) to append; both or neither.
        page_table: (B, pages of a sequence) integers: token t of sequence b lies in page
            ``page_table[b, t // page_size]`` at ``t % page_size``. On a GPU new tokens whose page
            does not exist (-1, where a batch is padded) are dropped.
        beam_table: (prompts, beams, T) integers, B = prompts * beams: token t of beam i lies in the
            row of the prompt's beam ``beam_table[p, i, t]``, at t. Beam search then reorders this
            table, never the cache. Appended tokens go to each beam's own row. The beams of a prompt
            have equal cache_lengths, here and with ``shared_k``.
        shared_k: (prompts, Hkv, S, D), each prompt's keys, read once, in front of its beams' own.
        shared_v: (prompts, Hkv, S, Dv), with ``shared_k`` or not at all.
        shared_lengths: (prompts,) integers, tokens of each prompt; None for S.
        bias: broadcastable to (B, H, Sq, T), T the capacity of a sequence; with ``shared_k`` to
            (B, H, Sq, S + T), a beam's own tokens behind those that its prompt has.

    The other arguments are those of :func:`attention`.

    Returns:
        The output, (B, H, Sq, Dv); with ``return_lse`` also lse, (B, H, Sq). Without pages, beams
        and an append, differentiable like :func:`attention`.

    Raises:
        TypeError: a dtype, or something that is not a tensor.
        ValueError: a shape, a device or a number, or appended tensors that require gradients.
        RuntimeError: lengths that leave the cache, or pages or beams that do not exist. On a GPU
            nothing waits to look: lengths end with the cache, and another page or beam is read.
        NotImplementedError: dropout with ``shared_k``, or a gradient through beams.

    Example:
        >>> import torch, flashkern as fk
        >>> k_cache, v_cache = torch.zeros(2, 1, 2, 16, 64).unbind()
        >>> lengths = torch.zeros(1, dtype=torch.int32)
        >>> for _ in range(3):
        ...     query, k, v = torch.randn(3, 1, 2, 1, 64).unbind()
        ...     output = fk.attention_kvcache(
        ...         query, k_cache, v_cache, cache_lengths=lengths, k=k, v=v)
        ...     lengths += 1
        >>> output.shape
        torch.Size([1, 2, 1, 64])
    """
    op = "attention_kvcache"
    query, k, v = args.autocast(query, k, v)
    layout = "(batch, heads, tokens, head_dim)"
    args.check_matrices(op, "query k_cache v_cache", query, k_cache, v_cache, 4, layout)
    batch, heads, rows, _ = query.shape
    check_tensor(op, "cache_lengths", cache_lengths)
    lengths = args.int_argument(op, "cache_lengths", cache_lengths, query, (batch,))
    pages = args.int_argument(op, "page_table", page_table, query, (batch, None))
    columns = k_cache.shape[2]
    if pages is not None:
        columns *= pages.shape[1]
    elif k_cache.shape[0] != batch:
        check(False, op, "k_cache", f"have query's batch of {batch}", k_cache.shape[0])
    band = args.band(op, causal, window, own_length=True)
    scale, softcap, dropout_p = args.numbers(op, query, scale, softcap, dropout_p)
    of_beams = beam_table is not None or shared_k is not None or shared_v is not None
    if of_beams:
        beams = args.beam_arguments(
            op, query, v_cache, columns, beam_table, shared_k, shared_v, shared_lengths, dropout_p
        )
        columns += 0 if beams[1] is None else beams[1].shape[2]
    elif shared_lengths is not None:
        check(False, op, "shared_lengths", "come with shared_k", "shared_lengths alone")
    bias, slopes, sinks, _ = args.optional(
        op, query, (batch, heads, rows, columns), bias, alibi_slopes, sinks, None
    )
    assert lengths is not None
    if k is not None:
        lengths = _append(k_cache, v_cache, k, v, lengths, pages)
    elif v is not None:
        check(False, op, "v", "come with k", "v alone")
    tensors = args.contiguous_rows(query, k_cache, v_cache)
    seed = args.seed_for(query, dropout_p)
    if of_beams:
        result = _beams(
            *tensors, bias, slopes, sinks, lengths, pages, seed, *beams, *band, scale, softcap,
            dropout_p,
        )  # fmt: skip
    else:
        result = forward(
            *tensors, bias, slopes, sinks, lengths, None, None, pages, seed, rows, columns, *band,
            scale, softcap, dropout_p,
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
            if t.shape != tensors[0].shape:
                must = f"have the same shape, {tuple(tensors[0].shape)}"
                check(False, op, name, must, tuple(t.shape))
    if outputs[0].shape[:-1] != lses[0].shape:
        must = f"have the shape of outputs without the last dimension, {tuple(outputs[0].shape)}"
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
