# SPDX-License-Identifier: Apache-2.0
"""Whole models with compressed weights: their bytes, the memory of converting them, and that nothing else changes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from cases import make_case
from lors_cuda import (
    LoRSConfig,
    SparseWeight,
    get_lors_model,
    load_adapter,
    lors_linear,
    merge_and_unload,
    named_lors_layers,
    release_scratch,
    save_adapter,
)
from models import batch, fill_adapters, logits, tiny_llama

LAYOUTS = ("dense", "2:4", "bitmap")
COMPRESSED = LAYOUTS[1:]


def converted(layout: str, **fields: object) -> nn.Module:
    torch.manual_seed(3)
    model = get_lors_model(tiny_llama(), LoRSConfig(r=4, layout=layout, **fields))
    fill_adapters(model)
    return model


def stack(width: int, layers: int) -> nn.Module:
    """bfloat16 linears of the proportions of a Llama's MLP, 2:4; made without anything larger on the way."""
    torch.manual_seed(0)
    sides = [(width, 2 * width), (2 * width, width)] * layers
    model = nn.Sequential(*(nn.Linear(*side, bias=False, dtype=torch.bfloat16) for side in sides))
    with torch.no_grad():
        for linear in model:
            linear.weight.view(-1, 4)[:, ::2] = 0.0
    return model


def weight_bytes(model: nn.Module) -> int:
    """Bytes of every storage that the model's frozen weights hold, whatever views it."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    held = [t for n, t in tensors if n.endswith("weight") or ".weight_" in f".{n}"]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values())


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes alive at once of tensors made inside `run`, from the profiler's memory events."""
    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory) / "trace.json"
        release_scratch()  # so that the run allocates it, and it counts
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    memory = [e for e in events if e.get("name") == "[memory]"]
    memory.sort(key=lambda e: (e["ts"], e["args"].get("Ev Idx", 0)))
    alive = peak = 0
    for event in memory:
        alive += event["args"]["Bytes"]
        peak = max(peak, alive)
    return peak


@pytest.mark.parametrize(("layout", "factor"), [("2:4", 0.58), ("auto", 0.58), ("bitmap", 0.58), ("dense", 1.0)])
def test_bytes_of_a_model(layout, factor):
    model = stack(256, 3)
    dense = sum(m.weight.nbytes for m in model.modules() if isinstance(m, nn.Linear))
    get_lors_model(model, LoRSConfig(r=2, layout=layout))
    held = weight_bytes(model)
    assert held <= factor * dense
    assert held == sum(layer.sparse_weight.nbytes for _, layer in named_lors_layers(model))
    if layout in ("2:4", "auto"):
        assert held == 0.5625 * dense


LAYER = 2 * 2 * 256 * 256  # bytes of one dense weight of stack(256, ...)


@pytest.mark.parametrize("layout", ["auto", *LAYOUTS])
def test_converting_takes_two_layers_at_most(layout):
    """The dense weight is let go layer by layer, also by the checks that run over all layers first."""
    adapters = 12 * 2 * 4 * 3 * 256
    peak = peak_bytes(lambda: get_lors_model(stack(256, 6), LoRSConfig(r=2, layout=layout)))
    assert 12 * LAYER <= peak <= (12 + 2) * LAYER + adapters


def test_that_the_memory_test_can_fail():
    def keep_all() -> None:
        model = stack(256, 6)
        before = [linear.weight for linear in model]
        get_lors_model(model, LoRSConfig(r=2, layout="2:4"))
        del before

    assert peak_bytes(keep_all) >= 1.5 * 12 * LAYER


