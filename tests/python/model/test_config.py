# SPDX-License-Identifier: Apache-2.0
"""LoRSConfig and the selection of modules; PEFT itself is the oracle where it is installed."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn

from lors_cuda import estimate_gradients, get_lors_model, merge_and_unload, save_adapter
from lors_cuda.config import LoRSConfig, find_targets, output_heads, pattern_matches, saved_modules
from lors_cuda.pruning import measure_sparsity, prune
from models import assert_unchanged, batch, refused, snapshot, tiny_llama, tiny_net

Q_PROJ = "model.layers.0.self_attn.q_proj"


def names(model: nn.Module, **fields) -> list[str]:
    return [target.name for target in find_targets(model, LoRSConfig(**fields))]


@pytest.mark.parametrize(
    ("fields", "exception", "fragment"),
    [
        ({"r": 0}, ValueError, "r must be an integer of at least 1, but is 0"),
        ({"r": -3}, ValueError, "but is -3"),
        ({"r": 2.0}, TypeError, "r must be an integer"),
        ({"r": True}, TypeError, "r must be an integer"),
        ({"r": "8"}, TypeError, "but is '8'"),
        ({"lora_alpha": math.inf}, ValueError, "lora_alpha must be finite, but is inf"),
        ({"lora_alpha": math.nan}, ValueError, "lora_alpha must be finite"),
        ({"lora_alpha": "16"}, TypeError, "lora_alpha must be a number"),
        ({"layout": "csr"}, ValueError, "'auto', 'dense', '2:4', 'bitmap', but is 'csr'"),
        ({"layout": None}, ValueError, "layout must be one of"),
        ({"gradient": "true"}, ValueError, "'lors', 'exact', but is 'true'"),
        ({"use_rslora": 1}, TypeError, "use_rslora must be True or False"),
        ({"init_lora_weights": "pissa"}, TypeError, "init_from_gradients"),
        ({"target_modules": []}, ValueError, "target_modules must be 'all-linear'"),
        ({"target_modules": None}, ValueError, "target_modules must be 'all-linear'"),
        ({"target_modules": 5}, TypeError, "target_modules must be a list"),
        ({"target_modules": ["q_proj", 3]}, TypeError, "but holds 3"),
        ({"target_modules": ["q_proj", ""]}, TypeError, "non-empty"),
        ({"target_modules": "(q_proj"}, ValueError, "not valid"),
        ({"exclude_modules": {"a": 1}}, TypeError, "exclude_modules must be a list"),
        ({"modules_to_save": "lm_head"}, TypeError, "list of module names, but is the string 'lm_head'"),
        ({"rank_pattern": {"q_proj": 0}}, ValueError, "rank_pattern['q_proj'] must be an integer of at least 1"),
        ({"rank_pattern": ["q_proj"]}, TypeError, "rank_pattern must be a dict"),
        ({"rank_pattern": {"[": 4}}, ValueError, "not valid"),
        ({"rank_pattern": {3: 4}}, TypeError, "regular expression as a string"),
        ({"alpha_pattern": {"q_proj": math.nan}}, ValueError, "alpha_pattern['q_proj'] must be finite"),
    ],
)
def test_a_wrong_field_is_refused_with_a_sentence(fields, exception, fragment):
    message = refused(exception, lambda: LoRSConfig(**fields), fragment)
    assert message.endswith(".")


def test_defaults_are_the_documented_ones():
    config = LoRSConfig()
    assert (config.r, config.lora_alpha, config.target_modules, config.exclude_modules) == (16, 16, "all-linear", None)
    assert (config.layout, config.gradient, config.use_rslora, config.init_lora_weights) == (
        "auto",
        "lors",
        False,
        True,
    )
    assert (config.rank_pattern, config.alpha_pattern, config.modules_to_save) == ({}, {}, None)


def test_round_trip_through_json():
    config = LoRSConfig(
        r=4,
        lora_alpha=2.5,
        target_modules={"v_proj", "q_proj"},
        exclude_modules=("lm_head",),
        rank_pattern={"q_proj": 2},
        alpha_pattern={"^model": 3.0},
        modules_to_save=["norm"],
        gradient="exact",
        use_rslora=True,
    )
    assert config.target_modules == ["q_proj", "v_proj"]
    assert LoRSConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_to_dict_shares_nothing_with_the_configuration():
    config = LoRSConfig(rank_pattern={"q_proj": 2})
    config.to_dict()["rank_pattern"]["q_proj"] = 99
    assert config.rank_pattern == {"q_proj": 2}


def test_from_dict_names_an_unknown_field():
    refused(ValueError, lambda: LoRSConfig.from_dict({"rank": 4}), "no field 'rank'", "lora_alpha")
    refused(TypeError, lambda: LoRSConfig.from_dict(["r"]), "needs a mapping", "list")


def test_from_dict_reads_what_had_products():
    assert LoRSConfig.from_dict({"r": 4, "products": "sparse"}) == LoRSConfig(r=4)


def test_a_field_reassigned_to_nonsense_is_found_on_use():
    config = LoRSConfig()
    config.r = 0
    refused(ValueError, lambda: find_targets(tiny_net(), config), "r must be an integer of at least 1")


PATTERNS = ["q_proj", "self_attn.q_proj", r"layers\.0\..*", r".*\.0\.self_attn.*", "^q_proj", "proj", "a|q_proj", "0.q"]
NAMES = [Q_PROJ, "q_proj", "model.layers.10.q_proj", "model.q_proj.x", "xq_proj", "layers.0.up", "a"]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", NAMES)
def test_patterns_match_as_in_peft(pattern, name):
    other = pytest.importorskip("peft.utils.other")
    expected = other.get_pattern_key([pattern], name) == pattern and pattern != name
    if pattern == name:
        expected = True  # there PEFT's answer does not tell a match from its fallback
    assert pattern_matches(pattern, name) == expected


def test_the_first_matching_pattern_wins():
    config = LoRSConfig(r=4, rank_pattern={r"layers\.0\..*": 2, "q_proj": 8}, alpha_pattern={"q_proj": 3})
    assert [config.rank_of(Q_PROJ), config.alpha_of(Q_PROJ)] == [2, 3]
    assert [config.rank_of("layers.1.q_proj"), config.rank_of("layers.1.k_proj")] == [8, 4]
    assert config.alpha_of("layers.1.k_proj") == 16


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "all-linear"},
        {"target_modules": "ALL-linear"},
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["self_attn.o_proj", "lm_head"]},
        {"target_modules": r".*layers\.1\.mlp\.(up|down)_proj"},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj", "layers.0.self_attn.q_proj"]},
        {"target_modules": "all-linear", "exclude_modules": r".*layers\.0.*"},
        {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["mlp"]},
    ],
)
def test_targets_are_those_of_peft(fields):
    peft = pytest.importorskip("peft")
    model = tiny_llama()
    ours = names(model, **fields)
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**fields)).targeted_module_names
    assert sorted(ours) == sorted(theirs)
    assert ours, "a comparison of empty lists would prove nothing"


def test_all_linear_leaves_out_the_output_head():
    model = tiny_llama()
    assert output_heads(model) == [model.lm_head]
    assert len(names(model)) == 14
    assert "lm_head" not in names(model)


def test_all_linear_leaves_out_a_classification_head():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=64, num_labels=3
    )
    config.pad_token_id = 0
    model = transformers.LlamaForSequenceClassification(config)
    assert len(names(model)) == 7
    assert "score" not in names(model)


def test_a_plain_module_has_no_output_head():
    assert names(tiny_net()) == ["0", "2"]


def test_a_regular_expression_may_also_match_containers():
    assert names(tiny_llama(), target_modules=".*self_attn.*") == [
        f"model.layers.{layer}.self_attn.{kind}_proj" for layer in (0, 1) for kind in "qkvo"
    ]


def test_a_suffix_matches_at_a_dot_only():
    model = nn.ModuleDict({"proj": nn.Linear(4, 4), "q_proj": nn.Linear(4, 4)})
    assert names(model, target_modules=["proj"]) == ["proj"]


def test_a_shared_linear_is_listed_once_with_all_names():
    linear = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": linear, "b": nn.Sequential(linear, nn.Linear(4, 4))})
    targets = find_targets(model, LoRSConfig(target_modules=["b.0"]))
    assert [(target.name, target.names) for target in targets] == [("a", ("a", "b.0"))]
    assert names(model, exclude_modules=["a"]) == ["b.1"]


def test_nothing_matched_lists_the_linears():
    message = refused(
        ValueError, lambda: names(tiny_llama(), target_modules=["qproj"]), "['qproj'] matches no nn.Linear", Q_PROJ
    )
    assert "and 9 more" in message


@pytest.mark.parametrize(
    ("model", "fields", "fragment"),
    [
        (nn.Sequential(nn.ReLU()), {}, "has no nn.Linear"),
        (nn.Linear(4, 4), {}, "LoRSLinear.from_linear"),
        (nn.Sequential(nn.Linear(4, 4)), {"exclude_modules": ["0"]}, "nothing is left to adapt"),
        (
            nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
            {"target_modules": ["0", "1"]},
            "'1' cannot be adapted: it is a ReLU",
        ),
        (nn.Sequential(nn.Embedding(4, 4)), {"target_modules": ["0"]}, "it is an Embedding"),
        (nn.Sequential(nn.MultiheadAttention(4, 2)), {}, "MultiheadAttention"),
        (nn.Sequential(nn.TransformerEncoderLayer(8, 2)), {"target_modules": ["linear1"]}, "fast path"),
        (nn.Sequential(nn.LazyLinear(4)), {}, "no shape yet"),
        (nn.Sequential(nn.Linear(4, 4, device="meta")), {}, "meta device"),
    ],
)
def test_what_cannot_be_adapted_is_named(model, fields, fragment):
    refused(ValueError, lambda: names(model, **fields), fragment)


def test_a_pruned_or_parametrized_linear_must_be_made_permanent():
    from torch.nn.utils import parametrizations, prune

    net = tiny_net()
    prune.l1_unstructured(net[0], "weight", 0.5)
    refused(ValueError, lambda: names(net), "'0' cannot be adapted", "torch.nn.utils.prune.remove")
    prune.remove(net[0], "weight")
    assert names(net) == ["0", "2"]
    parametrizations.orthogonal(net[2])
    refused(ValueError, lambda: names(net), "'2' cannot be adapted", "remove_parametrizations")


def test_a_linear_with_a_forward_or_hooks_of_its_own_is_refused():
    class Scaled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    class Renamed(nn.Linear):
        pass

    refused(ValueError, lambda: names(nn.Sequential(Scaled(4, 4))), "a Scaled with a forward of its own")
    net = nn.Sequential(Renamed(4, 4))
    assert names(net) == ["0"]
    net[0].forward = lambda input: input
    refused(ValueError, lambda: names(net), "forward of its own")
    net = tiny_net()
    handle = net[2].register_forward_hook(lambda *_: None)
    refused(ValueError, lambda: names(net), "'2' cannot be adapted: it has hooks")
    handle.remove()
    assert names(net) == ["0", "2"]


def test_an_integer_weight_is_refused():
    net = tiny_net()
    net[0].weight = nn.Parameter(torch.zeros(16, 8, dtype=torch.int8), requires_grad=False)
    refused(ValueError, lambda: names(net), "torch.int8", "floating-point")


def test_tied_weights_are_refused_and_named():
    model = tiny_llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    assert len(names(model)) == 14
    refused(
        ValueError,
        lambda: names(model, target_modules=["lm_head"]),
        "'lm_head' cannot be adapted",
        "shares its weight with 'model.embed_tokens'",
    )


@pytest.mark.parametrize(
    ("fields", "fragment"),
    [
        ({"target_modules": ["q_proj", "v_prjo"]}, "target_modules entry 'v_prjo'"),
        ({"rank_pattern": {"qproj": 4}}, "rank_pattern key 'qproj'"),
        ({"alpha_pattern": {"lm_head": 4}}, "alpha_pattern key 'lm_head'"),
    ],
)
def test_an_entry_that_selects_nothing_is_warned_about(fields, fragment):
    with pytest.warns(UserWarning, match="selects no module") as caught:
        names(tiny_llama(), **fields)
    assert fragment in str(caught[0].message)


def test_saved_modules_match_at_a_dot_and_must_exist():
    model = tiny_llama()
    assert list(saved_modules(model, LoRSConfig(modules_to_save=["norm", "lm_head"]))) == ["model.norm", "lm_head"]
    assert saved_modules(model, LoRSConfig()) == {}
    refused(ValueError, lambda: saved_modules(model, LoRSConfig(modules_to_save=["head"])), "'head'", "'lm_head'")


def test_selection_changes_nothing():
    model = tiny_llama()
    before = snapshot(model)
    names(model)
    assert_unchanged(model, before)


def test_peft_models_are_refused_by_what_would_take_their_adapters_for_the_model():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules="all-linear"))
    before = snapshot(model)
    for call in (
        lambda: get_lors_model(model),
        lambda: estimate_gradients(model, [batch()]),
        lambda: prune(model, method="magnitude"),
        lambda: measure_sparsity(model),
    ):
        refused(ValueError, call, "has adapters of PEFT", "lors_cuda.peft")
    for call in (lambda: save_adapter(model, "nowhere"), lambda: merge_and_unload(model)):
        refused(ValueError, call, "It is a PEFT model: use PEFT's own save_pretrained")
    assert_unchanged(model, before)
