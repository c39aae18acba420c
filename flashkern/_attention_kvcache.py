"""Attention over caches: :func:`attention_kvcache`, the face of generation.

A call that is refused leaves the cache as it was: every check comes before the new tokens are
written, those of values (lengths, pages, beams) in the operator that writes them.
"""

from typing import Any

from torch import Tensor

from flashkern import _attention_args as args
from flashkern._attention_args import Window
from flashkern._attention_ops import APPEND, BEAMS, forward, needs_grad
from flashkern._checks import check, check_device, check_tensor
from flashkern._dispatch import reworded

# beam_table, shared_k, shared_v and shared_lengths.
_Beams = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _refuse_gradient(paged: bool, *tensors: Tensor | None) -> None:
    """Raises where a gradient would be recorded through beams, or through a paged cache."""
    if needs_grad(*tensors):
        what, where = ("a paged cache has", "pages") if paged else ("beams have", "keys")
        raise NotImplementedError(
            f"attention_kvcache: {what} no backward pass; detach the query, or gather the {where} "
            "and call attention"
        )


def _append(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor | None,
    lengths: Tensor,
    pages: Tensor | None,
    beams: _Beams,
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
        table, shared_k, _, shared_lengths = beams
        APPEND(k_cache, v_cache, k, v, lengths, pages, table, shared_k, shared_lengths)
    except RuntimeError as error:
        raise reworded(error) from None
    return lengths + rows


def _attend_beams(*arguments: Any) -> tuple[Tensor, Tensor]:
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
        k: (B, Hkv, Snew, D), keys to append; with ``v`` or not at all.
        v: (B, Hkv, Snew, Dv), values to append.
        page_table: (B, pages of a sequence) integers: token t of sequence b lies in page
            ``page_table[b, t // page_size]`` at ``t % page_size``.
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
            nothing waits to look: lengths end where the cache does, rows appended to such a page
            (-1 in a padded batch) are dropped, and such a page or beam is read as another one.
        NotImplementedError: dropout with ``shared_k``, or a gradient through beams or pages.

    A call that raises has written nothing.

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
    beams: _Beams = (None, None, None, None)
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
    if of_beams or pages is not None:
        _refuse_gradient(not of_beams, query, k_cache, v_cache, *beams[1:3], bias, sinks)
    assert lengths is not None
    if k is not None:
        lengths = _append(k_cache, v_cache, k, v, lengths, pages, beams)
    elif v is not None:
        check(False, op, "v", "come with k", "v alone")
    tensors = args.contiguous_rows(query, k_cache, v_cache)
    seed = args.seed_for(query, dropout_p)
    if of_beams:
        result = _attend_beams(
            *tensors, bias, slopes, sinks, lengths, pages, seed, *beams, *band, scale, softcap,
            dropout_p,
        )  # fmt: skip
    else:
        result = forward(
            *tensors, bias, slopes, sinks, lengths, None, None, pages, seed, rows, columns, *band,
            scale, softcap, dropout_p,
        )  # fmt: skip
    return result if return_lse else result[0]
