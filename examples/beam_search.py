"""Beam search: the operator alone, a vocabulary in shards, and transformers' generate().

The model is tiny and random, so the tokens mean nothing; what counts is that they are the same.
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import flashkern as fk
from flashkern.integrations.transformers import beam_search

torch.manual_seed(0)

# One step by hand: 4 beams of one prompt, a vocabulary of 32,000, the 8 best continuations.
logits = torch.randn(1, 4, 32000) * 3
beam_scores = torch.tensor([[-1.0, -1.2, -2.0, -3.5]])
best = fk.beam_topk(logits, beam_scores, 8)
print("beams:", best.parents[0].tolist(), "tokens:", best.tokens[0].tolist())
log_probs = logits.log_softmax(-1) + beam_scores.unsqueeze(-1)
assert torch.equal(best.tokens, log_probs.flatten(1).topk(8).indices % 32000)

# The same step on two shards of the vocabulary: two small exchanges, no logits.
shards = logits.split(16000, dim=-1)
own = [fk.beam_topk(shard, beam_scores, 1).logsumexp for shard in shards]
joint = torch.stack(own).logsumexp(0)
parts = [fk.beam_topk(shard, beam_scores, 8, logsumexp=joint) for shard in shards]
merged = fk.merge_topk(parts, offsets=[0, 16000], renormalize=False)
assert torch.equal(merged.tokens, best.tokens)

# A whole search, in place of transformers' own.
config = GPT2Config(
    vocab_size=200, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0
)
model = GPT2LMHeadModel(config).eval()
prompt = torch.randint(3, 200, (2, 10))
options = {"num_beams": 4, "max_new_tokens": 12, "do_sample": False, "length_penalty": 0.8}
ours = model.generate(prompt, custom_generate=beam_search, **options)
print("generated:", ours[0, 10:].tolist())
assert torch.equal(ours, model.generate(prompt, **options))
