"""transformers on flashkern: a model that asks for "fkern", and one that has to be patched.

The models are tiny and random, so the text means nothing; what counts is that it is the same.
"""

import logging

import torch
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

import flashkern.integrations.transformers as fkt

logging.basicConfig(format="%(name)s: %(message)s")
logging.getLogger("flashkern").setLevel(logging.INFO)

torch.manual_seed(0)
tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
prompts = torch.randint(3, 100, (2, 12))
padded = torch.ones_like(prompts)
padded[1, :5] = 0  # the second prompt is shorter
options = {"attention_mask": padded, "max_new_tokens": 12, "do_sample": False}

# Llama, Mistral, Gemma, GPT-2, T5, BERT, Whisper and most others: ask for the implementation.
config = LlamaConfig(
    vocab_size=100,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    **tokens,
)
llama = LlamaForCausalLM(config).eval()
expected = llama.generate(prompts, **options)
llama.set_attn_implementation(fkt.enable())
got = llama.generate(prompts, **options)
print("llama:", got[1, 12:].tolist())
assert torch.equal(got, expected)

# Beam search with the same tokens and scores as transformers' own.
expected = llama.generate(prompts, num_beams=4, **options)
got = llama.generate(prompts, num_beams=4, custom_generate=fkt.beam_search, **options)
print("llama, 4 beams:", got[1, 12:].tolist())
assert torch.equal(got, expected)

# BLOOM, MPT, GPT-J, Falcon and GPT-Neo compute attention by themselves: patch the model.
bloom = BloomForCausalLM(
    BloomConfig(vocab_size=100, hidden_size=64, n_layer=2, n_head=4, **tokens)
).eval()
expected = bloom.generate(prompts, **options)
fkt.patch(bloom)
got = bloom.generate(prompts, **options)
print("bloom:", got[1, 12:].tolist())
assert torch.equal(got, expected)
