"""flashkern: flash attention, fused LoRA linear and beam-search top-k for PyTorch.

Each operator is exact and has one definition (:mod:`flashkern.reference`) and several kernels.
"""

from flashkern._ops import cpu_isa
from flashkern._version import __version__
from flashkern.attention import (
    attention,
    attention_kvcache,
    attention_varlen,
    merge_attention,
)
from flashkern.beam import BeamTopK, Trie, beam_topk, merge_topk
from flashkern.explain import explain
from flashkern.lora import lora_linear, lora_linear_multi
from flashkern.sdpa import scaled_dot_product_attention

__all__ = [
    "BeamTopK",
    "Trie",
    "__version__",
    "attention",
    "attention_kvcache",
    "attention_varlen",
    "beam_topk",
    "cpu_isa",
    "explain",
    "lora_linear",
    "lora_linear_multi",
    "merge_attention",
    "merge_topk",
    "scaled_dot_product_attention",
]
