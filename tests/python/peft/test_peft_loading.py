# SPDX-License-Identifier: Apache-2.0
"""Adapter directories of lors_cuda.peft, of lors_cuda and of plain PEFT: which load where, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import lors_cuda
from adapter_directories import FILES, edit_config
from models import assert_unchanged, logits, refused, snapshot, tiny_llama, trained
from peft_models import (
    LAYERS,
    LoRSLoraConfig,
    adapted,
    check_output,
    compressed,
    config_of,
    every_base,
    fill,
    inputs,
    layers,
    lors_peft,
    merged_reference,
    net,
    peft,
)

from_pretrained = lors_peft.from_pretrained
FORMER_TYPE = "LORS: import lors_cuda.peft before loading this adapter"  # what earlier versions wrote


@pytest.fixture
def directory(tmp_path):
    """What save_pretrained of an adapted net wrote, its adapter as `adapted()` fills it."""
    adapted().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@every_base
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loads_onto_any_base(directory, base, low_cpu_mem_usage):
    model = from_pretrained(compressed(net(), base), directory, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not any(p.is_meta for p in model.parameters())
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training
    check_output(model)
    stock = peft.PeftModel.from_pretrained(compressed(net(), base), directory, low_cpu_mem_usage=low_cpu_mem_usage)
    check_output(stock)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_float32_adapters_of_a_16_bit_base_keep_every_digit(tmp_path, low_cpu_mem_usage):
    # PEFT itself rounds them to the base's dtype where low_cpu_mem_usage=True.
    model = adapted(net(dtype=torch.bfloat16))
    model.save_pretrained(tmp_path)
    other = from_pretrained(net(dtype=torch.bfloat16), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    for name, layer in layers(model).items():
        weight = layers(other)[name].lora_A["default"].weight
        assert weight.dtype == torch.float32
        assert torch.equal(weight, layer.lora_A["default"].weight)


def test_adapters_in_the_bases_dtype(tmp_path):
    model = peft.get_peft_model(net(dtype=torch.bfloat16), config_of(), autocast_adapter_dtype=False)
    fill(model)
    assert layers(model)["0"].lora_A["default"].weight.dtype == torch.bfloat16
    x = inputs(dtype=torch.bfloat16)
    assert model(x).dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    other = from_pretrained(net(dtype=torch.bfloat16), tmp_path, autocast_adapter_dtype=False)
    assert torch.equal(other(x), model.eval()(x))


def test_trains_on_after_loading(directory):
    model = from_pretrained(net(), directory, is_trainable=True)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"base_model.model.{name}.lora_{which}.default.weight" for name in LAYERS for which in "AB"
    }
    assert torch.equal(from_pretrained(net(), directory, gradient="exact")(inputs()), model.eval()(inputs()))


def test_the_files(directory):
    fields = json.loads((directory / FILES[0]).read_text())
    assert fields["peft_type"] == "LORS"
    assert (fields["layout"], fields["gradient"]) == ("auto", "lors")
    assert fields["lors"]["format_version"] == 1
    assert fields["lors"]["mask_fingerprints"] == {name: x.fingerprint.mask for name, x in layers(adapted()).items()}
    assert set(load_file(directory / FILES[1])) == {
        f"base_model.model.{name}.lora_{which}.weight" for name in LAYERS for which in "AB"
    }


def test_files_of_torch_save_load_too(tmp_path):
    adapted().save_pretrained(tmp_path, safe_serialization=False)
    assert not (tmp_path / FILES[1]).exists()
    check_output(from_pretrained(net(), tmp_path))


# ---- loaded without us: loud ----


ALONE = """
import sys, torch, peft
directory, door = sys.argv[1:]
model = torch.nn.Sequential(torch.nn.Linear(8, 16, bias=False), torch.nn.ReLU(), torch.nn.Linear(16, 12))
before = str(model)
if door == "second":
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"]))
    before = str(model)
elif door == "transformers":
    import transformers
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=64))
    before = str(model)
try:
    if door == "model":
        peft.PeftModel.from_pretrained(model, directory)
    elif door == "config":
        peft.PeftConfig.from_pretrained(directory)
    elif door == "second":
        model.load_adapter(directory, "b")
    else:
        model.load_adapter(directory)
except KeyError as error:
    assert "lors_cuda" not in sys.modules
    assert str(model) == before, model
    print(error.args[0])
