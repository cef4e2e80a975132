# SPDX-License-Identifier: Apache-2.0
"""accelerate on a converted model: prepare, accumulate, bfloat16, checkpoints; and models placed by device_map."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

from accelerate_state import own_accelerate  # noqa: F401  (a fixture)
from lors_cuda import LoRSConfig, get_lors_model, merge_and_unload, named_lors_layers
from models import assert_unchanged, batch, fill_adapters, logits, refused, snapshot, tiny_llama, tiny_net, tokens

accelerate = pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from accelerate.hooks import AlignDevicesHook, add_hook_to_module  # noqa: E402

from lors_cuda.hf import save_adapters_only  # noqa: E402

BLOCKS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")


class Run:
    """A converted model prepared for training; the same at every start."""

    def __init__(self, *, adapters_only: bool = False, seed: int = 0, models: list[nn.Module] | None = None) -> None:
        self.accelerator = accelerate.Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2, cpu=True)
        model = get_lors_model(tiny_llama(seed), LoRSConfig(r=4, lora_alpha=8))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        loader = torch.utils.data.DataLoader(list(tokens(1, batch=16)), batch_size=2)
        self.model, self.optimizer, self.scheduler, self.loader = self.accelerator.prepare(
            model, optimizer, scheduler, loader
        )
        for other in models or []:
            self.accelerator.prepare(other)
        if adapters_only:
            save_adapters_only(self.accelerator)

    def epoch(self) -> list[float]:
        losses = []
        for ids in self.loader:
            with self.accelerator.accumulate(self.model):
                loss = self.model(input_ids=ids, labels=ids).loss
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses


@pytest.mark.parametrize("adapters_only", [False, True])
def test_save_state_and_load_state_continue_the_same_curve(tmp_path, adapters_only):
    first = Run(adapters_only=adapters_only)
    start = {name: p.detach().clone() for name, p in first.model.named_parameters()}
    first.epoch()
    first.accelerator.save_state(str(tmp_path))
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    whole, adapter = {"model.safetensors"}, {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    assert files & (whole | adapter) == (adapter if adapters_only else whole)
    rest = first.epoch()
    again = Run(adapters_only=adapters_only)
    again.accelerator.load_state(str(tmp_path))
    assert again.epoch() == rest
    for name, parameter in again.model.named_parameters():
        assert torch.equal(parameter, first.model.get_parameter(name)), name
        assert torch.equal(parameter, start[name]) != parameter.requires_grad, name


def test_only_every_second_backward_is_a_step():
    run = Run()
    seen = []
    for ids in run.loader:
        with run.accelerator.accumulate(run.model):
            run.accelerator.backward(run.model(input_ids=ids, labels=ids).loss)
            run.optimizer.step()
            run.optimizer.zero_grad()
        seen.append(next(named_lors_layers(run.model))[1].lora_B.detach().clone())
    moved = [not torch.equal(before, after) for before, after in itertools.pairwise(seen)]
    assert moved == [True, False, True, False, True, False, True]


def test_the_unwrapped_model_merges():
    run = Run()
    run.epoch()
    model = run.accelerator.unwrap_model(run.model, keep_fp32_wrapper=False)
    masks = {name: layer.sparse_weight.mask() for name, layer in named_lors_layers(model)}
    adapted = logits(model.eval())
    merged = merge_and_unload(model)
    tolerance = 4 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(logits(merged), adapted, rtol=tolerance, atol=tolerance)
    for name, mask in masks.items():
        assert not merged.get_submodule(name).weight[~mask].any(), name


def test_another_model_beside_it_is_saved_as_ever(tmp_path):
    first = Run(adapters_only=True, models=[tiny_net(1)])
    first.accelerator.save_state(str(tmp_path))
    assert (tmp_path / "model.safetensors").is_file()
    other = tiny_net(2)
    again = Run(adapters_only=True, models=[other])
    again.accelerator.load_state(str(tmp_path))
    assert torch.equal(other[0].weight, tiny_net(1)[0].weight)


def test_refusals(tmp_path: Path):
    run = Run(adapters_only=True)
    run.accelerator.save_state(str(tmp_path))
    other = Run(adapters_only=True, seed=1)
    before = snapshot(other.model)
    refused(ValueError, lambda: other.accelerator.load_state(str(tmp_path)), "another sparsity mask")
    assert_unchanged(other.model, before)
    second = get_lors_model(tiny_net(), LoRSConfig(r=2))
    two = Run(adapters_only=True, models=[second])
    refused(ValueError, lambda: two.accelerator.save_state(str(tmp_path / "two")), "2 of the 2 prepared models")

    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny_net(), peft.LoraConfig(target_modules=["0"]))
    save = accelerate.Accelerator(cpu=True)
    save_adapters_only(save)
    save.prepare(adapted)
    refused(ValueError, lambda: save.save_state(str(tmp_path / "peft")), "is a PEFT model", "model.save_pretrained")

    class Sharded:
        distributed_type = accelerate.DistributedType.FSDP

    refused(ValueError, lambda: save_adapters_only(Sharded()), "uses FSDP", "gathered model")


# ---- device_map ----


def placed() -> nn.Module:
    """A model with the hooks that accelerate puts on every module where a model is spread over several devices."""
    return accelerate.dispatch_model(tiny_llama(), dict.fromkeys(BLOCKS, "cpu"), main_device="cpu", force_hooks=True)


def test_a_placed_model_is_converted_and_merged_with_its_hooks():
    model = placed()
    before = logits(model)
    hooked = {name for name, module in model.named_modules() if hasattr(module, "_hf_hook")}
    assert "model.layers.0.self_attn.q_proj" in hooked, "accelerate has hooks elsewhere now; this test checks nothing"
    get_lors_model(model, LoRSConfig(r=4))
    tolerance = 4 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(logits(model), before, rtol=tolerance, atol=tolerance)
    for name, layer in named_lors_layers(model):
        assert torch.device(layer._hf_hook.execution_device).type == "cpu", name
        assert all(isinstance(parameter, nn.Parameter) for parameter in layer.parameters())
        assert {key for key, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    fill_adapters(model)
    adapted = logits(model)
    assert (adapted - before).abs().max() > 0.01
    model(**batch()).loss.backward()
    assert all(layer.lora_A.grad.any() for _, layer in named_lors_layers(model))
    merge_and_unload(model)
    assert {name for name, module in model.named_modules() if hasattr(module, "_hf_hook")} == hooked
    torch.testing.assert_close(logits(model), adapted, rtol=tolerance, atol=tolerance)


def test_the_hook_moves_the_inputs_of_the_converted_layer():
    # No second device is here: a hook that sends to "meta" shows that it is called, and a forward without it would not.
    net = tiny_net()
    add_hook_to_module(net[2], AlignDevicesHook(execution_device="cpu", io_same_device=True))
    get_lors_model(net, LoRSConfig(r=2))
    assert net[2]._hf_hook.io_same_device
    net[2]._hf_hook.execution_device = torch.device("meta")
    refused(ValueError, lambda: net(torch.randn(3, 8)), "input is on meta and weight on cpu")


def test_device_map_of_from_pretrained(tmp_path):
    transformers = pytest.importorskip("transformers")
    tiny_llama().save_pretrained(tmp_path / "model")
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = get_lors_model(load(tmp_path / "model", device_map="auto"), LoRSConfig(r=4))
    tolerance = 4 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(logits(model), logits(tiny_llama()), rtol=tolerance, atol=tolerance)
    offloaded = load(
        tmp_path / "model",
        device_map={**dict.fromkeys(BLOCKS, "cpu"), "model.layers.1": "disk"},
        offload_folder=str(tmp_path / "offloaded"),
    )
    refused(
        ValueError,
        lambda: get_lors_model(offloaded, LoRSConfig(r=4)),
        "'model.layers.1.self_attn.q_proj' cannot be adapted",
        "offloaded by accelerate (device_map)",
    )
    assert not list(named_lors_layers(offloaded))


def test_a_forward_of_the_users_own_is_still_refused():
    replaced, replaced_below_the_hook, hooked = tiny_net(), tiny_net(), tiny_net()
    forward = replaced[2].forward
    replaced[2].forward = lambda input: 2 * forward(input)
    add_hook_to_module(replaced[2], AlignDevicesHook(execution_device="cpu"))
    add_hook_to_module(replaced_below_the_hook[2], AlignDevicesHook(execution_device="cpu"))
    forward_with_hook = replaced_below_the_hook[2].forward
    replaced_below_the_hook[2].forward = lambda input: 2 * forward_with_hook(input)
    add_hook_to_module(hooked[2], accelerate.hooks.ModelHook())
    for net in (replaced, replaced_below_the_hook, hooked):
        config = LoRSConfig(r=2, target_modules=["0", "2"])
        refused(ValueError, lambda net=net, config=config: get_lors_model(net, config), "'2'", "forward of its own")
        with pytest.warns(UserWarning, match="'2': is a Linear with a forward of its own"):
            get_lors_model(net, LoRSConfig(r=2))
        assert [name for name, _ in named_lors_layers(net)] == ["0"]
