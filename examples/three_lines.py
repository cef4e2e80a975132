"""LoRS in a training loop of your own: the three lines that change.

`python examples/three_lines.py` needs torch alone. A toy network is pruned to 2:4 and trained to answer as before.
"""

from __future__ import annotations

import torch
from torch import nn

import lors_cuda

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 64))
inputs = torch.randn(512, 64)
targets = model(inputs).detach()
with torch.no_grad():
    for linear in model:
        if isinstance(linear, nn.Linear):
            groups = linear.weight.view(-1, 4)
            groups.scatter_(1, groups.abs().topk(2, largest=False).indices, 0.0)
masks = [module.weight != 0 for module in model if isinstance(module, nn.Linear)]

config = lors_cuda.LoRSConfig(r=8, lora_alpha=16)  # 1
model = lors_cuda.get_lors_model(model, config)  # 2: only the adapters require gradients from here on
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)

for step in range(61):
    loss = nn.functional.mse_loss(model(inputs), targets)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0:
        print(f"step {step:3d}  loss {loss.item():.6f}")

adapted = model(inputs).detach()
model = lors_cuda.merge_and_unload(model)  # 3: plain nn.Linear again, every zero where it was
zeros_kept = all(
    torch.equal(mask, module.weight != 0)
    for mask, module in zip(masks, (m for m in model if isinstance(m, nn.Linear)), strict=True)
)
difference = (model(inputs) - adapted).abs().max().item()
print(f"zeros kept: {zeros_kept}; the merged model's output differs by at most {difference:.1e}")