"""


@pytest.mark.parametrize("door", ["model", "config", "second", "transformers"])
def test_peft_alone_stops_at_the_type_and_applies_nothing(directory, tmp_path, door):
    def shown() -> str:
        command = [sys.executable, "-c", ALONE, str(directory), door]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert shown() == "LORS"
    if door == "model":
        edit_config(directory, peft_type=FORMER_TYPE)
        assert shown() == FORMER_TYPE


# ---- the three kinds of directories ----


@pytest.mark.parametrize("kind", ["LORS", FORMER_TYPE, "LORA"])
def test_every_type_that_we_wrote_loads_in_every_door(saved, tmp_path, kind):
    ours, library = saved
    adapted_llama = peft.get_peft_model(tiny_llama(), LoRSLoraConfig(r=4, target_modules="all-linear"))
    fill(adapted_llama, size=0.05)
    adapted_llama.save_pretrained(tmp_path / "peft")
    for directory, model in ((library, ours), (tmp_path / "peft", adapted_llama)):
        edit_config(directory, peft_type=kind)
        expected = logits(model)
        assert torch.equal(logits(lors_cuda.load_adapter(tiny_llama(), directory)), expected)
        assert torch.equal(logits(from_pretrained(tiny_llama(), directory)), expected)
        if kind != "LORA":  # which PEFT takes for its own
            assert torch.equal(logits(peft.PeftModel.from_pretrained(tiny_llama(), directory)), expected)


def test_our_directories_load_without_peft(tmp_path):
    model = peft.get_peft_model(
        tiny_llama(), LoRSLoraConfig(r=4, lora_alpha=8, target_modules="all-linear", gradient="exact")
    )
    fill(model, size=0.05)
    model.save_pretrained(tmp_path)
    other = lors_cuda.load_adapter(tiny_llama(), tmp_path)
    assert torch.equal(logits(other), logits(model))
    assert other.lors_config.gradient == "exact"
    refused(ValueError, lambda: lors_cuda.load_adapter(tiny_llama(seed=1), tmp_path), "another sparsity mask")


def test_directories_of_save_adapter_load(saved):
    model, directory = saved
    assert torch.equal(logits(from_pretrained(tiny_llama(), directory)), logits(model))
    stock = peft.PeftModel.from_pretrained(tiny_llama(), directory)
    assert torch.equal(logits(stock), logits(model))
    refused(ValueError, lambda: from_pretrained(tiny_llama(seed=1), directory), "another sparsity mask")


@pytest.mark.parametrize(
    "fields",
    [
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}},
        {"use_rslora": True, "modules_to_save": ["lm_head"], "gradient": "exact"},
    ],
)
def test_every_field_of_save_adapter_is_read(tmp_path, fields):
    model = trained(**fields)
    lors_cuda.save_adapter(model, tmp_path)
    other = from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(logits(other), logits(model))
    assert set(layers(other)["model.layers.0.mlp.up_proj"].gradient.values()) == {fields.get("gradient", "lors")}


def test_adapters_of_plain_peft_are_loaded_on_request_and_masked(tmp_path):
    plain = peft.get_peft_model(net(), peft.LoraConfig(r=3, lora_alpha=6, target_modules=list(LAYERS)))
    fill(plain)
    plain.save_pretrained(tmp_path)
    model = net()
    before = snapshot(model)
    refused(ValueError, lambda: from_pretrained(model, tmp_path), "no mask fingerprints", "strict_mask=False")
    assert_unchanged(model, before)
    check_output(from_pretrained(model, tmp_path, strict_mask=False))

    ours = adapted()
    refused(ValueError, lambda: ours.load_adapter(tmp_path, "plain"), "different peft types")
    refused(ValueError, lambda: from_pretrained(ours, tmp_path, "plain"), "no mask fingerprints")
    from_pretrained(ours, tmp_path, "plain", strict_mask=False).set_adapter("plain")
    check_output(ours, ("plain",))


@pytest.mark.parametrize(
    "changes", [{"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "pissa"}, {"kasa_config": {"a": 1}}]
)
@pytest.mark.parametrize("door", [from_pretrained, lors_cuda.load_adapter])
def test_plain_adapters_with_more_than_we_have_are_refused(tmp_path, changes, door):
    peft.get_peft_model(net(), peft.LoraConfig(r=3, target_modules=["0"])).save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    refused(ValueError, lambda: door(net(), tmp_path, strict_mask=False), next(iter(changes)))


@pytest.mark.parametrize("door", [from_pretrained, lors_cuda.load_adapter])
def test_a_field_of_a_later_peft_in_a_file_is_ignored_by_name(directory, door):
    edit_config(directory, use_tomorrow=True, off_tomorrow=False)
    with pytest.warns(UserWarning, match=r"use_tomorrow=True, which this lors_cuda does not know and ignores"):
        model = door(net(), directory)
    check_output(adapted(), call=model)


# ---- another base, another mask, another rank ----


def another_mask():
    return net(seed=1)


def another_width():
    model = net()
    model[0] = torch.nn.Linear(8, 16, bias=False, dtype=torch.float64)
    model[0].weight.data[:, 4:] = 0
    return model


def another_model():
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 12))


@pytest.mark.parametrize("base", [another_mask, another_width, another_model])
@pytest.mark.parametrize("load", ["ours", "stock", "second", "second stock"])
def test_another_base_is_refused(directory, base, load):
    model = base()
    words = "trained on a model with another sparsity mask" if base is not another_model else "'2'"
    if "second" in load:
        model = peft.get_peft_model(model, config_of(target_modules=["0"]))
    before = snapshot(model)
    calls = {
        "ours": lambda: from_pretrained(model, directory),
        "stock": lambda: peft.PeftModel.from_pretrained(model, directory),
        "second": lambda: from_pretrained(model, directory, "b"),
        "second stock": lambda: model.load_adapter(directory, "b"),
    }
    refused(ValueError, calls[load], words)
    assert_unchanged(model, before)
    if "second" in load:
        assert list(model.peft_config) == ["default"]


def test_another_mask_is_loaded_on_request(directory):
    model = from_pretrained(another_mask(), directory, strict_mask=False)
    assert torch.equal(layers(model)["0"].lora_A["default"].weight, layers(adapted())["0"].lora_A["default"].weight)
    other = net(seed=1).get_submodule("0").weight
    assert torch.equal(layers(model)["0"].get_delta_weight("default") != 0, other != 0)


def _without_one_tensor(path):
    tensors = load_file(path / FILES[1])
    tensors.pop("base_model.model.2.lora_B.weight")
    save_file(tensors, path / FILES[1])


def _with_one_more(path):
    tensors = load_file(path / FILES[1])
    tensors["base_model.model.1.lora_A.weight"] = torch.zeros(3, 8)
    save_file(tensors, path / FILES[1])


def _truncated(path):
    data = (path / FILES[1]).read_bytes()
    (path / FILES[1]).write_bytes(data[:-8])


DAMAGE = {
    "another rank": (lambda d: edit_config(d, r=4), ("has shape [3, 8], but [4, 8] is needed",)),
    "missing tensor": (_without_one_tensor, ("There is no tensor for", "2.lora_B")),
    "unknown tensor": (_with_one_more, ("There is a tensor", "1.lora_A")),
    "truncated": (_truncated, ("truncated or corrupted",)),
    "no json": (lambda d: (d / FILES[0]).write_text("{"), ("not readable JSON",)),
    "json list": (lambda d: (d / FILES[0]).write_text("[1]"), ("its peft_type is 'list'",)),
    "other type": (lambda d: edit_config(d, peft_type="IA3"), ("its peft_type is 'IA3'",)),
    "no masks": (lambda d: edit_config(d, lors={"format_version": 1}), ("no mask fingerprints",)),
    "emptied masks": (
        lambda d: edit_config(d, lors={"format_version": 1, "mask_fingerprints": {}}),
        ("no mask fingerprints",),
    ),
    "later format": (lambda d: edit_config(d, lors={"format_version": 9, "mask_fingerprints": {}}), ("version 9",)),
    "fewer targets": (lambda d: edit_config(d, target_modules=["0"]), ("It has adapters for '2'",)),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("second", [False, True])
def test_damaged_directories_are_refused_and_nothing_changes(directory, damage, second):
    change, words = DAMAGE[damage]
    change(directory)
    model = adapted() if second else net()
    before = snapshot(model)
    refused(ValueError, lambda: from_pretrained(model, directory, "b"), *words)
    assert_unchanged(model, before)
    if second:
        assert list(model.peft_config) == ["default"]
        check_output(model)


@pytest.mark.parametrize("second", [False, True])
def test_a_refused_adapter_leaves_separately_trained_modules(tmp_path, second):
    fields = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "trainable_token_indices": [1, 2]}
    peft.get_peft_model(tiny_llama(layers=1), LoRSLoraConfig(**fields)).save_pretrained(tmp_path)
    edit_config(tmp_path, r=2)
    model = tiny_llama(layers=1)
    if second:
        model = peft.get_peft_model(model, LoRSLoraConfig(**fields))
    before = snapshot(model)
    refused(ValueError, lambda: from_pretrained(model, tmp_path, "b"), "has shape [4, 32], but [2, 32] is needed")
    assert_unchanged(model, before)


def test_missing_files_are_named(tmp_path, directory):
    refused(FileNotFoundError, lambda: from_pretrained(net(), tmp_path / "nowhere"), FILES[0])
    refused(ValueError, lambda: from_pretrained(adapted(), directory), "adapter 'default' already")
    (directory / FILES[1]).unlink()
    refused(FileNotFoundError, lambda: from_pretrained(net(), directory), FILES[1])
    refused(TypeError, lambda: from_pretrained("model", directory), "torch.nn.Module")
    refused(TypeError, lambda: from_pretrained(net(), directory.parent, subfolder="adapter"), "give the whole path")


def test_tensors_of_another_rank_do_not_enter_an_adapter(tmp_path):
    adapted(r=2).save_pretrained(tmp_path)
    model = adapted()
    before = snapshot(model)
    refused(ValueError, lambda: model.load_adapter(tmp_path, "default"), "has shape [2, 8], but [3, 8] is needed")
    assert_unchanged(model, before)


# ---- several adapters and modules_to_save ----


def test_several_adapters_are_saved_and_loaded(tmp_path):
    model = adapted(adapters=("default", "second"))
    model.save_pretrained(tmp_path)
    other = from_pretrained(net(), tmp_path)
    from_pretrained(other, tmp_path / "second", "second")
    for name in ("default", "second"):
        other.set_adapter(name)
        check_output(other, (name,)) if name == "default" else torch.testing.assert_close(
            other(inputs()), _with(model, name)
        )
    other.delete_adapter("default")
    assert other.active_adapters == ["second"]
    assert list(layers(other)["0"].gradient) == ["second"]
    torch.testing.assert_close(other(inputs()), _with(model, "second"))


def _with(model, name):
    model.set_adapter(name)
    return model(inputs())


def test_modules_to_save(tmp_path):
    model = adapted(target_modules=["0"], modules_to_save=["2"])
    saved = model.base_model.model[2].modules_to_save["default"]
    assert saved.weight.requires_grad
    saved.weight.data += 1.0
    model.save_pretrained(tmp_path)
    assert torch.equal(from_pretrained(net(), tmp_path)(inputs()), model(inputs()))
    merged = model.merge_and_unload()
    assert torch.equal(merged[2].weight, saved.weight)
    torch.testing.assert_close(merged[0].weight, merged_reference(adapted(target_modules=["0"]))["0"])


# ---- the base's values ----


@every_base
def test_other_values_are_warned_of_by_name(directory, base):
    other = net()
    other[2].weight.data *= 1.5
    with pytest.warns(UserWarning, match=r"The weights of '2' have the mask .* other values") as caught:
        from_pretrained(compressed(other, base), directory)
    assert len([each for each in caught if "adapter may not fit" in str(each.message)]) == 1


@every_base
def test_merging_twice_is_warned_of(directory, base):
    merged = from_pretrained(compressed(net(), base), directory).merge_and_unload()
    with pytest.warns(UserWarning, match="'0' and '2'|'0', '2'"):
        from_pretrained(merged, directory)


def test_a_wider_dtype_is_the_same_base_and_a_narrower_one_is_named(tmp_path):
    adapted(net(dtype=torch.bfloat16)).save_pretrained(tmp_path / "narrow")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        from_pretrained(net(dtype=torch.bfloat16).float(), tmp_path / "narrow")
    adapted(net(dtype=torch.float32)).save_pretrained(tmp_path / "wide")
    with pytest.warns(UserWarning, match="weights in torch.float32, and those of '0', '2' are in torch.bfloat16"):
        from_pretrained(net(dtype=torch.float32).bfloat16(), tmp_path / "wide")


def test_a_further_adapter_is_compared_with_the_unmerged_base(directory):
    model = from_pretrained(net(), directory)
    model.merge_adapter()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The adapter may not fit")
        from_pretrained(model, directory, "second")


def test_the_core_compares_what_peft_saved(directory):
    fields = json.loads((directory / "adapter_config.json").read_text())["lors"]
    assert set(fields["value_fingerprints"]) == set(LAYERS)
    other = net()
    other[0].weight.data *= 1.5
    refused(
        ValueError,
        lambda: lors_cuda.load_adapter(other, directory, strict_values=True),
        "The weights of '0' have the mask",
    )


@pytest.mark.parametrize("format", ["dense", "sparse-24-bitmask"])
def test_a_model_directory_that_holds_an_adapter_too_is_loaded_without_it(tmp_path, format):
    lors_cuda.save_sparse_checkpoint(tiny_llama(), tmp_path / "model", format)
    lors_cuda.save_adapter(trained(), tmp_path / "model")
    with pytest.warns(UserWarning, match="holds an adapter beside the model, which is loaded without it"):
        model = lors_cuda.load_sparse_checkpoint(tmp_path / "model")
    torch.testing.assert_close(logits(model), logits(tiny_llama()))
    assert model.config._name_or_path == str(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        lors_cuda.load_adapter(model, tmp_path / "model")
    torch.testing.assert_close(logits(model), logits(trained()))
