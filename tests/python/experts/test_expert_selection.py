# SPDX-License-Identifier: Apache-2.0
"""Which experts a configuration adapts, and what is refused, in sentences, with nothing changed."""

from __future__ import annotations

import warnings

import pytest
import torch
from expert_models import EXPERT_MODELS, experts_model
from torch import nn

from families import family
from lors_cuda import LoRSConfig, LoRSLinear, get_lors_model, named_lors_layers
from lors_cuda.experts import LoRSExpertWeight, expert_stacks
from lors_cuda.methods import get_method
from lors_cuda.targets import find_targets
from models import assert_unchanged, refused, snapshot

FIRST = "model.layers.0.mlp.experts"


def selected(model: nn.Module, **fields) -> list[str]:
    return [target.name for target in find_targets(model, LoRSConfig(r=2, **fields))]


@pytest.mark.parametrize("name", EXPERT_MODELS)
def test_all_linear_is_the_experts_too_and_never_their_router(name):
    model = experts_model(name)
    linears = [key for key, module in model.named_modules() if isinstance(module, nn.Linear) and key != "lm_head"]
    stacks = [path for path, _, _ in expert_stacks(model)]

    names = selected(model)

    assert sorted(names) == sorted(linears + stacks)
    assert not any(part in key.split(".") for key in names for part in ("gate", "router"))


def test_a_router_that_is_a_linear_is_not_adapted():
    model = experts_model("mixtral")
    model.model.layers[0].mlp.gate = nn.Linear(32, 4, bias=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that a router is left out is no news
        assert "model.layers.0.mlp.gate" not in selected(model)
    refused(
        ValueError,
        lambda: selected(model, target_modules=["q_proj", "mlp.gate"]),
        f"'model.layers.0.mlp.gate' cannot be adapted: it is the router of '{FIRST}'",
        "modules_to_save",
    )
    assert "model.layers.0.mlp.gate" not in selected(model, modules_to_save=["mlp.gate"])


def test_lists_of_linears_leave_experts_out_with_a_warning():
    model = experts_model("mixtral")
    with pytest.warns(UserWarning, match=r"The experts .*layers.0.mlp.experts.*get no adapters.* 77.8% of the model"):
        get_lors_model(model, LoRSConfig(r=2, target_modules=["q_proj"]))
    assert all(type(layer) is LoRSLinear for _, layer in named_lors_layers(model))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"exclude_modules": ["experts"]}, []),
        ({"exclude_modules": ["gate_up_proj"]}, ["0.down_proj", "1.down_proj"]),
        ({"exclude_modules": r".*layers\.0\..*"}, ["1.gate_up_proj", "1.down_proj"]),
        ({"modules_to_save": ["layers.1.mlp"]}, ["0.gate_up_proj", "0.down_proj"]),
        ({"target_parameters": ["experts.down_proj"]}, ["0.down_proj", "1.down_proj"]),
        ({"target_parameters": [f"{FIRST}.down_proj"], "target_modules": ["q_proj"]}, ["0.down_proj"]),
        ({"target_parameters": ["1.mlp.experts.gate_up_proj"], "target_modules": "all-linear"}, ["1.gate_up_proj"]),
    ],
)  # fmt: skip
def test_names_choose_stacks(fields, expected):
    names = [name for name in selected(experts_model("mixtral"), **fields) if "experts" in name]
    assert names == [f"model.layers.{name[0]}.mlp.experts{name[1:]}" for name in expected]


def test_parameters_alone_adapt_no_linear_as_in_peft():
    config = LoRSConfig(r=2, target_parameters=["experts.down_proj"])
    assert config.target_modules == []
    assert LoRSConfig.from_dict(config.to_dict()) == config
    assert all("experts" in name for name in selected(experts_model("mixtral"), target_parameters=["down_proj"]))


def test_patterns_are_of_the_parameters_path():
    config = LoRSConfig(
        r=4, rank_pattern={r"layers\.1\.mlp\.experts\.down_proj": 2}, alpha_pattern={"experts.gate_up_proj": 3}
    )
    model = get_lors_model(experts_model("mixtral"), config)
    layers = {n: layer for n, layer in named_lors_layers(model) if isinstance(layer, LoRSExpertWeight)}
    assert [layer.r for layer in layers.values()] == [4, 4, 4, 2]
    assert [layer.lora_alpha for layer in layers.values()] == [3, 16, 3, 16]
    assert layers["model.layers.1.mlp.experts.down_proj"].lora_A.shape == (4, 2, 48)


def test_all_linear_leaves_out_stacks_that_are_too_small_for_the_rank():
    with pytest.warns(
        UserWarning, match=r"leaves out 6 of 12 linears and stacks of experts.*experts.down_proj.*32 x 16 the rank"
    ):
        layers = dict(named_lors_layers(get_lors_model(small := experts_model("qwen3_moe"), LoRSConfig(r=20))))
    assert f"{FIRST}.gate_up_proj" in layers
    assert f"{FIRST}.down_proj" not in layers
    assert small.model.layers[0].mlp.experts.down_proj.num_experts == 8  # stored sparse, frozen


