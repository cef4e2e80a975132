# SPDX-License-Identifier: Apache-2.0
"""Writes the adapters in model/adapters_0.1.0, with the lors_cuda that is installed: see the README.md there."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn


def numbers(*shape: int, step: int) -> Tensor:
    """Small exact numbers that no generator makes, so that they are the same under every torch."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * step) % 23 - 11).view(shape) / 16


def base() -> nn.Sequential:
    """Linears "0" and "2" with zeros in two of four, and a dense "4"."""
    net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8, bias=False), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        for index, parameter in enumerate(net.parameters()):
            parameter.copy_(numbers(*parameter.shape, step=5 + 2 * index))
        for name in (0, 2):
            net[name].weight *= torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat(net[name].in_features // 4)
    return net.eval()


def inputs() -> Tensor:
    return numbers(3, 8, step=17)


def fill(model: nn.Module) -> None:
    """Give the adapters, and what else is trained, other values than they start with."""
    with torch.no_grad():
        for index, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.copy_(numbers(*parameter.shape, step=3 + 2 * index))


def write(directory: Path) -> None:
    from safetensors.torch import save_file

    import lors_cuda
    import lors_cuda.peft
    import peft

    options = {"r": 2, "lora_alpha": 4, "target_modules": ["0", "2"], "modules_to_save": ["4"]}
    ours = lors_cuda.get_lors_model(base(), lors_cuda.LoRSConfig(**options))
    fill(ours)
    lors_cuda.save_adapter(ours, directory / "save_adapter")
    theirs = peft.get_peft_model(base(), lors_cuda.peft.LoRSLoraConfig(**options))
    fill(theirs)
    theirs.eval().save_pretrained(directory / "save_pretrained")
    with torch.no_grad():
        outputs = {"save_adapter": ours(inputs()), "save_pretrained": theirs(inputs())}
    save_file({name: output.contiguous() for name, output in outputs.items()}, directory / "outputs.safetensors")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