@pytest.mark.parametrize("gradient", ["lors", "exact"])
@pytest.mark.parametrize("layout", COMPRESSED)
def test_a_step_is_the_dense_step(layout, gradient):
    """Loss and every gradient; the products of another layout run in another order, no more."""
    models = [converted(name, gradient=gradient) for name in ("dense", layout)]
    losses = []
    for model in models:
        loss = model(**batch(0)).loss
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    dense, other = ({n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in models)
    assert dense.keys() == other.keys()
    for name, grad in dense.items():
        torch.testing.assert_close(other[name], grad, rtol=1e-4, atol=1e-6 * float(grad.abs().max()), msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_merging_gives_the_same_weights_bit_for_bit(layout):
    expected, actual = (merge_and_unload(converted(name)).state_dict() for name in ("dense", layout))
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


@pytest.mark.parametrize("into", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_adapter_goes_from_layout_to_layout(tmp_path, layout, into):
    model = converted(layout)
    save_adapter(model, tmp_path / "adapter")
    other = get_lors_model(tiny_llama(), LoRSConfig(r=4, layout=into))
    load_adapter(other, tmp_path / "adapter")
    assert {w.sparse_weight.layout for _, w in named_lors_layers(other)} == {into}
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-4, atol=1e-5)
    fresh = load_adapter(tiny_llama(), tmp_path / "adapter")
    assert {w.sparse_weight.layout for _, w in named_lors_layers(fresh)} == {layout}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_dicts_of_models(layout):
    model, fresh = converted(layout), get_lors_model(tiny_llama(seed=1), LoRSConfig(r=4, layout=layout))
    state = model.state_dict()
    assert any(name.endswith("weight_index") for name in state) == (layout != "dense")
    fresh.load_state_dict(state, strict=True)
    assert torch.equal(logits(fresh), logits(model))
    other = get_lors_model(tiny_llama(), LoRSConfig(r=4, layout="bitmap" if layout == "2:4" else "2:4"))
    with pytest.raises(RuntimeError, match=f"layout '{layout}' and the layer one of layout") as caught:
        other.load_state_dict(state)
    assert f"convert the model with layout='{layout}'" in str(caught.value)


@pytest.mark.parametrize("layout", COMPRESSED)
def test_disabled_adapters_are_the_sparse_model(layout):
    from lors_cuda import disable_adapter

    plain, model = tiny_llama(), converted(layout)
    with disable_adapter(model):
        torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gradient", ["lors", "exact"])
@pytest.mark.parametrize("layout", COMPRESSED)
def test_compiled_whole(device, seed, layout, gradient):
    case = make_case(seed, 9, 12, 36, 3, device=device, bias=True, layout=layout)
    leaves = [t.requires_grad_() for t in (case.input, case.lora_A, case.lora_B)]
    w = SparseWeight.from_dense(case.weight, layout)

    def function(x, A, B):
        return lors_linear(x, w, A, B, case.scaling, case.bias, gradient=gradient)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (9, 5):
        results = []
        for f in (function, compiled):
            output = f(leaves[0][:tokens], *leaves[1:])
            results.append((output, *torch.autograd.grad(output.square().sum(), leaves)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", COMPRESSED)
def test_gradcheck(seed, layout):
    case = make_case(seed, 5, 6, 12, 2, torch.float64, bias=True, layout=layout)
    leaves = [t.requires_grad_() for t in (case.input, case.lora_A, case.lora_B, case.bias)]
    w = SparseWeight.from_dense(case.weight, layout)

    def function(x, A, B, b):
        return lors_linear(x, w, A, B, case.scaling, b, gradient="exact")

    assert torch.autograd.gradcheck(function, leaves)


def test_exact_gradients_never_build_a_mask_of_bytes(seed):
    """The peak of an exact backward on a compressed weight stays below N x K bytes beside what dense takes too."""
    peaks = {}
    for layout in LAYOUTS:
        case = make_case(seed, 8, 1024, 4096, 2, torch.bfloat16, explicit_mask=True, layout=layout)
        stored = case.stored
        args = (case.grad_output, case.input, *stored, case.lora_A, case.lora_B, None, case.scaling, "exact")
        peaks[layout] = peak_bytes(lambda args=args: torch.ops.lors.linear_backward(*args, False, True, True))
    for layout in COMPRESSED:
        assert peaks[layout] <= peaks["dense"] + 1024 * 4096 // 8 + 4096, peaks
