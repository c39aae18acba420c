"""One switch: torch.nn.functional.scaled_dot_product_attention runs flashkern on the CPU.

A module of torch itself, trained for one step with and without the switch.
"""

import logging

import torch

import flashkern.integrations.torch_sdpa as fks

logging.basicConfig(format="%(name)s: %(message)s")
logging.getLogger("flashkern").setLevel(logging.INFO)

torch.manual_seed(0)
layer = torch.nn.MultiheadAttention(embed_dim=128, num_heads=4, batch_first=True)
x = torch.randn(2, 200, 128)
causal = torch.nn.Transformer.generate_square_subsequent_mask(200)


def step() -> tuple[torch.Tensor, torch.Tensor]:
    """Output and weight gradient of one forward and backward pass."""
    layer.zero_grad()
    output, _ = layer(x, x, x, attn_mask=causal, is_causal=True, need_weights=False)
    output.square().mean().backward()
    assert layer.in_proj_weight.grad is not None
    return output.detach(), layer.in_proj_weight.grad.clone()


theirs = step()
fks.enable()
ours = step()
fks.disable()

for name, a, b in zip(("output", "gradient"), ours, theirs, strict=True):
    print(f"{name}: greatest difference {(a - b).abs().max():.1e} of {b.abs().max():.1e}")
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
