# SPDX-License-Identifier: Apache-2.0
"""Experts trained by two processes, DistributedDataParallel and fully_shard, as by one; and by the Trainer."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from expert_models import experts_model, loss_of, token_batch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lors_cuda import LoRSConfig, get_lors_model, load_adapter, save_adapter
from models import fill_adapters

pytest_plugins = ["pair"]

STEPS = 3


def converted(name: str, layout: str) -> nn.Module:
    """Adapters of rank 3, which two processes cannot divide evenly."""
    model = get_lors_model(experts_model(name), LoRSConfig(r=3, lora_alpha=6, layout=layout))
    fill_adapters(model)
    return model.train()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def train_alone(model: nn.Module) -> list[float]:
    """The mean loss of each step over the batches of both processes."""
    optimizer, losses = optimizer_of(model), []
    for step in range(STEPS):
        loss = (loss_of(model, token_batch(2 * step)) + loss_of(model, token_batch(2 * step + 1))) / 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def train_shared(model: nn.Module, rank: int) -> list[float]:
    optimizer, losses = optimizer_of(model), []
    for step in range(STEPS):
        ids = token_batch(2 * step + rank)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / 2)
    return losses


def adapters(model: nn.Module) -> dict[str, Tensor]:
    named = {key: p.detach() for key, p in model.named_parameters() if p.requires_grad}
    return {key: p.full_tensor() if hasattr(p, "full_tensor") else p for key, p in named.items()}


def train_two(rank: int, way: str, layout: str, directory: str) -> None:
    alone = converted("gpt_oss", layout)
    expected = train_alone(alone)
    model = converted("gpt_oss", layout)
    if way == "ddp":
        losses = train_shared(DistributedDataParallel(model), rank)
    else:
        for block in model.model.layers:
            fully_shard(block)
        fully_shard(model)
        losses = train_shared(model, rank)
    assert losses == pytest.approx(expected, rel=1e-5)
    values, wanted = adapters(model), adapters(alone)
    assert list(values) == list(wanted)
    for key, value in values.items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-4, atol=1e-6, msg=key)
    if way == "fsdp" or rank == 0:
        save_adapter(model, directory)
    dist.barrier()
    again = load_adapter(experts_model("gpt_oss"), directory)
    for key, value in adapters(again).items():
        assert torch.equal(value, values[key]), key


@pytest.mark.parametrize(("way", "layout"), [("ddp", "bitmap"), ("fsdp", "2:4"), ("fsdp", "bitmap")])
def test_two_processes_learn_what_one_does(pair, way, layout, tmp_path):
    pair.run(train_two, way, layout, str(tmp_path))


def idle_in_one(rank: int) -> None:
    """An expert that only one process has tokens for: the others wait for its gradient, so that there must be one."""
    experts = converted("mixtral", "2:4").model.layers[0].mlp.experts
    parallel = DistributedDataParallel(experts)
    states = torch.ones(4, 32)
    index = torch.full((4, 1), 1 + rank)
    parallel(states, index, torch.ones(4, 1)).sum().backward()
    grads = experts.down_proj.lora_B.grad
    assert grads[[0, 3]].count_nonzero() == 0
    assert grads[1].count_nonzero() > 0
    assert grads[2].count_nonzero() > 0


def test_an_expert_without_tokens_in_one_process_gets_the_others_gradient(pair):
    pair.run(idle_in_one)


def test_the_trainer_checks_masks_and_resumes(tmp_path):
    transformers = pytest.importorskip("transformers")
    from lors_cuda.hf import LoRSTrainerMixin, SparsityCallback

    class AdapterTrainer(LoRSTrainerMixin, transformers.Trainer):
        pass

    data = [{"input_ids": ids, "labels": ids} for ids in token_batch(0, batch=4)]

    def trainer(steps: int) -> AdapterTrainer:
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=steps, save_steps=2, logging_steps=1, report_to=[], use_cpu=True,
            per_device_train_batch_size=2, disable_tqdm=True, learning_rate=1e-2,
        )  # fmt: skip
        model = converted("mixtral", "bitmap")
        return AdapterTrainer(model, arguments, train_dataset=data, callbacks=[SparsityCallback(1)])

    whole = trainer(4)
    whole.train()
    assert whole.state.log_history[0]["sparsity"] == pytest.approx(0.5)
    resumed = trainer(4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for key, value in adapters(resumed.model).items():
        torch.testing.assert_close(value, adapters(whole.model)[key], rtol=1e-5, atol=1e-7)
