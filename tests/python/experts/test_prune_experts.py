# SPDX-License-Identifier: Apache-2.0
"""Pruning of experts: every expert like a linear of its own, scored by the tokens that are routed to it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from expert_models import EXPERT_MODELS, experts_model, token_batch
from torch import nn

from lors_cuda import LoRSConfig, get_lors_model, merge_and_unload
from lors_cuda._expert_runs import expert_product, running_experts
from lors_cuda.experts import expert_stacks, stack_names, stack_of
from lors_cuda.pruning import SparsityPattern, measure_sparsity, prune, select_mask
from lors_cuda.sparsity import EXPERTS
from models import refused

EXPERTS_ONLY = LoRSConfig(target_parameters=["gate_up_proj", "experts.up_proj", "experts.down_proj"])


def stacks_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {path: stack_of(module, name).clone() for path, module, name in expert_stacks(model)}


def linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def calibration() -> list[dict[str, torch.Tensor]]:
    """Two batches whose last tokens are padding."""
    batches = []
    for seed in (0, 1):
        ids = token_batch(seed)
        mask = torch.ones_like(ids)
        mask[1, 5 + seed :] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def norms_by_hand(model, module, batches) -> dict[str, list[torch.Tensor | None]]:
    """Of the module's two stacks, ||X[:, k]|| of each expert; None without a token. Token by token."""
    up, down = stack_names(module)
    rows = {name: [[] for _ in range(module.num_experts)] for name in (up, down)}
    calls = []
    handle = module.register_forward_pre_hook(lambda _, args: calls.append(args))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    for batch, (hidden, index, _) in zip(batches, calls, strict=True):
        for token in batch["attention_mask"].flatten().nonzero().flatten().tolist():
            for expert in index[token].tolist():
                x = hidden[token].detach()
                z = stack_of(module, up)[expert] @ x
                if module.has_bias:
                    z = z + getattr(module, f"{up}_bias")[expert].detach()
                rows[up][expert].append(x)
                rows[down][expert].append(module._apply_gate(z[None])[0] if module.has_gate else module.act_fn(z))
    return {
        name: [torch.stack(seen).norm(dim=0).float() if seen else None for seen in of_experts]
        for name, of_experts in rows.items()
    }


@pytest.mark.parametrize("name", EXPERT_MODELS)
@pytest.mark.parametrize("pattern", ["2:4", 0.5])
def test_wanda_scores_each_expert_by_the_tokens_routed_to_it(name, pattern):
    model = experts_model(name, torch.float64, sparse=False)
    before = stacks_of(model)
    path, module, _ = next(expert_stacks(model))
    parsed = SparsityPattern.parse(pattern)
    norms = norms_by_hand(model, module, calibration())  # of the first layer with experts: nothing before it is pruned

    pruned = prune(model, pattern, batches=calibration(), config=EXPERTS_ONLY)

    assert [layer.name for layer in pruned] == list(before)
    for parameter in stack_names(module):
        weights = before[f"{path.rpartition('.')[0]}.{parameter}"]
        for expert, (weight, norm) in enumerate(zip(weights, norms[parameter], strict=True)):
            scores = weight.abs().float() * (1.0 if norm is None else norm)
            kept = select_mask(scores, parsed)
            assert torch.equal(stack_of(module, parameter)[expert], torch.where(kept, weight, 0.0)), (parameter, expert)
    for layer in pruned:
        assert layer.sparsity == 0.5, layer
    assert pruned.expert_sparsity == measure_sparsity(model).expert_sparsity == 0.5


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("pattern", ["2:4", 0.3])
def test_magnitude_prunes_an_expert_like_a_linear(name, pattern):
    model = experts_model(name, sparse=False)
    before = stacks_of(model)
    prune(model, pattern, method="magnitude", config=EXPERTS_ONLY)
    for path, after in stacks_of(model).items():
        for expert, weight in enumerate(before[path]):
            linear = nn.Sequential(nn.Linear(*reversed(weight.shape), bias=False))
            linear[0].weight = nn.Parameter(weight.clone())
            prune(linear, pattern, method="magnitude")
            assert torch.equal(after[expert], linear[0].weight), (path, expert)


