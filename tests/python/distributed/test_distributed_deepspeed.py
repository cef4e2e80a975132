# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's ZeRO-2 and ZeRO-3, where DeepSpeed is installed; see docs/howto/distributed.md for how."""

from __future__ import annotations

import importlib.util
import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed_cases import STEPS, adam, batch_of, converted, every_layout, mean_of_both, train_alone

from adapter_directories import assert_same_files
from lors_cuda import init_from_gradients, merge_and_unload, merge_cache, save_adapter
from models import refused

pytest_plugins = ["pair"]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed: it is no development dependency, because it writes to stderr when imported",
)


def train_two(rank: int, layout: str, stage: int, directory: str) -> None:
    with mock.patch.dict(os.environ, {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": "2"}):
        train_by_deepspeed(rank, layout, stage, directory)


def train_by_deepspeed(rank: int, layout: str, stage: int, directory: str) -> None:
    import deepspeed

    expected = train_alone(alone := converted(layout))
    if rank == 0:
        save_adapter(alone, f"{directory}/alone")
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "stage3_model_persistence_threshold": 0}
    model = converted(layout)
    whole = {name: p.numel() for name, p in model.named_parameters()}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=adam(model),
        config={"train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False, "zero_optimization": zero},
    )  # fmt: skip
    losses = []
    for step in range(STEPS):
        loss = engine(**batch_of(step, rank)).loss
        engine.backward(loss)
        engine.step()
        losses.append(mean_of_both(loss.detach()).item())
    assert losses == pytest.approx(expected, rel=1e-5)
    assert layout in repr(model)

    parameters = list(model.parameters())
    if stage == 3:
        for name, p in model.named_parameters():  # also the integer ones
            assert p.numel() == 0, name
            assert p.ds_tensor.numel() == -(-whole[name] // 2), name
        for call in (lambda: save_adapter(engine, directory), lambda: merge_and_unload(model),
                     lambda: init_from_gradients(model, {})):  # fmt: skip
            refused(ValueError, call, "partitioned by DeepSpeed's ZeRO-3", "GatheredParameters")
        refused(ValueError, merge_cache(model).__enter__, "sharded by fully_shard or DeepSpeed's ZeRO-3")
    with deepspeed.zero.GatheredParameters(parameters, enabled=stage == 3):
        if rank == 0:
            save_adapter(engine, f"{directory}/engine")
            save_adapter(model, f"{directory}/model")
    dist.barrier()


@every_layout
@pytest.mark.parametrize("stage", [2, 3])
def test_training_is_that_of_one_process(pair, tmp_path, layout, stage):
    pair.run(train_two, layout, stage, str(tmp_path))
    assert_same_files(tmp_path / "engine", tmp_path / "model")
    from safetensors.torch import load_file

    ours, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("model", "alone"))
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        assert (value - expected[name]).abs().max() < 1e-4, name
        assert torch.isfinite(value).all(), name
