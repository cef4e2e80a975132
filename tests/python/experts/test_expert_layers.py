# SPDX-License-Identifier: Apache-2.0
# The oracle is transformers' own eager experts in float64, their stacks computed as W + s M o (B A) by a
# parametrisation, under autograd; for the paper's gradients, their formulas over what each expert saw.
"""LoRSExperts in whole models: the same numbers as transformers', merged and unmerged, and everything around them."""

from __future__ import annotations

import contextlib
import copy
import pickle
import warnings
import weakref

import pytest
import torch
from expert_models import EXPERT_MODELS, experts_model, loss_of, token_batch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lors_cuda import (
    LoRSConfig,
    disable_adapter,
    get_lors_model,
    merge_and_unload,
    merge_cache,
    named_lors_layers,
    prefetch,
)
from lors_cuda.experts import (
    LoRSExperts,
    LoRSExpertWeight,
    SparseExpertWeight,
    expert_stacks,
    run_experts,
    stack_names,
    stack_of,
)
from models import fill_adapters, refused

every_model = pytest.mark.parametrize("name", EXPERT_MODELS)
CONFIG = {"r": 3, "lora_alpha": 6}
EXACT = {"rtol": 1e-10, "atol": 1e-12}  # of float64, over a whole model


def converted(name: str, dtype: torch.dtype = torch.float32, **fields) -> nn.Module:
    model = get_lors_model(experts_model(name, dtype), LoRSConfig(**{**CONFIG, **fields}))
    fill_adapters(model, size=0.2)
    return model


def stacks(model: nn.Module) -> dict[str, LoRSExpertWeight]:
    return {name: layer for name, layer in named_lors_layers(model) if isinstance(layer, LoRSExpertWeight)}


class Adapted(nn.Module):
    """W + s M o (B A) of a stack, as the family keeps it."""

    def __init__(self, layer: LoRSExpertWeight, stack: Tensor, transposed: bool) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(layer.lora_A.detach().clone())
        self.lora_B = nn.Parameter(layer.lora_B.detach().clone())
        self.scaling, self.mask, self.transposed = layer.scaling, stack != 0, transposed

    def forward(self, weight: Tensor) -> Tensor:
        delta = self.scaling * self.mask * (self.lora_B @ self.lora_A)
        return weight + (delta.transpose(1, 2) if self.transposed else delta)


def oracle(name: str, model: nn.Module) -> tuple[nn.Module, dict[str, Adapted]]:
    """The same model under autograd: linears merged, experts by transformers' own code with computed stacks."""
    plain, adapted = experts_model(name, torch.float64), {}
    if name == "nemotron_h":  # whose eager code sums in the router's float32
        plain.set_experts_implementation("batched_mm")
    layers = dict(named_lors_layers(model))
    for path, module, parameter in list(expert_stacks(plain)):
        layer = layers.pop(path)
        adapted[path] = Adapted(layer, stack_of(module, parameter), module.is_transposed)
        parametrize.register_parametrization(module, parameter, adapted[path], unsafe=True)
    for path, layer in layers.items():
        plain.get_submodule(path).weight.data = layer.merge().weight.data
    return plain, adapted


def follow(model: nn.Module) -> dict[str, nn.Parameter]:
    """Let the embedding and the routers learn too; their gradients show that those of the layers' input are right."""
    named = {}
    for key, parameter in model.named_parameters():
        if key.endswith(("embed_tokens.weight", "embeddings.weight", "gate.weight", "router.weight")):
            named[key] = parameter.requires_grad_(True)
    assert len(named) > 1
    return named


# ---- what they compute ----


@every_model
def test_the_output_and_the_exact_gradients_are_those_of_transformers_experts(name):
    model = converted(name, torch.float64, gradient="exact")
    plain, adapted = oracle(name, model)
    others, expected = follow(model), follow(plain)
    ids = token_batch()

    ours, theirs = loss_of(model, ids), loss_of(plain, ids)
    ours.backward()
    theirs.backward()

    torch.testing.assert_close(ours, theirs, **EXACT)
    assert set(stacks(model)) == set(adapted)
    for path, layer in stacks(model).items():
        assert layer.lora_A.grad.count_nonzero() > 0
        torch.testing.assert_close(layer.lora_A.grad, adapted[path].lora_A.grad, **EXACT)
        torch.testing.assert_close(layer.lora_B.grad, adapted[path].lora_B.grad, **EXACT)
    for key, parameter in others.items():
        if expected[key].grad is not None:
            torch.testing.assert_close(parameter.grad, expected[key].grad, **EXACT)


