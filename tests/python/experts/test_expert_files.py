# SPDX-License-Identifier: Apache-2.0
"""Adapter directories of models with experts: PEFT's names and shapes, read back and read from PEFT."""

from __future__ import annotations

import json

import pytest
import torch
from expert_models import EXPERT_MODELS, experts_model, loss_of, token_batch
from safetensors.torch import load_file, save_file
from torch import nn

from adapter_directories import FILES, assert_same_files, edit_config
from lors_cuda import (
    LoRSConfig,
    get_lors_model,
    load_adapter,
    merge_and_unload,
    named_lors_layers,
    save_adapter,
)
from lors_cuda.experts import expert_stacks, stack_of
from models import assert_unchanged, fill_adapters, refused, snapshot

FIRST = "model.layers.0.mlp.experts"
IN_FILE = f"base_model.model.{FIRST}"
CONFIG = {"r": 3, "lora_alpha": 6}


def trained(name: str, **fields) -> nn.Module:
    model = get_lors_model(experts_model(name), LoRSConfig(**{**CONFIG, **fields}))
    fill_adapters(model, size=0.2)
    return model


@pytest.mark.parametrize("name", EXPERT_MODELS)
def test_saved_and_loaded_into_the_sparse_and_the_converted_model(name, tmp_path):
    model = trained(name, rank_pattern={r"experts\.down_proj": 2})
    save_adapter(model, tmp_path / "one")

    again = load_adapter(experts_model(name), tmp_path / "one")
    other = load_adapter(trained(name, rank_pattern={r"experts\.down_proj": 2}), tmp_path / "one")

    expected = {key: value for key, value in model.state_dict().items() if "lora_" in key}
    for loaded in (again, other):
        state = loaded.state_dict()
        assert all(torch.equal(state[key], value) for key, value in expected.items())
    torch.testing.assert_close(loss_of(again, token_batch()), loss_of(model, token_batch()), rtol=0, atol=0)
    save_adapter(again, tmp_path / "two")
    assert_same_files(tmp_path / "one", tmp_path / "two")


def test_the_configuration_names_the_parameters_and_their_masks(tmp_path):
    save_adapter(trained("mixtral", target_modules=["q_proj"], target_parameters=["experts.down_proj"]), tmp_path)
    fields = json.loads((tmp_path / FILES[0]).read_text())
    stacks = [f"model.layers.{i}.mlp.experts.down_proj" for i in (0, 1)]
    assert fields["target_parameters"] == stacks
    assert sorted(fields["target_modules"]) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert set(stacks) < set(fields["lors"]["mask_fingerprints"])


# ---- PEFT ----


