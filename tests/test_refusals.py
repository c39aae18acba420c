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