@every_model
def test_the_papers_gradients_are_its_formulas_over_the_rows_of_each_expert(name):
    model = converted(name, torch.float64, gradient="lors")
    plain, _ = oracle(name, model)
    seen = {path: watch(module, path) for path, module in dict(modules_of(plain)).items()}
    ids = token_batch()
    loss_of(model, ids).backward()
    loss_of(plain, ids).backward()

    compared = 0
    for path, layer in stacks(model).items():
        products = seen[path.rpartition(".")[0]][path.rpartition(".")[2]]
        for expert in range(layer.num_experts):
            A, B = layer.lora_A[expert].detach(), layer.lora_B[expert].detach()
            X, Y = products[expert]
            dY = Y.grad if len(Y) else Y
            dB = layer.scaling * dY.T @ (X @ A.T)
            dA = layer.scaling * (dY @ B).T @ X
            torch.testing.assert_close(layer.lora_A.grad[expert], dA, **EXACT)
            torch.testing.assert_close(layer.lora_B.grad[expert], dB, **EXACT)
            compared += len(X)
    rows = ids.numel() * sum(2 for _ in stacks(model))  # two experts for each token
    assert compared == rows


def modules_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(path.rpartition(".")[0], module) for path, module, _ in expert_stacks_or_computed(model)]


def expert_stacks_or_computed(model: nn.Module):
    """`expert_stacks`, also where the stacks are computed."""
    for path, module in model.named_modules():
        if hasattr(module, "_apply_gate") and hasattr(module, "num_experts"):
            for name in stack_names(module):
                yield f"{path}.{name}", module, name


def watch(module: nn.Module, path: str) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Run transformers' module by run_experts with plain products, and keep what each expert saw and gave."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def product(name: str, states: Tensor, offsets: Tensor) -> Tensor:
        stack, bias = getattr(module, name), getattr(module, f"{name}_bias", None)
        results, first = [], 0
        seen[name] = []
        for expert, end in enumerate(offsets.tolist()):
            X = states[first:end]
            Y = X @ (stack[expert] if module.is_transposed else stack[expert].T)
            Y = Y if bias is None else Y + bias[expert]
            if len(Y):
                Y.retain_grad()
            seen[name].append((X.detach(), Y))
            results.append(Y)
            first = end
        return torch.cat(results)

    up, down = stack_names(module)

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return run_experts(
            module,
            lambda states, offsets, rows: product(up, states[rows.long()], offsets),
            lambda states, offsets: product(down, states, offsets),
            hidden_states,
            top_k_index,
            top_k_weights,
        )

    module.forward = forward
    return seen


def test_an_index_beyond_the_experts_means_none():
    model = converted("mixtral", torch.float64)
    experts = model.model.layers[0].mlp.experts
    states = torch.randn(5, 32, dtype=torch.float64)
    index = torch.tensor([[0, 1], [4, 2], [4, 4], [3, 0], [1, 4]])
    weights = torch.rand(5, 2, dtype=torch.float64)

    result = experts(states, index, weights)

    without = experts(states, index % 4, weights * (index < 4))
    torch.testing.assert_close(result, without, **EXACT)
    assert result[2].count_nonzero() == 0


