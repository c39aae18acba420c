"""What no kernel takes gets an error of one line, in the words of the function that was called."""

from typing import Any

import pytest
import torch

import flashkern as fk
from flashkern._dispatch import reworded


def test_tensors_without_a_kernel() -> None:
    """The dispatcher's own error, as it comes for a GPU's tensors in a build for CPUs."""
    weight, a, b = torch.randn(8, 64), torch.randn(4, 64), torch.randn(8, 4)
    with pytest.raises(NotImplementedError) as caught:
        fk.lora_linear(torch.randn(4, 64).to_sparse(), weight, a, b)
    text = "lora_linear: tensors must be of a kind that this build has a kernel for, got SparseCPU"
    assert str(caught.value).startswith(text) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("operator", "face"),
    [
        ("attention_forward", "attention"),
        ("attention_append_kv", "attention_kvcache"),
        ("attention_beams", "attention_kvcache"),
        ("beam_topk", "beam_topk"),
    ],
)
def test_the_function_is_named_not_the_operator(operator: str, face: str) -> None:
    text = f"Could not run 'flashkern::{operator}' with arguments from the 'CUDA' backend. This ..."
    error = reworded(NotImplementedError(text))
    assert type(error) is NotImplementedError
    assert str(error).startswith(f"{face}: tensors must be of a kind") and "got CUDA" in str(error)


Q = torch.randn(2, 2, 6, 16)
LOGITS, SCORES = torch.randn(1, 2, 11), torch.zeros(1, 2)
NESTED = torch.nested.nested_tensor([torch.randn(2, 6, 16)] * 2, layout=torch.jagged)
TRIE = fk.Trie.from_sequences([[1, 2]])
STARTS = torch.tensor([0, 6], dtype=torch.int32)


def lora(x: torch.Tensor = Q, dtype: torch.dtype = torch.float32, **options: Any) -> torch.Tensor:
    weight, b = torch.randn(8, 16), torch.randn(8, 4)
    return fk.lora_linear(x, weight, torch.randn(4, 16, dtype=dtype), b.to(dtype), **options)


def many_adapters(ids: torch.Tensor) -> torch.Tensor:
    a, b = torch.randn(3, 4, 16), torch.randn(3, 8, 4)
    return fk.lora_linear_multi(Q[0, 0], torch.randn(8, 16), a, b, ids)


def topk(k: Any = 2, **options: Any) -> fk.BeamTopK:
    return fk.beam_topk(LOGITS.double(), SCORES.double(), k, **options)


def varlen(most: Any) -> torch.Tensor:
    x = Q[0].transpose(0, 1)
    return fk.attention_varlen(x, x, x, STARTS, STARTS, most, most)


def kvcache_under_autocast() -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return fk.attention_kvcache(Q, Q, Q, cache_lengths=torch.tensor([1, 1]))


CALLS: list[tuple[type[Exception], str, Any]] = [
    # numbers
    (
        TypeError,
        "beam_topk: k must be an integer, got 2.0",
        lambda: fk.beam_topk(LOGITS, SCORES, 2.0),
    ),
    (TypeError, "beam_topk: k must be an integer, got None", lambda: topk(None)),
    (TypeError, "beam_topk: k must be an integer, got '2'", lambda: topk("2")),
    (
        TypeError,
        "attention: scale must be a number, got str",
        lambda: fk.attention(Q, Q, Q, scale="1"),
    ),
    (
        TypeError,
        "attention: scale must be a number, got Parameter",
        lambda: fk.attention(Q, Q, Q, scale=torch.nn.Parameter(torch.ones(()))),
    ),
    (TypeError, "softcap must be a number, got None", lambda: fk.attention(Q, Q, Q, softcap=None)),
    (ValueError, "window must .* below 2", lambda: fk.attention(Q, Q, Q, window=(2**70, None))),
    (TypeError, "max_seqlen_q must be an integer, got 7.0", lambda: varlen(7.0)),
    (TypeError, "max_seqlen_q must be an integer, got None", lambda: varlen(None)),
    # tensors that are not dense
    (
        TypeError,
        "dense tensor, got layout torch.sparse",
        lambda: fk.attention(*[Q.to_sparse()] * 3),
    ),
    (TypeError, "query must be a dense tensor, got a nested", lambda: fk.attention(*[NESTED] * 3)),
    (
        TypeError,
        "logits must be a dense tensor, got layout",
        lambda: fk.beam_topk(LOGITS.to_sparse(), SCORES, 2),
    ),
    # parts
    (TypeError, "merge_topk: parts must hold BeamTopK, got int", lambda: fk.merge_topk([1])),
    (ValueError, r"last dimension, \(2, 2, 6\), got", lambda: fk.merge_attention([Q], [Q])),
    (
        TypeError,
        "merge_attention: outputs must have dtype",
        lambda: fk.merge_attention([Q.int()], [Q[..., 0]]),
    ),
    # tries
    (TypeError, "Trie: sequences must be an", lambda: fk.Trie.from_sequences([1, 2])),
    (TypeError, "Trie: sequences must be an", lambda: fk.Trie.from_sequences(None)),
    (TypeError, "Trie: sequences must be an", lambda: fk.Trie.from_sequences(["ab"])),
    (TypeError, "nodes must have dtype", lambda: TRIE.advance(torch.zeros(1), torch.tensor([1]))),
    (
        RuntimeError,
        r"excluded must lie in \[-1, 11\), got 11",
        lambda: topk(excluded=torch.tensor([[[11], [1]]])),
    ),
    (
        RuntimeError,
        r"excluded must lie in \[-1, 11\), got -2",
        lambda: topk(excluded=torch.tensor([[[-2], [1]]])),
    ),
    (
        RuntimeError,
        r"nodes must lie in \[-1, 3\), got 99",
        lambda: topk(trie=TRIE, nodes=torch.tensor([[99, 0]])),
    ),
    # words of the function that was called
    (TypeError, "lora_a must have dtype float32, got float16", lambda: lora(dtype=torch.float16)),
    (ValueError, r"have shape \(6,\), got \(5,\)", lambda: many_adapters(torch.zeros(5).long())),
    (
        TypeError,
        "^scaled_dot_product_attention: attn_mask must be a tensor, got list",
        lambda: fk.scaled_dot_product_attention(Q, Q, Q, attn_mask=[1]),
    ),
    (
        ValueError,
        "^scaled_dot_product_attention: attn_mask must be broadcastable",
        lambda: fk.scaled_dot_product_attention(Q, Q, Q, attn_mask=torch.ones(3, 3)),
    ),
    (
        ValueError,
        "query must have a head_dim of 256 at most, got 300",
        lambda: fk.scaled_dot_product_attention(*[torch.randn(1, 1, 2, 300)] * 3),
    ),
    (TypeError, r"bfloat16 \(autocast's\), got torch.float32", kvcache_under_autocast),
]


@pytest.mark.parametrize(("error", "text", "call"), CALLS, ids=[text for _, text, _ in CALLS])
def test_refusals(error: type[Exception], text: str, call: Any) -> None:
    with pytest.raises(error, match=text):
        call()


def test_a_trie_without_the_node() -> None:
    nodes = torch.tensor([99, -1, 2])
    assert TRIE.advance(nodes, torch.tensor([1, 1, 1])).tolist() == [-1, -1, -1]
    assert TRIE.is_leaf(nodes).tolist() == [False, False, True]