def test_experts_and_linears_are_pruned_and_nothing_else():
    model = experts_model("deepseek_v3", sparse=False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruned = prune(model, "2:4", method="magnitude")
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert {key for key in before if "experts" in key} <= changed  # shared ones included
    assert not any(part in key for key in changed for part in ("embed", "lm_head", "norm", "mlp.gate.", "bias"))
    assert pruned.sparsity == pruned.expert_sparsity == 0.5
    assert "50.00% over the experts" in str(pruned)


@pytest.mark.parametrize(
    ("fields", "chosen"),
    [
        ({"exclude_modules": ["experts"]}, []),
        ({"target_modules": ["q_proj", "down_proj"]}, []),
        ({"target_parameters": ["experts.down_proj"]}, ["mlp.experts.down_proj"]),
        ({"target_modules": "all-linear"}, ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
        ({"target_modules": "all-linear", "target_parameters": ["experts.down_proj"]}, ["mlp.experts.down_proj"]),
    ],
)
def test_names_choose_stacks(fields, chosen):
    model = experts_model("mixtral", sparse=False)
    before = stacks_of(model) | {name: module.weight.detach().clone() for name, module in linears(model)}
    pruned = prune(model, "2:4", method="magnitude", config=LoRSConfig(**fields))
    changed = [path for path, stack in stacks_of(model).items() if not torch.equal(stack, before[path])]
    assert changed == [f"model.layers.{layer}.{name}" for layer in range(2) for name in chosen]
    assert [layer.name for layer in pruned if layer.kind == EXPERTS] == changed
    assert pruned.sparsity == 0.5  # of what was asked for; a stack beside it is none of that
    others = sum(not torch.equal(module.weight, before[name]) for name, module in linears(model))
    assert others == {"exclude_modules": 8, "target_modules": 2 if chosen == [] else 8}.get(next(iter(fields)), 0)
    assert pruned.expert_sparsity == {0: 0.0, 1: pytest.approx(1 / 6), 2: 0.5}[len(chosen)]


def test_experts_without_a_calibration_token_are_pruned_by_magnitude_counted_and_named():
    model = experts_model("qwen3_moe", sparse=False)
    _, module, _ = next(expert_stacks(model))
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight.zero_()  # of equal scores the router takes two experts, always the same
    weights = stack_of(module, "down_proj").clone()
    norms = norms_by_hand(model, module, calibration())["down_proj"]
    missing = [expert for expert, norm in enumerate(norms) if norm is None]
    assert len(missing) == 6
    named = f"6 of 8 of 'model.layers.0.mlp.experts.down_proj' ({', '.join(map(str, missing))})"
    with pytest.warns(UserWarning, match="routed to some experts") as caught:
        prune(model, "2:4", batches=calibration(), config=EXPERTS_ONLY)
    assert named in str(caught[0].message)
    for expert in missing:
        kept = select_mask(weights[expert].abs(), SparsityPattern.parse("2:4"))
        assert torch.equal(stack_of(module, "down_proj")[expert] != 0, kept)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda e: setattr(e, "_is_expert_parallel", True), "divided among processes"),
        (lambda e: setattr(e, "down_proj", nn.Parameter(e.down_proj.data.to(torch.float8_e4m3fn), False)), "quantized"),
        (lambda e: setattr(e, "down_proj", nn.Parameter(e.down_proj.to("meta"), False)), "no values in memory"),
    ],
)
def test_experts_that_cannot_be_pruned_are_named(make, reason):
    model = experts_model("mixtral", sparse=False)
    make(model.model.layers[1].mlp.experts)
    with pytest.warns(UserWarning, match=f"Not pruned: .*'model.layers.1.mlp.experts.down_proj'.*{reason}"):
        pruned = prune(model, "2:4", method="magnitude")
    assert "model.layers.0.mlp.experts.down_proj" in [layer.name for layer in pruned]
    assert "model.layers.1.mlp.experts.down_proj" not in [layer.name for layer in pruned]


def test_a_router_that_is_a_linear_stays_dense_unless_it_is_named():
    model = experts_model("mixtral", sparse=False)
    gate = model.model.layers[0].mlp.gate = nn.Linear(32, 4, bias=False)
    pruned = prune(model, "2:4", method="magnitude")
    assert bool((gate.weight != 0).all())
    name = "model.layers.0.mlp.gate"
    assert name not in [layer.name for layer in pruned]
    assert name not in [layer.name for layer in measure_sparsity(model)]
    assert [layer.sparsity for layer in pruned.rest if layer.name == name] == [0.0]
    only = prune(model, "2:4", method="magnitude", config=LoRSConfig(target_modules=["mlp.gate"]))
    assert [layer.name for layer in only] == [name]
    assert int((gate.weight != 0).sum()) == 64