def test_an_expert_without_rows_is_not_read_and_its_gradient_is_zero():
    model = converted("qwen3_moe")
    experts = model.model.layers[0].mlp.experts
    states = torch.randn(6, 32)
    index = torch.tensor([[1, 5], [5, 1], [1, 2], [2, 5], [1, 5], [2, 1]])
    weights = torch.rand(6, 2)
    expected = experts(states, index, weights)
    idle = [0, 3, 4, 6, 7]
    with torch.no_grad():
        experts.down_proj.lora_A[idle] = torch.nan
        experts.gate_up_proj.lora_B[idle] = torch.inf

    result = experts(states, index, weights)
    result.sum().backward()

    assert torch.equal(result, expected)
    for layer in (experts.gate_up_proj, experts.down_proj):
        for factor in (layer.lora_A, layer.lora_B):
            assert factor.grad[idle].count_nonzero() == 0
            assert factor.grad[[1, 2, 5]].flatten(1).count_nonzero(1).min() > 0


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_autocast_computes_what_the_merged_model_does(name):
    model, ids = converted(name), token_batch()
    merged = merge_and_unload(copy.deepcopy(model))
    merged.set_experts_implementation("grouped_mm")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        ours, theirs = model(input_ids=ids).logits, merged(input_ids=ids).logits
    # The same values, rounded to bfloat16, summed in another order, in two layers.
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=4e-2)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(reentrant):
    models = [converted("gpt_oss").train() for _ in range(2)]
    models[1].gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    models[1].enable_input_require_grads()
    for model in models:
        loss_of(model, token_batch()).backward()
    for path, layer in stacks(models[0]).items():
        assert torch.equal(layer.lora_B.grad, stacks(models[1])[path].lora_B.grad), path


def test_it_compiles_into_one_graph_for_any_routing():
    experts = converted("mixtral").model.layers[0].mlp.experts
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):  # the second without another compilation, whatever the routing
        states = torch.randn(7, 32, generator=generator)
        index = torch.rand(7, 4, generator=generator).topk(2).indices
        weights = torch.rand(7, 2, generator=generator)
        with torch._dynamo.config.patch(error_on_recompile=True) if _ else contextlib.nullcontext():
            result = compiled(states, index, weights)
        torch.testing.assert_close(result, experts(states, index, weights))
        result.sum().backward()
        assert experts.down_proj.lora_A.grad.count_nonzero() > 0


# ---- merging ----


@every_model
def test_merged_and_reloaded_the_files_are_the_familys_own(name, tmp_path):
    model, plain = converted(name), experts_model(name)
    masks = {path: stack_of(module, key) != 0 for path, module, key in expert_stacks(plain)}
    ids = token_batch()
    with torch.no_grad():
        adapted = model(input_ids=ids)[0]

    merged = merge_and_unload(model)

    assert type(merged) is type(plain)
    assert [type(module) for module in merged.modules()] == [type(module) for module in plain.modules()]
    assert list(merged.state_dict()) == list(plain.state_dict())
    assert not any(parameter.requires_grad for parameter in merged.parameters())
    for path, module, key in expert_stacks(merged):
        stack = stack_of(module, key)
        assert stack[~masks[path]].count_nonzero() == 0
        assert not torch.equal(stack, stack_of(plain.get_submodule(path.rpartition(".")[0]), key))
        assert getattr(module, key).is_contiguous()
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids)[0], adapted, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    plain.save_pretrained(tmp_path / "plain")
    assert saved_names(tmp_path / "merged") == saved_names(tmp_path / "plain")
    again = type(plain).from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for key, value in again.state_dict().items():
        assert torch.equal(value, merged.state_dict()[key]), key


def saved_names(directory) -> list[str]:
    from safetensors import safe_open

    with safe_open(directory / "model.safetensors", "pt") as file:
        return sorted(file.keys())


@pytest.mark.parametrize("layout", ["dense", "2:4", "bitmap"])
def test_each_layout_merges_to_the_same_weights(layout):
    one, other = converted("gpt_oss", layout=layout), converted("gpt_oss", layout="dense")
    assert {layer.sparse_weight.layout for layer in stacks(one).values()} == {layout}
    expected = merge_and_unload(other).state_dict()
    for key, value in merge_and_unload(one).state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_merging_refuses_what_is_not_finite_by_name_and_changes_nothing():
    model = converted("mixtral")
    layer = stacks(model)["model.layers.1.mlp.experts.down_proj"]
    with torch.no_grad():
        layer.lora_B[2, 5, 1] = torch.inf
    refused(
        ValueError,
        lambda: merge_and_unload(model),
        "'model.layers.1.mlp.experts.down_proj': lora_B[2, 5, 1] is inf",
        "Nothing was merged",
    )
    assert isinstance(model.model.layers[0].mlp.experts, LoRSExperts)
    with torch.no_grad():
        layer.lora_B[2, 5, 1] = 3e38
        layer.lora_A[2, 1] = 3e38
    message = refused(ValueError, lambda: merge_and_unload(model), "merged[2, 5, ", "beyond the range")
    assert "from the adapter" in message


