# SPDX-License-Identifier: Apache-2.0
"""The selection of modules, PEFT itself being the oracle where it is installed, and that it is made once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lors_cuda import estimate_gradients, get_lors_model, merge_and_unload, named_lors_layers, save_adapter
from lors_cuda.config import LoRSConfig
from lors_cuda.pruning import measure_sparsity, prune
from lors_cuda.targets import find_targets, output_heads, saved_modules
from models import assert_unchanged, batch, refused, searched_models, snapshot, tiny_llama, tiny_net

Q_PROJ = "model.layers.0.self_attn.q_proj"


def names(model: nn.Module, **fields) -> list[str]:
    return [target.name for target in find_targets(model, LoRSConfig(**{"r": 2, **fields}))]


def test_a_field_reassigned_to_nonsense_is_found_on_use():
    config = LoRSConfig()
    config.r = 0
    refused(ValueError, lambda: find_targets(tiny_net(), config), "r must be an integer of at least 1")


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
        (
            nn.Sequential(nn.TransformerEncoderLayer(8, 2)),
            {"target_modules": ["linear1"]},
            "TransformerEncoderLayer.forward",
        ),
        (nn.Sequential(nn.LazyLinear(4)), {}, "no shape yet"),
        (nn.Sequential(nn.Linear(4, 4, device="meta")), {}, "meta device"),
    ],
)
def test_what_cannot_be_adapted_is_named(model, fields, fragment):
    refused(ValueError, lambda: names(model, **fields), fragment)


def left_out(model: nn.Module, kept: list[str], *fragments: str, **fields) -> str:
    """ "all-linear" must select `kept` alone, with one warning about the others that holds every fragment."""
    with pytest.warns(UserWarning, match="target_modules='all-linear' leaves out") as caught:
        assert names(model, **fields) == kept
    assert len(caught) == 1
    text = str(caught[0].message)
    for fragment in fragments:
        assert fragment in text, f"{fragment!r} is missing in: {text}"
    return text


def test_a_pruned_or_parametrized_linear_must_be_made_permanent():
    from torch.nn.utils import parametrizations, prune

    net = tiny_net()
    prune.l1_unstructured(net[0], "weight", 0.5)
    left_out(net, ["2"], "'0': computes its weight", "torch.nn.utils.prune.remove")
    refused(
        ValueError, lambda: names(net, target_modules=["0"]), "'0' cannot be adapted", "torch.nn.utils.prune.remove"
    )
    prune.remove(net[0], "weight")
    assert names(net) == ["0", "2"]
    parametrizations.orthogonal(net[2])
    left_out(net, ["0"], "'2': computes its weight", "remove_parametrizations")


def test_a_linear_with_a_forward_or_hooks_of_its_own_is_refused():
    class Scaled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    class Noisy(nn.Linear):
        def forward(self, input):
            return super().forward(input) + (0.1 if self.training else 0.0)

    class Router(nn.Linear):
        def forward(self, input):
            return super().forward(input).softmax(-1), None

    class Shifted(nn.Linear):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.shift = nn.Parameter(torch.zeros(sizes[1]))

        def forward(self, input):
            return super().forward(input) + self.shift

    for kind in (Scaled, Noisy, Router, Shifted):
        fragment = f"a {kind.__name__} with a forward of its own"
        refused(ValueError, lambda kind=kind: names(nn.Sequential(kind(4, 4))), fragment)
    net = nn.Sequential(nn.Linear(4, 4))
    net[0].forward = lambda input: input
    refused(ValueError, lambda: names(net), "forward of its own")
    net = tiny_net()
    handle = net[2].register_forward_hook(lambda *_: None)
    left_out(net, ["0"], "'2': has hooks")
    refused(ValueError, lambda: names(net, target_modules=["2"]), "'2' cannot be adapted: it has hooks")
    handle.remove()
    assert names(net) == ["0", "2"]


def test_a_linear_of_another_class_with_the_same_product_is_adapted():
    class Renamed(nn.Linear):
        pass

    class Handed(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    class Unfused(nn.Linear):
        def forward(self, x):
            product = x @ self.weight.T
            return product if self.bias is None else product + self.bias

    for kind in (Renamed, Handed, Unfused):
        for bias in (True, False):
            net = nn.Sequential(kind(4, 4, bias=bias).double())
            x = torch.randn(3, 4, dtype=torch.float64)
            expected = net(x)
            assert names(net) == ["0"]
            torch.testing.assert_close(get_lors_model(net, LoRSConfig(r=2))(x), expected)


def test_all_linear_lists_what_it_leaves_out_once_with_reasons_and_the_share_of_the_weights():
    model = nn.ModuleDict({
        "big": nn.Linear(16, 16), "gate": nn.Linear(16, 1), "second_gate": nn.Linear(16, 1), "fp8": nn.Linear(8, 4),
        "head": nn.Linear(16, 2),
    })  # fmt: skip
    model["fp8"].weight = nn.Parameter(torch.zeros(4, 8).to(torch.float8_e4m3fn), requires_grad=False)
    text = left_out(
        model, ["big"], "leaves out 3 of 4 linears, 20.0% of their weights",
        "'gate', 'second_gate': r is 2; for a layer of 1 x 16",
        "'fp8': has a weight of dtype torch.float8_e4m3fn", exclude_modules=["head"],
    )  # fmt: skip
    assert "head" not in text, "what the caller excluded is no news"
    assert names(model, exclude_modules=["head", "fp8"], rank_pattern={".*gate": 1}) == ["big", "gate", "second_gate"]
    refused(ValueError, lambda: names(model, target_modules=["big", "fp8"]), "'fp8' cannot be adapted")
    with pytest.warns(UserWarning, match="leaves out 4 of 5"):
        get_lors_model(model, LoRSConfig(r=16))
    assert [name for name, _ in named_lors_layers(model)] == ["big"]


def test_all_linear_with_nothing_left_gives_the_reasons():
    net = tiny_net().to(torch.float8_e4m3fn)
    refused(ValueError, lambda: names(net), "'0', '2': has a weight of dtype", "Nothing is left to adapt")
    # A rank that no linear has, or that was asked for by name, is what is wrong.
    for fields in ({"r": 64}, {"r": 2, "rank_pattern": {"0": 64}}):
        refused(ValueError, lambda fields=fields: get_lors_model(tiny_net(), LoRSConfig(**fields)), "'0': r is 64")


def test_an_integer_weight_is_refused():
    net = tiny_net()
    net[0].weight = nn.Parameter(torch.zeros(16, 8, dtype=torch.int8), requires_grad=False)
    left_out(net, ["2"], "'0': has a weight of dtype torch.int8", "floating-point")
    refused(ValueError, lambda: names(net, target_modules=["0"]), "torch.int8", "floating-point")


def test_a_weight_that_another_tool_stores_is_left_out():
    from torch.testing._internal.two_tensor import TwoTensor

    net = tiny_net()
    weight = net[0].weight.detach()
    net[0].weight = nn.Parameter(TwoTensor(weight, weight), requires_grad=False)
    left_out(net, ["2"], "'0': has a weight of the class TwoTensor", "weight.dequantize()")


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
    ):
        refused(ValueError, call, "has adapters of PEFT", "base model")
    for call in (lambda: save_adapter(model, "nowhere"), lambda: merge_and_unload(model)):
        refused(ValueError, call, "It is a PEFT model: use PEFT's own save_pretrained")
    assert_unchanged(model, before)


def test_targets_that_were_found_are_not_searched_again(monkeypatch):
    walks = searched_models(monkeypatch)
    model, config = tiny_llama(), LoRSConfig(r=2, target_modules=["q_proj"])
    expected = estimate_gradients(model, [batch()], config=config)
    assert len(walks) == 1
    found = find_targets(model, config)
    assert [layer.name for layer in measure_sparsity(model, targets=found)] == [target.name for target in found]
    assert estimate_gradients(model, [batch()], targets=found).keys() == expected.keys()
    get_lors_model(model, config, targets=found)
    assert len(walks) == 2
    assert found == []  # the dense weights are not kept alive
    assert [name for name, _ in named_lors_layers(model)] == list(expected)