def by_peft(name: str, directory, parameters: list[str]) -> nn.Module:
    """An adapter that PEFT itself has made, unmasked, and saved."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        target_modules=["q_proj"], target_parameters=parameters, rank_pattern={"q_proj": 2}, **CONFIG
    )
    model = peft.get_peft_model(experts_model(name), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("mixtral", ["experts.gate_up_proj", "experts.down_proj"]),
        ("gpt_oss", ["experts.gate_up_proj", "experts.down_proj"]),
        ("gpt_oss", ["experts.gate_up_proj"]),
    ],
)
def test_what_peft_has_saved_gives_the_same_product_masked(name, parameters, tmp_path):
    theirs = by_peft(name, tmp_path / "peft", parameters).merge_and_unload()
    plain = experts_model(name)

    ours = load_adapter(experts_model(name), tmp_path / "peft", strict_mask=False)

    save_adapter(ours, tmp_path / "ours")
    merged = merge_and_unload(ours)
    compared = 0
    for path, module, key in expert_stacks(plain):
        owner = path.rpartition(".")[0]
        mask = stack_of(module, key) != 0
        expected = torch.where(mask, stack_of(theirs.get_submodule(owner), key), 0)
        torch.testing.assert_close(stack_of(merged.get_submodule(owner), key), expected, rtol=1e-5, atol=1e-6)
        changed = not torch.equal(expected, stack_of(module, key))
        assert changed == any(path.endswith(parameter) for parameter in parameters)
        compared += changed
    assert compared == 2 * len(parameters)
    # And saved by us it has PEFT's names and numbers.
    tensors, expected = (load_file(tmp_path / which / FILES[1]) for which in ("ours", "peft"))
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)


def test_peft_alone_refuses_ours(tmp_path):
    peft = pytest.importorskip("peft")
    save_adapter(trained("mixtral"), tmp_path)
    kind = json.loads((tmp_path / FILES[0]).read_text())["peft_type"]
    assert kind not in {each.value for each in peft.PeftType}


# ---- refusals ----


def test_another_mask_of_one_stack_is_refused_by_name(tmp_path):
    save_adapter(trained("mixtral"), tmp_path)
    model = experts_model("mixtral")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3, 2, 1:4] = 1.0
    before = snapshot(model)
    refused(
        ValueError, lambda: load_adapter(model, tmp_path), "another sparsity mask", "layers.1.mlp.experts.down_proj"
    )
    assert_unchanged(model, before)
    load_adapter(model, tmp_path, strict_mask=False)


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        (lambda t: t.pop(f"{IN_FILE}.base_layer.lora_A.weight"), ("is incomplete",)),
        (lambda t: t.update({f"{IN_FILE}.lora_A.weight": torch.zeros(11, 48)}), ("[11, 48]", "needs [4, 3, 48]")),
        (lambda t: t.update({f"{IN_FILE}.lora_A.weight": torch.zeros(16, 48)}), ("[4, 4, 48]",)),
        (lambda t: t.update({f"{IN_FILE}.lora_A.weight": torch.zeros(24, 48)}), ("is of 8 experts", "has 4")),
        (lambda t: t.update({f"{IN_FILE}.lora_B.weight": torch.zeros(32, 11)}), ("[32, 11]", "needs [4, 32, 3]")),
    ],
)  # fmt: skip
def test_tensors_of_other_shapes_are_refused_by_name(change, fragments, tmp_path):
    save_adapter(trained("mixtral"), tmp_path)
    tensors = load_file(tmp_path / FILES[1])
    change(tensors)
    save_file(tensors, tmp_path / FILES[1])
    model = experts_model("mixtral")
    before = snapshot(model)
    refused(ValueError, lambda: load_adapter(model, tmp_path), FIRST, *fragments)
    assert_unchanged(model, before)


def test_an_adapter_for_one_stack_does_not_fit_a_model_with_two(tmp_path):
    save_adapter(trained("mixtral", target_parameters=["experts.down_proj"]), tmp_path)
    model = trained("mixtral", target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    message = refused(ValueError, lambda: load_adapter(model, tmp_path), "was not loaded", f"{FIRST}.gate_up_proj")
    assert "no tensors for" in message
    edit_config(tmp_path, target_parameters=["experts.gate_up_proj"])  # the same names in the file, another stack
    refused(ValueError, lambda: load_adapter(experts_model("mixtral"), tmp_path), "needs [4, 3, 32]")


def test_an_adapter_of_another_model_says_so(tmp_path):
    save_adapter(trained("mixtral"), tmp_path)
    refused(ValueError, lambda: load_adapter(experts_model("nemotron_h"), tmp_path), "belongs to another model")
    message = refused(
        ValueError,
        lambda: load_adapter(experts_model("qwen3_moe"), tmp_path),
        "is of 4 experts in the adapter",
        "has 8",
    )
    assert "shape" not in message


def test_names_of_adapted_experts_that_are_all_zero_are_warned_of(tmp_path):
    model = trained("mixtral")
    with torch.no_grad():
        dict(named_lors_layers(model))[f"{FIRST}.down_proj"].lora_B.zero_()
    with pytest.warns(UserWarning, match="1 of 12 adapters are still zero: 'model.layers.0.mlp.experts.down_proj'"):
        save_adapter(model, tmp_path)
