# SPDX-License-Identifier: Apache-2.0
"""LoRSLoraConfig: each field of PEFT's LoraConfig is decided, and what cannot hold is refused by name."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from lors_cuda import SparseLinear
from lors_cuda._checks import REFUSED_LORA_FIELDS, SUPPORTED_LORA_FIELDS
from lors_cuda.adapter_directory import PEFT_TYPE
from models import assert_unchanged, refused, snapshot, tiny_llama
from peft_models import LAYERS, LoRSLoraConfig, adapted, compressed, config_of, inputs, layers, lors_peft, net, peft

lora = peft.tuners.lora.config


def test_every_field_of_peft_is_decided():
    # A new field of PEFT stands in neither set: decide it there, and test it.
    names = {item.name for item in dataclasses.fields(peft.LoraConfig)}
    own = {"layout", "gradient", "rounding", "rounding_seed", "requantize", "remainder", "dither_seed", "lors"}
    assert names | own | {"products"} == SUPPORTED_LORA_FIELDS | set(REFUSED_LORA_FIELDS)
    assert not SUPPORTED_LORA_FIELDS & set(REFUSED_LORA_FIELDS)
    assert {item.name for item in dataclasses.fields(LoRSLoraConfig)} - names == own


REFUSED_VALUES = {
    "megatron_config": {"tensor_model_parallel_size": 1},
    "loftq_config": {"loftq_bits": 4},
    "eva_config": lora.EvaConfig(),
    "corda_config": lora.CordaConfig(),
    "lora_ga_config": lora.LoraGAConfig(),
    "use_dora": True,
    "velora_config": lora.VeloraConfig(num_groups=2),
    "alora_invocation_tokens": [1, 2],
    "use_qalora": True,
    "monteclora_config": lora.MontecloraConfig(),
    "layer_replication": [(0, 1)],
    "lora_bias": True,
    "use_bdlora": lora.BdLoraConfig(target_modules_bd_a=["0"]),
    "arrow_config": lora.ArrowConfig(),
    "kasa_config": lora.KasaConfig(),
}


def test_every_refused_field_is_tried():
    assert set(REFUSED_VALUES) == set(REFUSED_LORA_FIELDS)


@pytest.mark.parametrize("name", sorted(REFUSED_VALUES))
def test_is_refused_by_name(name):
    words = (f"{name}=", "is refused by LoRSLoraConfig", REFUSED_LORA_FIELDS[name])
    refused(ValueError, lambda: config_of(**{name: REFUSED_VALUES[name]}), *words)
    config = config_of()
    setattr(config, name, REFUSED_VALUES[name])  # PEFT's own examples set fields later
    model = net()
    before = snapshot(model)
    refused(ValueError, lambda: peft.get_peft_model(model, config), *words)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "eva", "mica", "tomorrow", 3]
)
def test_starts_that_destroy_zeros_name_the_alternative(start):
    refused(ValueError, lambda: config_of(init_lora_weights=start), repr(start), "init_from_gradients")


@pytest.mark.parametrize("start", [True, "gaussian", "orthogonal"])
def test_starts_leave_the_output(start):
    model = peft.get_peft_model(net(), config_of(r=4, init_lora_weights=start))
    x = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(model(x), net()(x))
    assert layers(model)["0"].lora_A["default"].weight.any()


WRONG = {
    "layout": ("4:8", "layout is '4:8'"),
    "gradient": ("true", "gradient is 'true'"),
    "r": (0, "r must be an integer of at least 1"),
    "lora_alpha": (float("nan"), "lora_alpha must be finite, but is nan"),
    "lora_dropout": (1.0, "lora_dropout must be at least 0 and less than 1"),
    "rank_pattern": ({"0": -2}, "rank_pattern['0'] must be an integer"),
    "alpha_pattern": ({"0": float("inf")}, "alpha_pattern['0'] must be finite"),
    "lors": ({"format_version": 1}, "no mask fingerprints"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_are_named(name):
    value, words = WRONG[name]
    refused(ValueError, lambda: config_of(**{name: value}), words)


def test_another_format_version_is_refused():
    refused(
        ValueError,
        lambda: config_of(lors={"format_version": 2, "mask_fingerprints": {}}),
        "format version 2",
        "reads 1",
    )


@dataclasses.dataclass
class LaterConfig(LoRSLoraConfig):
    """What a LoRSLoraConfig would be beside a PEFT whose LoraConfig has more fields."""

    use_tomorrow: bool = False
    tomorrow_size: int = 16
    use_tomorrows_layer: bool = dataclasses.field(default=False, metadata={"is_lora_variant": True})


def test_a_field_of_a_later_peft_is_ignored_by_name_or_refused_as_a_variant():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LaterConfig(target_modules=["0"], tomorrow_size=16)
    with pytest.warns(UserWarning, match=r"use_tomorrow=True, tomorrow_size=8, which this lors_cuda does not know"):
        config = LaterConfig(target_modules=["0"], use_tomorrow=True, tomorrow_size=8)
    with pytest.warns(UserWarning, match="use_tomorrow=True"):
        model = peft.get_peft_model(net(), config)
    assert list(layers(model)) == ["0"]
    refused(
        ValueError, lambda: LaterConfig(use_tomorrows_layer=True), "use_tomorrows_layer=True is refused", "without the"
    )


def test_ranks_alphas_and_rslora():
    config = {"r": 4, "lora_alpha": 6, "rank_pattern": {"2": 2}, "alpha_pattern": {"0": 10}}
    found = layers(adapted(**config))
    assert {name: layer.r["default"] for name, layer in found.items()} == {"0": 4, "2": 2}
    assert {name: layer.scaling["default"] for name, layer in found.items()} == {"0": 2.5, "2": 3.0}
    assert layers(adapted(use_rslora=True, **config))["0"].scaling["default"] == 5.0


def test_is_a_lora_config_that_copies():
    config = config_of(layout="2:4", gradient="exact")
    assert isinstance(config, peft.LoraConfig)
    assert config.peft_type == PEFT_TYPE
    other = replace(config, r=7)
    assert (other.r, other.layout, other.gradient) == (7, "2:4", "exact")
    again = LoRSLoraConfig(**config.to_dict())
    assert again.to_dict() == config.to_dict()


def test_one_configuration_for_two_models():
    config = config_of()
    peft.get_peft_model(net(0), config)
    other = peft.get_peft_model(net(1), config)  # of another mask: fingerprints of the first model are not for it
    assert config.fingerprints == {name: layer.fingerprint for name, layer in layers(other).items()}


# ---- targets ----


def test_all_linear_finds_linears_and_compressed_ones_but_no_head():
    for base in ("linear", "2:4"):
        model = compressed(tiny_llama(layers=1), base)
        names = set(layers(peft.get_peft_model(model, LoRSLoraConfig(target_modules="all-linear"))))
        assert len(names) == 7
        assert not any("lm_head" in name for name in names)


def test_other_modules_are_refused():
    # By the rules of the library, which model/test_targets.py tries one by one.
    model = nn.Sequential(nn.Linear(4, 4), nn.Embedding(4, 4))
    before = snapshot(model)
    refused(
        ValueError,
        lambda: peft.get_peft_model(model, config_of(target_modules=["0", "1"])),
        "'1' cannot be adapted: it is an Embedding, and only nn.Linear",
    )
    assert_unchanged(model, before)


def test_shared_and_tied_modules_are_refused():
    shared = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    shared.append(shared[0])
    refused(ValueError, lambda: peft.get_peft_model(shared, config_of(target_modules=["0"])), "also called '2'")
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    refused(ValueError, lambda: peft.get_peft_model(tied, config_of(target_modules=["0"])), "weight with '1'")


def test_a_layout_that_does_not_fit_is_refused_before_anything_changes():
    model = net()
    model[2].weight.data[0] = 1.0
    before = snapshot(model)
    refused(ValueError, lambda: peft.get_peft_model(model, config_of(layout="2:4")), "'2'", "not 2:4")
    assert_unchanged(model, before)
    base = compressed(net(), "bitmap")
    before = snapshot(base)
    refused(ValueError, lambda: peft.get_peft_model(base, config_of(layout="2:4")), "stored in layout 'bitmap'")
    assert_unchanged(base, before)


def test_an_error_halfway_restores_the_model(monkeypatch):
    model = net()
    model[0].requires_grad_(False)
    before, calls = snapshot(model), []
    original = SparseLinear.compress

    def fails_at_the_second(linear, layout):
        calls.append(linear)
        if len(calls) == 2:
            raise MemoryError("no memory")
        return original(linear, layout)

    monkeypatch.setattr(SparseLinear, "compress", fails_at_the_second)
    with pytest.raises(MemoryError):
        peft.get_peft_model(model, config_of(layout="2:4"))
    assert_unchanged(model, before)


def test_dense_weights_are_freed_one_by_one(monkeypatch):
    import gc
    import weakref

    model = net()
    alive = [weakref.ref(model.get_submodule(name)) for name in LAYERS]
    seen = []
    original = SparseLinear.compress

    def watched(linear, layout):
        gc.collect()
        seen.append(sum(each() is not None for each in alive))
        return original(linear, layout)

    monkeypatch.setattr(SparseLinear, "compress", watched)
    peft.get_peft_model(model, config_of(layout="2:4"))
    assert seen == [2, 1]


def test_a_rank_beyond_a_layers_sides_is_refused():
    model = net()
    before = snapshot(model)
    refused(ValueError, lambda: peft.get_peft_model(model, config_of(r=9)), "'0': r is 9", "between 1 and 8")
    refused(ValueError, lambda: peft.get_peft_model(model, config_of(rank_pattern={"2": 13})), "'2': r is 13")
    assert_unchanged(model, before)
    assert layers(peft.get_peft_model(model, config_of(r=8)))["0"].r["default"] == 8


def test_adapters_combined_beyond_a_layers_sides_work_and_load_again(tmp_path):
    model = adapted(adapters=("default", "b", "c"))
    model.add_weighted_adapter(["default", "b", "c"], [1.0, 1.0, 1.0], "sum", combination_type="cat")
    assert layers(model)["0"].r["sum"] == 9  # of 8 input features
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    other = lors_peft.from_pretrained(net(), tmp_path / "sum")
    assert torch.equal(other(inputs()), model(inputs()))


def test_modules_to_save_must_exist():
    model = net()
    before = snapshot(model)
    words = "modules_to_save names 'heat', but no module of Sequential"
    refused(ValueError, lambda: peft.get_peft_model(model, config_of(modules_to_save=["heat"])), words)
    assert_unchanged(model, before)


def test_the_heads_that_peft_adds_for_a_task_need_not_all_exist():
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    base = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(vocab_size=64, num_labels=3, **shape))
    config = LoRSLoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS")
    model = peft.get_peft_model(base, config)
    assert model.base_model.model.score.modules_to_save["default"].weight.requires_grad


@pytest.mark.parametrize(
    ("fields", "fragment"),
    [
        ({"target_modules": ["0", "7"]}, "target_modules entry '7'"),
        ({"rank_pattern": {"seven": 2}}, "rank_pattern key 'seven'"),
        ({"alpha_pattern": {"seven": 2}}, "alpha_pattern key 'seven'"),
    ],
)
def test_an_entry_that_selects_nothing_is_warned_about(fields, fragment):
    with pytest.warns(UserWarning, match="selects no module") as caught:
        peft.get_peft_model(net(), config_of(**fields))
    assert fragment in str(caught[0].message)


# ---- with other adapters ----


def test_plain_and_masked_adapters_do_not_mix():
    plain = peft.LoraConfig(r=3, target_modules=list(LAYERS))
    model = adapted()
    refused(ValueError, lambda: model.add_adapter("plain", plain), "different peft types")
    refused(TypeError, lambda: layers(model)["0"].update_layer("plain", 3, 3, config=plain), "adapters are masked")
    assert list(model.peft_config) == ["default"]
    assert list(layers(model)["0"].lora_A) == ["default"]

    other = peft.get_peft_model(net(), plain)
    refused(ValueError, lambda: other.add_adapter("masked", config_of()), "different peft types")
    refused(ValueError, lambda: other.base_model.model[0].update_layer("masked", 3, 3, config=config_of()), "gradient")
    base = other.base_model.model
    with pytest.warns(UserWarning, match="second time"):
        refused(ValueError, lambda: peft.get_peft_model(base, config_of()), "PEFT's Linear, which is not masked")
    refused(ValueError, lambda: peft.get_peft_model(net(), config_of(), mixed=True), "not compatible")


def test_a_model_of_lors_layers_is_refused():
    from lors_cuda import LoRSConfig, get_lors_model

    model = get_lors_model(net(), LoRSConfig(r=2))
    refused(ValueError, lambda: peft.get_peft_model(model, config_of()), "is a LoRSLinear", "merge_and_unload")


def test_other_layer_classes_are_refused():
    config = config_of()
    config._register_custom_module({nn.Linear: peft.tuners.lora.Linear})
    refused(ValueError, lambda: peft.get_peft_model(net(), config), "_register_custom_module is refused")


# ---- versions ----


@pytest.mark.parametrize("version", ["0.17.1", "0.20.0", "unknown"])
def test_older_versions_of_peft_are_refused(monkeypatch, version):
    monkeypatch.setattr(peft, "__version__", version)
    refused(ImportError, lors_peft.require_peft, version, f"peft >= {lors_peft.MINIMUM_PEFT}")


@pytest.mark.parametrize("version", ["0.21.0", "0.22.0", "1.0.0"])
def test_newer_versions_of_peft_are_tried(monkeypatch, version):
    monkeypatch.setattr(peft, "__version__", version)
    lors_peft.require_peft()


def test_a_missing_peft_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    refused(ImportError, lors_peft.require_peft, "pip install 'lors-cuda[peft]'")


def test_the_extra_is_the_checked_range():
    metadata = importlib.import_module("importlib.metadata")
    try:
        needs = metadata.requires("lors-cuda")
    except metadata.PackageNotFoundError:
        pytest.skip("lors-cuda is not installed")
    assert any(need.partition(";")[0].strip() == f"peft>={lors_peft.MINIMUM_PEFT}" for need in needs or [])


@pytest.mark.parametrize(
    ("fields", "exception", "fragment"),
    [
        ({"init_lora_weights": 1}, ValueError, "init_lora_weights=1 is refused: it must be True, False or a name"),
        ({"rank_pattern": [1]}, TypeError, "rank_pattern must be a dict from regular expression to value, but is [1]"),
        (
            {"alpha_pattern": "q"},
            TypeError,
            "alpha_pattern must be a dict from regular expression to value, but is 'q'",
        ),
        ({"rank_pattern": {"0": 2.5}}, TypeError, "rank_pattern['0'] must be an integer of at least 1, but is 2.5"),
        ({"alpha_pattern": {"0": "8"}}, TypeError, "alpha_pattern['0'] must be a number, but is '8'"),
        ({"use_rslora": "yes"}, TypeError, "use_rslora must be True or False, but is 'yes'"),
    ],
)
def test_values_of_the_wrong_kind_are_refused(fields, exception, fragment):
    refused(exception, lambda: LoRSLoraConfig(target_modules=["0"], **fields), fragment)
