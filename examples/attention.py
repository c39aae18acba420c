"""Attention four ways: dense, packed without padding, from a paged cache, and merged from parts."""

import torch

import flashkern as fk

torch.manual_seed(0)
query, key, value = torch.randn(3, 2, 8, 100, 64).unbind()
dense = fk.attention(query, key, value, causal=True)
print("dense ", tuple(dense.shape))

starts = torch.tensor([0, 100, 200], dtype=torch.int32)
packed = [t.transpose(1, 2).flatten(0, 1) for t in (query, key, value)]
varlen = fk.attention_varlen(*packed, starts, starts, 100, 100, causal=True)
print("varlen", torch.allclose(varlen.unflatten(0, (2, 100)).transpose(1, 2), dense, atol=1e-5))

pages = [t.unflatten(2, (5, 20)).transpose(1, 2).flatten(0, 1) for t in (key, value)]
table = torch.arange(10, dtype=torch.int32).view(2, 5)
step = fk.attention_kvcache(
    query[:, :, -1:], *pages, cache_lengths=torch.tensor([100, 100]), page_table=table
)
print("paged ", torch.allclose(step, dense[:, :, -1:], atol=1e-5))

last = query[:, :, -1:]
parts = [
    fk.attention(last, key[:, :, cut], value[:, :, cut], return_lse=True)
    for cut in (slice(0, 30), slice(30, 100))
]
merged, _ = fk.merge_attention(*zip(*parts, strict=True))
print("merged", torch.allclose(merged, step, atol=1e-5))
print(fk.explain(fk.attention, query, key, value, causal=True))
