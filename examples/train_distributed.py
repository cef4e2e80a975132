"""LoRS in several processes, by FSDP2 or DistributedDataParallel; needs torch and safetensors, and no GPU.

`torchrun --standalone --nproc-per-node 2 examples/train_distributed.py --output run` (or with `--strategy ddp`). A toy
network is pruned to 2:4 and trained to answer as before. With FSDP2 each process holds half of every tensor.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lors_cuda

WIDTH, BLOCKS, STEPS, BATCH = 128, 3, 60, 256


def prune(model: nn.Module) -> nn.Module:
    """Set the two smallest of every four weights to zero."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                groups = module.weight.view(-1, 4)
                groups.scatter_(1, groups.abs().topk(2, largest=False).indices, 0.0)
    return model


def main(output: Path, strategy: str) -> None:
    rank, processes = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # every process starts from the same model
    dense = nn.Sequential(
        *(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)) for _ in range(BLOCKS))
    )
    sparse = prune(copy.deepcopy(dense))
    masks = {name: module.weight != 0 for name, module in sparse.named_modules() if isinstance(module, nn.Linear)}

    # Convert first, then wrap. The stored values are frozen parameters and masks buffers, which both wrappers support.
    model = lors_cuda.get_lors_model(copy.deepcopy(sparse), lors_cuda.LoRSConfig(r=8, lora_alpha=16))
    total = sum(parameter.nbytes for parameter in model.parameters())
    if strategy == "fsdp":
        for block in model:
            fully_shard(block)
        fully_shard(model)
        held = sum(parameter.to_local().nbytes for parameter in model.parameters())
    else:
        model = DistributedDataParallel(model)
        held = total
    # After wrapping, because fully_shard replaces the parameters.
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    if rank == 0:
        print(f"{processes} processes; each holds {held} of {total} bytes of parameters")

    data = torch.Generator().manual_seed(rank)  # every process has batches of its own
    for step in range(STEPS + 1):
        inputs = torch.randn(BATCH // processes, WIDTH, generator=data)
        loss = nn.functional.mse_loss(model(inputs), dense(inputs).detach())
        loss.backward()  # averages the adapters' gradients over the processes, and nothing else
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            mean = loss.detach()
            dist.all_reduce(mean)
            if rank == 0:
                print(f"step {step:3d}  loss {mean.item() / processes:.6f}", flush=True)

    # A checkpoint to resume from: each process writes its part, without the frozen base.
    adapters = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))
    dcp.save({"adapters": adapters}, checkpoint_id=output / "checkpoint")
    # The adapter in PEFT's format: under fully_shard all processes call it, and process 0 writes.
    if strategy == "fsdp" or rank == 0:
        lors_cuda.save_adapter(model, output / "adapter")

    if rank == 0:  # merged in one process, from the file
        merged = lors_cuda.merge_and_unload(lors_cuda.load_adapter(sparse, output / "adapter"))
        kept = all(torch.equal(mask, merged.get_submodule(name).weight != 0) for name, mask in masks.items())
        print(f"zeros kept: {kept}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--strategy", choices=("fsdp", "ddp"), default="fsdp")
    arguments = parser.parse_args()
    if not dist.is_torchelastic_launched():
        parser.error("start it by torchrun; see the first lines of this file")
    dist.init_process_group("gloo")
    try:
        main(arguments.output, arguments.strategy)
    finally:
        dist.destroy_process_group()
