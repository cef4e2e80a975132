# SPDX-License-Identifier: Apache-2.0
"""What people do with PEFT models: weighted adapters, hotswapping, compiling, autocast, checkpointing, transformers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from accelerate_state import own_accelerate  # noqa: F401  (a fixture)
from lors_cuda import load_adapter, merge_and_unload, merge_cache
from models import VOCABULARY, assert_unchanged, batch, logits, refused, snapshot, tiny_llama, tokens
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
    output_reference,
    peft,
)
from tolerance import assert_zero_off_mask

from_pretrained, estimate_gradients = lors_peft.from_pretrained, lors_peft.estimate_gradients
init_from_gradients, hotswap = lors_peft.init_from_gradients, peft.utils.hotswap


def llama(layers: int = 1, dtype: torch.dtype = torch.float32, base: nn.Module | None = None, **fields) -> nn.Module:
    """An adapted Llama with filled adapters, in evaluation."""
    model = tiny_llama(layers=layers, dtype=dtype) if base is None else base
    fields = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **fields}
    result = peft.get_peft_model(model, LoRSLoraConfig(**fields))
    fill(result, size=0.05)
    return result.eval()


# ---- adapters of adapters ----


def weighted_reference(model: nn.Module, weights: dict[str, float]) -> dict[str, torch.Tensor]:
    """{layer: W + sum of w s M o (B A)}, from a fresh base."""
    base = {name: net().get_submodule(name).weight.detach() for name in LAYERS}
    return {
        name: weight + sum(w * (merged_reference(model, (each,))[name] - weight) for each, w in weights.items())
        for name, weight in base.items()
    }


@every_base
@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_weighted_sums_of_adapters_are_exact(base, kind):
    model = adapted(compressed(net(), base), adapters=("default", "second"))
    expected = weighted_reference(model, {"default": 0.75, "second": -0.5})
    rank = {"svd_rank": 6} if kind == "svd" else {}  # 3 + 3: the sum of the products, without the mask, has it
    model.add_weighted_adapter(["default", "second"], [0.75, -0.5], "sum", combination_type=kind, **rank)
    model.set_adapter("sum")
    assert layers(model)["0"].gradient["sum"] == "lors"
    merged = model.merge_and_unload()
    for name in LAYERS:
        torch.testing.assert_close(merged.get_submodule(name).weight.detach(), expected[name])
        assert_zero_off_mask(merged.get_submodule(name).weight, net().get_submodule(name).weight != 0)


@every_base
def test_a_sum_of_a_rank_beyond_the_layers_sides(base, tmp_path):
    names, weights = ["default", "b", "c"], [0.75, -0.5, 2.0]
    model = adapted(compressed(net(), base), adapters=names)
    expected = weighted_reference(model, dict(zip(names, weights, strict=True)))
    model.add_weighted_adapter(names, weights, "sum", combination_type="cat")
    assert layers(model)["0"].lora_A["sum"].weight.shape == (9, 8)
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(compressed(net(), base), tmp_path / "sum")
    model.set_adapter("sum")
    torch.testing.assert_close(loaded(inputs()), model(inputs()))
    merged = loaded.merge_and_unload()
    for name in LAYERS:
        torch.testing.assert_close(merged.get_submodule(name).weight.detach(), expected[name])
        assert_zero_off_mask(merged.get_submodule(name).weight, net().get_submodule(name).weight != 0)
    refused(ValueError, lambda: load_adapter(net(), tmp_path / "sum"), "rank 9", "at most 8", "from_pretrained")
    # The way out that the sentence names: a product of [16, r] and [r, 8] has no larger rank.
    model.add_weighted_adapter(names, weights, "svd", combination_type="svd", svd_rank=8)
    model.save_pretrained(tmp_path)
    merged = merge_and_unload(load_adapter(net(), tmp_path / "svd"))
    torch.testing.assert_close(merged[0].weight.detach(), expected["0"])


@pytest.mark.parametrize("kind", ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune", "ties_svd"])
def test_other_combinations_are_pefts_own_and_masked(kind):
    model = adapted(adapters=("default", "second"))
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum", combination_type=kind, density=0.5)
    model.set_adapter("sum")
    merged = model.merge_and_unload()
    for name in LAYERS:
        assert_zero_off_mask(merged.get_submodule(name).weight, net().get_submodule(name).weight != 0)
        assert not torch.equal(merged.get_submodule(name).weight, net().get_submodule(name).weight)


def test_weighted_sums_with_rslora_are_refused():
    model = adapted(adapters=("default", "second"), use_rslora=True)
    before = snapshot(model)
    for kind in ("cat", "svd"):
        refused(
            ValueError,
            lambda kind=kind: model.add_weighted_adapter(["default", "second"], [1, 1], "sum", combination_type=kind),
            "use_rslora",
        )
    assert_unchanged(model, before)


# ---- hotswapping ----


def test_hotswapping(tmp_path):
    other = adapted(lora_alpha=9)
    fill(other, seed=5)
    other.save_pretrained(tmp_path)
    model = adapted()
    hotswap.hotswap_adapter(model, tmp_path, adapter_name="default")
    assert torch.equal(model(inputs()), other(inputs()))
    check_output(model)


def test_hotswapping_an_adapter_of_fewer_modules(tmp_path):
    other = adapted(target_modules=["0"])
    other.save_pretrained(tmp_path)
    model = adapted()
    hotswap.hotswap_adapter(model, tmp_path, adapter_name="default")
    torch.testing.assert_close(model(inputs()), other(inputs()))


def test_hotswapping_another_mask_is_refused(tmp_path):
    adapted(net(seed=1)).save_pretrained(tmp_path)
    model = adapted()
    before = snapshot(model)
    refused(ValueError, lambda: hotswap.hotswap_adapter(model, tmp_path, adapter_name="default"), "mask_fingerprints")
    assert_unchanged(model, before)


def test_hotswapping_a_compiled_model_does_not_compile_again(tmp_path):
    other = adapted(r=2, lora_alpha=5)
    fill(other, seed=5)
    other.save_pretrained(tmp_path)
    model = adapted()
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=4)
    assert isinstance(layers(model)["0"].scaling["default"], torch.Tensor)
    check_output(model)  # the scaling is a tensor, the adapter padded
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)  # fullgraph: no tensor is read
    with torch.no_grad():
        torch.testing.assert_close(compiled(inputs()), model(inputs()))
        hotswap.hotswap_adapter(compiled, tmp_path, adapter_name="default")
        with torch.compiler.set_stance("fail_on_recompile"):
            torch.testing.assert_close(compiled(inputs()), output_reference(other, inputs()))


def test_merging_with_a_tensor_as_scaling():
    model = adapted()
    hotswap.prepare_model_for_compiled_hotswap(model)
    model.merge_adapter()
    check_output(model)


# ---- torch ----


@every_base
@pytest.mark.parametrize("adapters", [1, 2])
def test_compiles_without_a_break(base, adapters):
    model = adapted(compressed(net(), base), adapters=("default", "second"))
    model.base_model.set_adapter(["default", "second"][:adapters])
    layer = layers(model)["2"].train()
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    expected = layer(x)
    torch._dynamo.reset()
    actual = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(actual, expected)
    gradients = [
        torch.autograd.grad(output.square().sum(), [x, *(p for p in layer.parameters() if p.requires_grad)])
        for output in (actual, expected)
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype, dropout):
    model = adapted(net(dtype=dtype), lora_dropout=dropout).train()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(inputs(dtype=torch.float32))
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    weight = layers(model)["0"].lora_A["default"].weight
    assert weight.dtype == weight.grad.dtype == torch.float32
    assert weight.grad.isfinite().all()
    assert weight.grad.any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = llama(layers=2).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(**batch()).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert len(gradients[0]) == 2 * 2 * 7
    torch.testing.assert_close(*gradients)


@every_base
def test_training_keeps_the_base_and_moves_the_adapters(base):
    model = llama(base=compressed(tiny_llama(layers=1), base), lora_dropout=0.1, gradient="exact").train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**batch()).loss.backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    assert len(moved) == 2 * 7


@every_base
def test_merge_cache(base):
    model = adapted(compressed(net(), base), adapters=("default", "second"))
    layer = layers(model)["0"]
    with merge_cache(model):
        for name in ("default", "second", "default"):
            model.set_adapter(name)
            check_output(model, (name,))
            assert layer.merged_weight.nbytes
        kept = layer.merged_weight._operand
        check_output(model)
        assert layer.merged_weight._operand is kept
        fill(model, seed=7)
        check_output(model)
        model.base_model.set_adapter(["default", "second"])
        check_output(model, ("default", "second"))
        model.merge_adapter()
        check_output(model, ("default", "second"))
        model.unmerge_adapter()
        model.set_adapter("second")
        check_output(model, ("second",))
    assert layer.merged_weight is None


# ---- the gradient start ----


def test_the_gradient_start_leaves_the_output_and_the_zeros():
    model, config = tiny_llama(layers=1), LoRSLoraConfig(r=4, target_modules="all-linear", layout="2:4")
    before = logits(model)
    gradients = estimate_gradients(model, [batch(1), batch(2)], config, steps=2)
    assert config.target_modules == "all-linear"
    adapted_model = peft.get_peft_model(model, config)
    fill(adapted_model)
    init_from_gradients(adapted_model, gradients, stable_gamma=2.0)
    torch.testing.assert_close(logits(adapted_model), before)
    layer = layers(adapted_model)["model.layers.0.mlp.up_proj"]
    ours = layer.lora_A["default"].weight.detach() * 2.0
    torch.testing.assert_close(ours @ ours.T, torch.eye(4), rtol=0, atol=1e-5)
    exact = torch.linalg.svd(gradients["model.layers.0.mlp.up_proj"]).Vh[:4]
    torch.testing.assert_close((ours * exact).sum(-1).abs(), torch.ones(4), rtol=0, atol=1e-3)


def test_wrong_gradient_starts_are_refused():
    model = adapted()
    right = {name: torch.randn(layer.out_features, layer.in_features) for name, layer in layers(model).items()}
    init_from_gradients(model, {**right, "7": "a module that has no adapter"})
    before = snapshot(model)
    refused(ValueError, lambda: init_from_gradients(model, right, "b"), "no LoRS adapter 'b'")
    refused(ValueError, lambda: init_from_gradients(net(), right), "no LoRS adapter")
    refused(ValueError, lambda: init_from_gradients(model, {"0": right["0"]}), "no gradient for '2'")
    refused(TypeError, lambda: init_from_gradients(model, []), "gradients must map module names")
    refused(TypeError, lambda: init_from_gradients("model", right), "torch.nn.Module")
    assert_unchanged(model, before)
    model = adapted(adapters=("default", "b", "c"))
    model.add_weighted_adapter(["default", "b", "c"], [1.0, 1.0, 1.0], "sum", combination_type="cat")
    refused(ValueError, lambda: init_from_gradients(model, right, "sum"), "rank 9", "8 singular vectors")
    refused(TypeError, lambda: estimate_gradients(net(), [], {"r": 3}), "must be a LoRSLoraConfig")
    refused(ValueError, lambda: estimate_gradients(net(), [], config_of(target_modules=["7"])), "selects no module")


# ---- transformers ----


def test_add_adapter_and_load_adapter_of_transformers(tmp_path):
    model = tiny_llama(layers=1)
    model.add_adapter(LoRSLoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    assert len(layers(model)) == 2
    base = logits(tiny_llama(layers=1))
    torch.testing.assert_close(logits(model), base)
    fill(model)
    expected = logits(model)
    assert not torch.allclose(expected, base)
    model.save_pretrained(tmp_path)
    model.disable_adapters()
    torch.testing.assert_close(logits(model), base)

    other = tiny_llama(layers=1)
    other.load_adapter(tmp_path)
    assert torch.equal(logits(other), expected)
    assert torch.equal(logits(from_pretrained(tiny_llama(layers=1), tmp_path)), expected)
    refused(ValueError, lambda: tiny_llama(seed=1, layers=1).load_adapter(tmp_path), "another sparsity mask")
    other.delete_adapter("default")
    torch.testing.assert_close(logits(other), base)


@pytest.mark.parametrize("base", ["linear", "2:4"])
def test_trainer_trains_and_resumes(tmp_path, base):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    rows = [{"input_ids": row, "labels": row} for row in tokens(batch=8, length=8)]

    def run(resume: bool) -> nn.Module:
        model = llama(base=compressed(tiny_llama(layers=1), base), lora_dropout=0.1)
        options = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.01, "seed": 3}
        arguments = transformers.TrainingArguments(
            tmp_path, use_cpu=True, report_to="none", disable_tqdm=True, **options
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
        return model.eval()

    whole, resumed = run(resume=False), run(resume=True)
    torch.testing.assert_close(logits(resumed), logits(whole))
    assert not torch.allclose(logits(whole), logits(llama()))
    torch.testing.assert_close(logits(from_pretrained(tiny_llama(layers=1), tmp_path / "checkpoint-4")), logits(whole))
    for name, module in whole.merge_and_unload().named_modules():
        if name in layers(llama()):
            assert_zero_off_mask(module.weight, tiny_llama(layers=1).get_submodule(name).weight != 0)


def test_generation_equals_the_merged_models():
    model = llama()
    ids = tokens(batch=1, length=8)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    generated = model.generate(input_ids=ids, **options)
    assert torch.equal(model.merge_and_unload().generate(input_ids=ids, **options), generated)


def test_layers_to_transform_and_trainable_tokens(tmp_path):
    model = llama(
        layers=2, target_modules=["q_proj"], layers_to_transform=[1], trainable_token_indices=[1, VOCABULARY - 1]
    )
    assert set(layers(model)) == {"model.layers.1.self_attn.q_proj"}
    delta = next(p for name, p in model.named_parameters() if "trainable_tokens_delta" in name)
    assert delta.requires_grad
    delta.data += 0.5
    model.save_pretrained(tmp_path)
    other = from_pretrained(tiny_llama(layers=2), tmp_path)
    assert torch.equal(logits(other), logits(model))
    torch.testing.assert_close(logits(model.merge_and_unload()), logits(other))


def test_target_modules_of_the_architecture():
    names = {name.rpartition(".")[2] for name in layers(llama(target_modules=None))}
    assert names == set(peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["llama"])


def test_mamba_projections_that_are_read_without_a_call_are_refused():
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(
        vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=1, time_step_rank=8
    )
    model = transformers.MambaForCausalLM(config)
    for name in ("x_proj", "dt_proj", "out_proj"):
        with pytest.raises(ValueError, match=f"mixer.{name}' cannot be adapted: it has its weight read by MambaMixer"):
            peft.get_peft_model(model, config_of(target_modules=["in_proj", name]))
    assert type(model.backbone.layers[0].mixer.in_proj) is nn.Linear
