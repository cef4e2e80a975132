"""LoRS in a loop of your own under accelerate: bfloat16, accumulation, checkpoints of the adapter's size that resume.

`python examples/train_with_accelerate.py` runs by itself; `accelerate launch` starts it on several GPUs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from small_model import pruned_llama
from torch.utils.data import DataLoader

import lors_cuda
from lors_cuda.hf import save_adapters_only


def sequences(count: int = 64, length: int = 32) -> list[torch.Tensor]:
    """Sequences that count up by one, a task that can be learnt."""
    starts = torch.randint(64, (count,), generator=torch.Generator().manual_seed(0))
    return [(start + torch.arange(length)) % 64 for start in starts]


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("accelerate-output"), metavar="DIR")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--resume", action="store_true", help="from the checkpoint after half of the epochs")
    args = parser.parse_args(argv)

    accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2, cpu=not torch.cuda.is_available())
    model = lors_cuda.get_lors_model(pruned_llama(64), lors_cuda.LoRSConfig(r=8, lora_alpha=16))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(sequences(), batch_size=8))
    save_adapters_only(accelerator)  # without it, save_state writes the whole model each time

    half, losses = args.epochs // 2, []
    if args.resume:
        accelerator.load_state(args.output / "half")
    for epoch in range(half if args.resume else 0, args.epochs):
        for ids in loader:
            with accelerator.accumulate(model):
                loss = model(input_ids=ids, labels=ids).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        accelerator.print(f"epoch {epoch + 1}  loss {losses[-1]:.4f}")
        if epoch + 1 == half:
            accelerator.save_state(args.output / "half")

    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    if accelerator.is_main_process:
        lors_cuda.save_adapter(model, args.output / "adapter")
        lors_cuda.merge_and_unload(model).save_pretrained(args.output / "merged")
    accelerator.end_training()
    return losses


if __name__ == "__main__":
    main()