def test_weights_and_inputs_that_are_not_finite_are_refused():
    model = experts_model("mixtral", sparse=False)
    before = stacks_of(model)
    stack_of(model.model.layers[1].mlp.experts, "down_proj")[2, 3, 4] = torch.nan
    refused(
        ValueError, lambda: prune(model, method="magnitude"), "layers.1.mlp.experts.down_proj", "nothing was pruned"
    )
    first = "model.layers.0.mlp.experts.down_proj"
    assert torch.equal(stacks_of(model)[first], before[first])

    model = experts_model("mixtral", sparse=False)
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight[0] = torch.inf
    own = {module: vars(module).get("forward") for _, module, _ in expert_stacks(model)}
    refused(
        ValueError,
        lambda: prune(model, batches=calibration(), config=EXPERTS_ONLY),
        "inputs of 'model.layers.0.mlp.experts.gate_up_proj'",
        "NaN or infinity",
    )
    assert own == {module: vars(module).get("forward") for _, module, _ in expert_stacks(model)}


@pytest.mark.parametrize("name", EXPERT_MODELS)
def test_experts_run_one_by_one_compute_what_they_did(name):
    """Also for a row of no expert, as some families route it, and beside a forward of somebody else."""
    model = experts_model(name, torch.float64)
    ids = token_batch()
    _, module, _ = next(expert_stacks(model))
    calls: list[Any] = []
    handle = module.register_forward_pre_hook(lambda _, args: calls.append(args))
    with torch.no_grad():
        model(input_ids=ids)
        handle.remove()
        hidden, index, weights = calls.pop()
        given = (hidden, index, weights.double())  # nemotron_h adds up in the dtype of these
        if name not in ("gpt_oss", "nemotron_h"):  # whose eager code knows no such row
            index[0, 0] = module.num_experts
        expected = module(*given)
        own = module.forward
        vars(module)["forward"] = own

        def product(stack, expert, input, tokens, total):
            calls.append((stack, expert))
            assert total == ids.numel()
            return expert_product(module, stack, expert, input)

        with running_experts(module, product):
            actual = module(*given)
        again = module(*given)
    assert {stack for stack, _ in calls} == set(stack_names(module))
    assert torch.equal(again, expected)
    assert vars(module)["forward"] is own
    assert (actual - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("name", EXPERT_MODELS)
def test_a_converted_model_measures_as_before_and_after(name):
    model = experts_model(name)
    before = measure_sparsity(model)
    linears = measure_sparsity(model, LoRSConfig(exclude_modules=["experts"]))
    assert len(linears) < len(before)
    get_lors_model(model, LoRSConfig(r=2))
    assert measure_sparsity(model) == before
    assert measure_sparsity(model, LoRSConfig(exclude_modules=["experts"])) == linears
    merge_and_unload(model)
    assert measure_sparsity(model) == before
    assert before.expert_sparsity == 0.5


@pytest.mark.filterwarnings("ignore:The experts")
@pytest.mark.parametrize("fields", [{}, {"target_parameters": ["down_proj"]}, {"exclude_modules": ["experts"]}])
def test_the_callback_reports_the_experts_whether_they_are_adapted_or_not(fields):
    transformers = pytest.importorskip("transformers")
    from lors_cuda.hf import SparsityCallback

    model = experts_model("qwen3_moe")
    stack_of(model.model.layers[0].mlp.experts, "gate_up_proj")[:, 0] = 1.0  # two zeros of four less in these rows
    before = measure_sparsity(model)
    get_lors_model(model, LoRSConfig(r=2, **fields))
    callback, state, control = SparsityCallback(), transformers.TrainerState(), transformers.TrainerControl()
    callback.on_train_begin(None, state, control, model=model)
    callback.on_train_end(None, state, control, model=model)
    metrics = callback.take_metrics()
    assert metrics["expert_sparsity"] == before.expert_sparsity < 0.5
    assert metrics["model_sparsity"] == before.model_sparsity
    # Of the layers that are stored sparse; of a pair of stacks both are.
    stored = {"target_parameters": before.expert_sparsity, "exclude_modules": 0.5}
    assert metrics["sparsity"] == stored.get(next(iter(fields), ""), before.sparsity)
