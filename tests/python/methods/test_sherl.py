# SPDX-License-Identifier: Apache-2.0
"""SHERL: starts as the sparse model, keeps nothing of the early blocks, and is saved like a module to save."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from method_runs import train
from torch.utils.checkpoint import checkpoint

from lors_cuda import LoRSConfig, SparseLinear, get_lors_model, load_adapter, named_lors_layers, save_adapter
from lors_cuda.methods import SHERL, reference
from lors_cuda.methods.sherl import SideNetwork, mix
from models import batch, logits, refused, tiny_llama, tiny_net, tokens


def made(layers=3, dtype=torch.float32, r=4, **fields):
    method = SHERL(**fields)
    model = tiny_llama(dtype=dtype, layers=layers)
    config = method.configure(LoRSConfig(r=r, lora_alpha=8), model)
    return get_lors_model(model, config), method


def test_redundancy_weights_are_the_definition():
    drawn = torch.Generator().manual_seed(0)
    states = torch.randn(5, 4, 6, generator=drawn, dtype=torch.float64)
    fc = torch.nn.Linear(6, 1, dtype=torch.float64)
    found = mix(states[:, :-1], states[:, -1], fc)
    for token, row in zip(states, found, strict=True):
        wanted = reference.sherl_mixed(list(token), fc.weight[0].detach(), fc.bias[0].detach())
        torch.testing.assert_close(row, wanted, rtol=1e-10, atol=1e-12)
    assert bool((found > 0).any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_identity_gate_starts_as_the_sparse_model_and_the_paper_s_does_not(dtype):
    plain = logits(tiny_llama(dtype=dtype, layers=3))
    assert torch.equal(logits(made(dtype=dtype)[0]), plain)
    assert not torch.equal(logits(made(dtype=dtype, gate="paper")[0]), plain)


@pytest.mark.parametrize("late", [1, 2])
def test_only_late_blocks_and_the_side_network_are_trained(late):
    model, method = made(late=late)
    adapted = {name.split(".")[2] for name, _ in named_lors_layers(model)}
    assert adapted == {str(number) for number in range(3 - late, 3)}
    early = [m for number in range(3 - late) for m in model.model.layers[number].modules()]
    assert sum(isinstance(m, SparseLinear) for m in early) == 7 * (3 - late)
    run = method.start(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, run, 4)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in moved} == {"side_network", "model"}
    assert len(model.side_network.down) == 3 - late + 1


def saved_bytes(model):
    sizes = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch(0))
    return sum(sizes.values())


def test_early_blocks_keep_nothing_for_backward():
    model, _ = made(layers=6)
    reached = []
    for number, block in enumerate(model.model.layers):
        block.register_full_backward_hook(lambda *_, number=number: reached.append(number))
    model(**batch(0)).loss.backward()
    assert reached == [5]
    lors = get_lors_model(tiny_llama(layers=6), LoRSConfig(r=4))
    assert saved_bytes(model) < 0.5 * saved_bytes(lors)


def test_embeddings_that_give_gradients_do_not_reach_the_early_blocks():
    model, _ = made()
    model.enable_input_require_grads()
    reached = []
    model.model.layers[0].register_full_backward_hook(lambda *_: reached.append(0))
    model(**batch(0)).loss.backward()
    assert not reached
    assert model.side_network.up.weight.grad.any()


def test_generation_with_a_cache_is_that_without():
    model, method = made()
    train(model, method.start(model), 6)
    prompt = tokens(1)[:, :5]
    model.eval()
    calls = [
        model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False,
                       use_cache=cached, pad_token_id=0)
        for cached in (True, False)
    ]  # fmt: skip
    assert torch.equal(*calls)


def test_what_is_saved_needs_the_side_network(tmp_path):
    model, method = made()
    run = method.start(model)
    train(model, run, 4)
    run.finish()
    save_adapter(model, tmp_path)
    plain = tiny_llama(layers=3)
    refused(ValueError, lambda: load_adapter(plain, tmp_path), "names 'side_network'", "SHERL(...).attach(model)")
    method.attach(plain)
    assert torch.equal(logits(load_adapter(plain, tmp_path)), logits(model))
    other = tiny_llama(layers=3)
    SHERL(reduction=4).attach(other)
    refused(ValueError, lambda: load_adapter(other, tmp_path), "side_network.down.0.0.weight", "shape")


def test_a_copy_has_a_side_network_of_its_own():
    model, _ = made()
    before = logits(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.side_network.up.bias.fill_(1.0)
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(twin), before)


def test_activation_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model, _ = made()
        with torch.no_grad():
            model.side_network.up.weight.normal_(generator=torch.Generator().manual_seed(1))
        if checkpointing:
            for block in model.model.layers:
                block.gradient_checkpointing = True
                block._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
        model.train()
        model(**batch(0)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    # Where a block's hooks run again in backward, the states may be of another forward.
    stranger = torch.zeros(2, 16, 32)
    refused(ValueError, lambda: model.model.layers[-1](stranger), "another state", "before the next forward")


def test_other_exclusions_stay():
    for excluded in (["down_proj"], r".*down_proj"):
        model = tiny_llama(layers=3)
        config = SHERL().configure(LoRSConfig(r=4, exclude_modules=excluded, modules_to_save=["norm"]), model)
        assert config.modules_to_save == ["norm", "side_network"]
        names = [name for name, _ in named_lors_layers(get_lors_model(model, config))]
        assert len(names) == 6
        assert all(name.startswith("model.layers.2.") and "down_proj" not in name for name in names)


def test_the_side_network_does_not_touch_the_global_generator():
    torch.manual_seed(5)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    one, two = SideNetwork(16, 4, 3, "paper"), SideNetwork(16, 4, 3, "paper")
    assert torch.equal(torch.rand(3), drawn)
    assert torch.equal(one.up.weight, two.up.weight)


def test_refusals():
    model = tiny_llama(layers=2)
    before = dict(model.named_modules())
    refused(ValueError, lambda: SHERL(late=2).attach(model), "late is 2", "2 blocks")
    refused(ValueError, lambda: SHERL(reduction=64).attach(model), "reduction is 64", "hidden size 32")
    refused(ValueError, lambda: SHERL().attach(tiny_net()), "no decoder of transformers")
    refused(ValueError, lambda: SHERL().configure(LoRSConfig()), "configure(config, model)")
    assert dict(model.named_modules()) == before
    SHERL().attach(model)
    refused(ValueError, lambda: SHERL().attach(model), "side_network' already")
    refused(ValueError, lambda: SHERL(late=0), "at least 1")
    refused(ValueError, lambda: SHERL(gate="open"), "gate")
