"""Fine-tunes an adapter by the operator alone: the weight stays frozen, dropout is never stored."""

import torch

import flashkern as fk

torch.manual_seed(0)
weight, target = torch.randn(64, 128) / 11, torch.randn(64, 128) / 11
lora_a = (torch.randn(8, 128) / 11).requires_grad_()
lora_b = torch.zeros(64, 8, requires_grad=True)
optimizer = torch.optim.AdamW([lora_a, lora_b], lr=1e-2)

for step in range(60):
    x = torch.randn(256, 128)
    y = fk.lora_linear(x, weight, lora_a, lora_b, scaling=2.0, dropout_p=0.05)
    loss = torch.nn.functional.mse_loss(y, x @ target.T)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        print(f"step {step:2d}  loss {loss.item():.4f}")
print(f"final    loss {loss.item():.4f}")