REFUSED = {
    "former name": ({"target_parameters": ["experts.0.w1"]}, ("What was w1 is in gate_up_proj", FIRST)),
    "typing error": ({"target_parameters": ["experts.down_prj"]}, ("is no parameter of MixtralForCausalLM", FIRST)),
    "router": ({"target_parameters": ["mlp.gate.weight"]}, ("a parameter of a MixtralTopKRouter", "use_experts")),
    "linear": ({"target_parameters": ["q_proj.weight"]}, ("linears by target_modules",)),
    "module": ({"target_modules": ["q_proj", "experts"]}, ("MixtralExperts, not one weight", "target_parameters=")),
    "former modules": ({"target_modules": ["w1", "w2"]}, ("matches no nn.Linear", "target_parameters=")),
    "excluded": (
        {"target_parameters": ["down_proj"], "exclude_modules": ["experts"]},
        ("target_parameters=['down_proj']", "nothing is left"),
    ),
    "rank": ({"rank_pattern": {"experts.down_proj": 33}}, ("r is 33; for a layer of 32 x 48",)),
    "rounding": (
        {"rounding": "stochastic"},
        ("'stochastic' is not supported for experts: ", f"'{FIRST}.gate_up_proj'"),
    ),
    "requantize": ({"requantize": True}, ("requantize=True needs a quantised weight",)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_and_nothing_is_changed(case):
    fields, fragments = REFUSED[case]
    model = experts_model("mixtral")
    before = snapshot(model)
    refused(ValueError, lambda: get_lors_model(model, LoRSConfig(**{"r": 4, **fields})), *fragments)
    assert_unchanged(model, before)


def test_a_stack_that_does_not_fit_the_layout_is_refused_by_name():
    model = experts_model("gpt_oss")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2] = 1.0
    before = snapshot(model)
    path = "model.layers.1.mlp.experts.down_proj"
    refused(ValueError, lambda: get_lors_model(model, LoRSConfig(r=4, layout="2:4")), f"'{path}': ")
    assert_unchanged(model, before)


@pytest.mark.parametrize(("name", "parameter"), [("llama4", "down_proj"), ("dbrx", "w1"), ("jetmoe", "weight")])
def test_families_whose_experts_are_of_other_classes_are_named(name, parameter):
    model, _ = family(name)
    key = next(key for key, value in model.named_parameters() if value.dim() > 1 and key.endswith(parameter))
    if name == "jetmoe":
        key = "mlp.input_linear.weight"
    refused(
        ValueError,
        lambda: selected(model, target_parameters=[key]),
        "target_parameters names",
        "use_experts_implementation",
        f"{type(model).__name__} has none",
    )
    with pytest.warns(UserWarning, match=r"The experts .*get no adapters and stay as they are"):
        get_lors_model(model, LoRSConfig(r=2))


PROBLEMS = {
    "expert parallel": (lambda experts: setattr(experts, "_is_expert_parallel", True), "expert parallelism"),
    "hooks": (lambda experts: experts.register_forward_hook(lambda *_: None), "has hooks, which would be lost"),
    "own forward": (lambda experts: setattr(experts, "forward", lambda *_: None), "a forward of its own"),
    "more tensors": (lambda experts: experts.register_buffer("extra", torch.ones(2)), "('extra')"),
    "quantised": (
        lambda experts: setattr(
            experts, "down_proj", nn.Parameter(experts.down_proj.detach().to(torch.float8_e4m3fn), requires_grad=False)
        ),
        "quantised (torch.float8_e4m3fn)",
    ),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_experts_that_cannot_be_replaced_are_named_or_left_out_with_a_warning(case):
    break_it, fragment = PROBLEMS[case]
    model = experts_model("mixtral")
    break_it(model.model.layers[0].mlp.experts)
    named = {"target_parameters": [f"{FIRST}.down_proj"]}
    refused(ValueError, lambda: selected(model, **named), f"'{FIRST}.down_proj' cannot be adapted", fragment)
    with pytest.warns(UserWarning, match="leaves out . of 12 linears and stacks of experts"):
        left = selected(model)
    assert f"{FIRST}.down_proj" not in left
    assert "model.layers.1.mlp.experts.down_proj" in left


def test_experts_without_a_model_around_them_are_refused():
    experts = experts_model("mixtral").model.layers[0].mlp.experts
    before = snapshot(experts)
    refused(ValueError, lambda: get_lors_model(experts), "The model is itself a MixtralExperts", "LoRSExperts")
    assert_unchanged(experts, before)


def test_shared_stacks_are_refused():
    model = experts_model("mixtral")
    first, second = (model.model.layers[i].mlp.experts for i in (0, 1))
    second.down_proj = first.down_proj
    refused(
        ValueError,
        lambda: selected(model, target_parameters=[f"{FIRST}.down_proj"]),
        "shares its weight with",
        "layers.1",
    )


def test_shared_experts_stay_one_module():
    model = experts_model("mixtral")
    model.model.layers[1].mlp.experts = model.model.layers[0].mlp.experts
    get_lors_model(model, LoRSConfig(r=2))
    assert model.model.layers[1].mlp.experts is model.model.layers[0].mlp.experts
    assert sum(isinstance(layer, LoRSExpertWeight) for _, layer in named_lors_layers(model)) == 2


def test_a_conversion_that_fails_halfway_puts_the_experts_back(monkeypatch):
    model = experts_model("gpt_oss")
    model.model.layers[0].mlp.experts.down_proj.requires_grad_(False)
    before = snapshot(model)
    made = []
    original = LoRSExpertWeight.__init__

    def third_fails(self, *args, **kwargs):
        if len(made) == 3:
            raise MemoryError("no memory")
        made.append(self)
        original(self, *args, **kwargs)

    monkeypatch.setattr(LoRSExpertWeight, "__init__", third_fails)
    with pytest.raises(MemoryError):
        get_lors_model(model, LoRSConfig(r=2))
    assert_unchanged(model, before)


def test_methods_refuse_adapted_experts():
    model = get_lors_model(experts_model("mixtral"), LoRSConfig(r=2))
    refused(
        ValueError,
        lambda: get_method("mora").start(model),
        f"'{FIRST}.gate_up_proj' has adapters of experts",
        "exclude_modules=['experts']",
    )