def test_merging_lets_each_layer_go_before_the_next(monkeypatch):
    from lors_cuda import model as module

    model = converted("mixtral")
    layers = [weakref.ref(layer) for _, layer in named_lors_layers(model)]
    alive = []
    replace = module._replace
    monkeypatch.setattr(
        module, "_replace", lambda *args: (replace(*args), alive.append(sum(ref() is not None for ref in layers)))
    )
    merge_and_unload(model)
    assert alive[0] >= 11
    assert alive[-1] <= 3  # the experts that are being replaced
    assert alive == sorted(alive, reverse=True)


def test_experts_alone_merge_themselves():
    experts = get_lors_model(nn.Sequential(experts_model("mixtral").model.layers[0].mlp.experts), LoRSConfig(**CONFIG))[
        0
    ]
    refused(ValueError, lambda: merge_and_unload(experts), "The model is itself a LoRSExperts", "call its merge()")
    plain = experts.merge()
    assert type(plain).__name__ == "MixtralExperts"
    assert torch.equal(plain.down_proj, experts_model("mixtral").model.layers[0].mlp.experts.down_proj)


def test_the_cache_gives_the_same_and_follows_the_optimizer():
    model, ids = converted("gpt_oss"), token_batch()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    before = loss_of(model, ids)
    before.backward()
    with merge_cache(model):
        torch.testing.assert_close(loss_of(model, ids), before)
        assert all(layer.merged_weight.nbytes > 0 for layer in stacks(model).values())
        with torch.no_grad():
            torch.testing.assert_close(loss_of(model, ids), before)
        optimizer.step()
        after = loss_of(model, ids)
    assert (after - before).abs() > 1e-3
    torch.testing.assert_close(loss_of(model, ids), after)


def test_prefetch_leaves_experts_to_merge_for_themselves():
    model, ids = converted("mixtral"), token_batch()
    expected = loss_of(model, ids)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lors_cuda.prefetch has no effect")
        with prefetch(model):
            assert all(layer.merged_weight is None for layer in stacks(model).values())
            torch.testing.assert_close(loss_of(model, ids), expected)


@every_model
def test_disabled_they_are_the_sparse_experts(name):
    model, plain, ids = converted(name), experts_model(name), token_batch()
    assert (loss_of(model, ids) - loss_of(plain, ids)).abs() > 1e-4
    with disable_adapter(model):
        torch.testing.assert_close(loss_of(model, ids), loss_of(plain, ids))


# ---- the module ----


def test_one_stack_alone_is_adapted_and_the_other_stays_frozen():
    path = "model.layers.1.mlp.experts.down_proj"
    model = get_lors_model(experts_model("gpt_oss", torch.float64), LoRSConfig(**CONFIG, target_parameters=[path]))
    fill_adapters(model)
    experts = model.model.layers[1].mlp.experts
    assert isinstance(experts.gate_up_proj, SparseExpertWeight)
    assert [name for name, _ in named_lors_layers(model)] == [path]
    merged = merge_and_unload(copy.deepcopy(model))
    ids = token_batch()
    torch.testing.assert_close(loss_of(model, ids), loss_of(merged, ids), **EXACT)
    plain = experts_model("gpt_oss", torch.float64)
    changed = [key for key, value in merged.state_dict().items() if not torch.equal(value, plain.state_dict()[key])]
    assert changed == [path]


def test_an_unmerged_model_is_not_written_as_a_checkpoint(tmp_path):
    model = converted("mixtral", target_parameters=["experts.down_proj"])  # beside a frozen stack, which comes first
    refused(ValueError, lambda: model.save_pretrained(tmp_path), "down_proj' is a LoRSExpertWeight", "merge_and_unload")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_it_computes_what_transformers_grouped_matmul_does(dtype):
    model = converted("mixtral", dtype)
    ids = token_batch()
    loss_of(model, ids).backward()
    assert {layer.lora_A.grad.dtype for layer in stacks(model).values()} == {torch.float32}
    with torch.no_grad():
        ours = model(input_ids=ids).logits
        merged = merge_and_unload(model)
        merged.set_experts_implementation("grouped_mm")
        theirs = merged(input_ids=ids).logits
    step = torch.finfo(dtype).eps * ours.abs().max().item()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=4 * step)


