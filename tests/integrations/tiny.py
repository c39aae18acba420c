"""Tiny random models of many architectures, one function to build each in any implementation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

VOCAB = 97
TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **TOKENS,
}
BERT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 1,
    **TOKENS,
}


@dataclasses.dataclass(frozen=True)
class Tiny:
    """One architecture: how to make it, and what can be asked of it."""

    model: Any
    config: Callable[[], Any]
    kind: str  # "decoder", "encoder", "seq2seq", "speech" or "vision"
    patched: bool = False  # computes attention by itself: goes through patch()
    static: bool = True  # generates with a static cache
    oracle: str = "eager"  # the implementation to compare with

    def build(self, implementation: str) -> Any:
        torch.manual_seed(0)
        config = self.config()
        config._attn_implementation = implementation
        model = self.model(config)
        with torch.no_grad():  # else attention hardly matters
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(4)
        return model


def _deepseek() -> Any:
    return hf.DeepseekV3Config(
        **{**LLAMA, "num_key_value_heads": 4},
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=12,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
    )


def _gemma(cls: Any, **extra: Any) -> Any:
    return cls(**LLAMA, head_dim=16, query_pre_attn_scalar=16, sliding_window=5, **extra)


MODELS: dict[str, Tiny] = {
    "bert": Tiny(hf.BertModel, lambda: hf.BertConfig(**BERT), "encoder"),
    "modernbert": Tiny(
        hf.ModernBertModel,
        lambda: hf.ModernBertConfig(
            **BERT,
            local_attention=8,
            global_attn_every_n_layers=2,
            **TOKENS,
            cls_token_id=1,
            sep_token_id=2,
        ),
        "encoder",
    ),
    "gpt2": Tiny(
        hf.GPT2LMHeadModel,
        lambda: hf.GPT2Config(
            vocab_size=VOCAB,
            n_positions=64,
            n_embd=32,
            n_layer=2,
            n_head=4,
            scale_attn_by_inverse_layer_idx=True,
            **TOKENS,
        ),
        "decoder",
    ),
    "llama": Tiny(hf.LlamaForCausalLM, lambda: hf.LlamaConfig(**LLAMA), "decoder"),
    "mistral": Tiny(
        hf.MistralForCausalLM, lambda: hf.MistralConfig(**LLAMA, sliding_window=5), "decoder"
    ),
    "qwen3": Tiny(hf.Qwen3ForCausalLM, lambda: hf.Qwen3Config(**LLAMA, head_dim=16), "decoder"),
    "gemma2": Tiny(hf.Gemma2ForCausalLM, lambda: _gemma(hf.Gemma2Config), "decoder"),
    "gemma3": Tiny(
        hf.Gemma3ForCausalLM,
        lambda: _gemma(hf.Gemma3TextConfig, layer_types=["sliding_attention", "full_attention"]),
        "decoder",
    ),
    "gpt_oss": Tiny(
        hf.GptOssForCausalLM,
        lambda: hf.GptOssConfig(
            **LLAMA,
            head_dim=8,
            sliding_window=5,
            num_local_experts=2,
            num_experts_per_tok=1,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        "decoder",
    ),
    "deepseek_v3": Tiny(hf.DeepseekV3ForCausalLM, _deepseek, "decoder"),
    "opt": Tiny(
        hf.OPTForCausalLM,
        lambda: hf.OPTConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
            **TOKENS,
        ),
        "decoder",
    ),
    "gpt_neox": Tiny(
        hf.GPTNeoXForCausalLM,
        lambda: hf.GPTNeoXConfig(**{k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}),
        "decoder",
    ),
    "t5": Tiny(
        hf.T5ForConditionalGeneration,
        lambda: hf.T5Config(
            vocab_size=VOCAB,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=2,
        ),
        "seq2seq",
    ),
    "bart": Tiny(
        hf.BartForConditionalGeneration,
        lambda: hf.BartConfig(**SEQ2SEQ, forced_eos_token_id=None),
        "seq2seq",
    ),
    "marian": Tiny(
        hf.MarianMTModel,
        lambda: hf.MarianConfig(**SEQ2SEQ, forced_eos_token_id=None),
        "seq2seq",
    ),
    "whisper": Tiny(
        hf.WhisperForConditionalGeneration,
        lambda: hf.WhisperConfig(
            **{k: v for k, v in SEQ2SEQ.items() if k != "max_position_embeddings"},
            num_mel_bins=8,
            max_source_positions=20,
            max_target_positions=32,
        ),
        "speech",
    ),
    "vit": Tiny(
        hf.ViTModel,
        lambda: hf.ViTConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=4,
        ),
        "vision",
    ),
    "bloom": Tiny(
        hf.BloomForCausalLM,
        lambda: hf.BloomConfig(
            vocab_size=VOCAB,
            hidden_size=48,
            n_layer=2,
            n_head=6,
            attention_dropout=0.1,
            **TOKENS,
        ),
        "decoder",
        patched=True,
    ),
    "mpt": Tiny(
        hf.MptForCausalLM,
        lambda: hf.MptConfig(
            vocab_size=VOCAB, d_model=48, n_layers=2, n_heads=6, max_seq_len=64, **TOKENS
        ),
        "decoder",
        patched=True,
        static=False,
    ),
    "gptj": Tiny(
        hf.GPTJForCausalLM,
        lambda: hf.GPTJConfig(
            vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, **TOKENS
        ),
        "decoder",
        patched=True,
    ),
    "falcon": Tiny(
        hf.FalconForCausalLM,
        lambda: hf.FalconConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            **TOKENS,
        ),
        "decoder",
        patched=True,
    ),
    "falcon_alibi": Tiny(
        hf.FalconForCausalLM,
        lambda: hf.FalconConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            alibi=True,
            multi_query=False,
            **TOKENS,
        ),
        "decoder",
        patched=True,
        static=False,
        oracle="sdpa",  # in 5.23 the eager path adds ALiBi twice, to the scores and to the mask
    ),
    "gpt_neo": Tiny(
        hf.GPTNeoForCausalLM,
        lambda: hf.GPTNeoConfig(
            vocab_size=VOCAB,
            max_position_embeddings=64,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=5,
            **TOKENS,
        ),
        "decoder",
        patched=True,
        static=False,  # transformers' own local layers take no static cache
    ),
}


def inputs(kind: str, padding: str = "none") -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Model inputs of three rows, and which output positions are real: bool (rows, length)."""
    generator = torch.Generator(torch.empty(0).device).manual_seed(1)
    rows, length = 3, 13

    def tokens(size: int) -> torch.Tensor:
        return torch.randint(3, VOCAB, (rows, size), generator=generator)

    if kind == "vision":
        return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=generator)}, torch.ones(1, 1)
    if kind == "speech":
        features = torch.randn(rows, 8, 40, generator=generator)
        given = {"input_features": features, "decoder_input_ids": tokens(7)}
        return given, torch.ones(rows, 7)
    given = {"input_ids": tokens(length)}
    mask = torch.ones(rows, length, dtype=torch.int64)
    if padding == "left":
        mask[1, :4], mask[2, :9] = 0, 0
    if padding == "right":
        mask[1, -4:], mask[2, -9:] = 0, 0
    if padding == "holes":
        mask[1, 3:6] = 0
    if padding != "none":
        given["attention_mask"] = mask
    if kind == "seq2seq":
        given["decoder_input_ids"] = tokens(7)
        return given, torch.ones(rows, 7)
    return given, mask