def test_the_names_shapes_and_start_of_its_tensors():
    model = get_lors_model(experts_model("gpt_oss"), LoRSConfig(**CONFIG))
    layer = model.model.layers[0].mlp.experts.gate_up_proj
    assert (layer.num_experts, layer.out_features, layer.in_features) == (4, 96, 32)
    assert layer.lora_A.shape == (4, 3, 32)
    assert layer.lora_B.shape == (4, 96, 3)
    assert layer.bias.shape == (4, 96)
    assert layer.sparse_weight.shape == (4 * 96, 32)
    module = experts_model("gpt_oss").model.layers[0].mlp.experts
    assert torch.equal(layer.weight, stack_of(module, "gate_up_proj"))
    assert layer.lora_B.count_nonzero() == 0
    # Kaiming-uniform with a = sqrt(5) over the inputs of one expert: within 1 / sqrt(K), and near it.
    assert 0.9 / 32**0.5 < layer.lora_A.abs().max() <= 1 / 32**0.5
    trained = {key.rpartition(".")[2] for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"lora_A", "lora_B"}
    assert "num_experts=4, in_features=32, out_features=96" in repr(model)
    refused(ValueError, layer.to_linear, "holds the weights of 4 experts", "no linear layer")


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict", "state_dict_assign"])
def test_copies_compute_the_same(way):
    model, ids = converted("muse_spark"), token_batch()
    if way == "deepcopy":
        copied = copy.deepcopy(model)
    elif way == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    else:
        copied = get_lors_model(experts_model("muse_spark"), LoRSConfig(**CONFIG))
        copied.load_state_dict(model.state_dict(), assign=way == "state_dict_assign")
    torch.testing.assert_close(loss_of(copied, ids), loss_of(model, ids), rtol=0, atol=0)
    expected = loss_of(merge_and_unload(model), ids)  # the copy is one of its own
    torch.testing.assert_close(loss_of(merge_and_unload(copied), ids), expected, rtol=0, atol=0)


def test_a_state_with_the_stack_of_another_shape_is_refused():
    model = converted("mixtral")
    state = model.state_dict()
    prefix = "model.layers.0.mlp.experts"
    for key in [key for key in state if key.startswith(f"{prefix}.down_proj.weight") or "down_proj.mask" in key]:
        if key.startswith(prefix):
            state[key] = state[key.replace("down_proj", "gate_up_proj")]
    refused(RuntimeError, lambda: model.load_state_dict(state), "size mismatch for weight_values", "(384, 32)")


def test_it_moves_and_changes_dtype_whole():
    model, ids = converted("gpt_oss", torch.float64), token_batch()
    expected = loss_of(model, ids).float()
    halved = copy.deepcopy(model).half()
    experts = halved.model.layers[0].mlp.experts
    assert {tensor.dtype for tensor in experts.parameters()} == {torch.float16}
    torch.testing.assert_close(loss_of(halved, ids).float(), expected, rtol=2e-3, atol=0)
    assert {tensor.dtype for tensor in merge_and_unload(halved).parameters()} == {torch.float16}
    torch.testing.assert_close(loss_of(model.float(), ids), expected, rtol=1e-5, atol=0)


def test_training_and_evaluation_reach_the_module_that_comes_back():
    model = converted("muse_spark").train()
    assert model.layers[0].mlp.experts.post_expert_norm.training
    assert merge_and_unload(model).layers[0].mlp.experts.training


def test_a_mask_changed_in_place_is_seen():
    model = converted("mixtral", layout="bitmap")
    layer = model.model.layers[0].mlp.experts.down_proj
    layer.weight_mask[0] ^= 3
    refused(ValueError, lambda: loss_of(model, token_batch()), "LoRSExpertWeight", "another mask")
