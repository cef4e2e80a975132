# SPDX-License-Identifier: Apache-2.0
"""merge_cache: merges once while nothing changes, and never answers with a weight that is out of date."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
from collections.abc import Iterator

import pytest
import torch
from test_layer import every_layout
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

import lors_cuda
from cases import FLOATS, make_case
from expectations import check_adapter_grads, check_grad_bias, check_grad_input, check_linear
from lors_cuda import LoRSConfig, get_lors_model, lors_linear, merge_cache
from lors_cuda._library import build_info
from lors_cuda._merged_weight import MergedWeight
from models import prune_two_of_four


class CountMerges(TorchDispatchMode):
    """Counts how often a weight was merged to be kept, and how often for one call alone."""

    kept = alone = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.kept += func is torch.ops.lors.merged_operand.default
        self.alone += func is torch.ops.lors.linear.default and (len(args) < 10 or args[9] is None)
        return func(*args, **(kwargs or {}))


def model_of(layout: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32)).to(device, dtype)
    return get_lors_model(prune_two_of_four(model), LoRSConfig(r=4, layout=layout, init_lora_weights=False))


@contextlib.contextmanager
def counted() -> Iterator[CountMerges]:
    with CountMerges() as counts:
        yield counts


@every_layout
@pytest.mark.parametrize("gradient", ["lors", "exact"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_kept_merge_gives_the_output_and_gradients_of_the_oracle(device, seed, dtype, gradient, layout):
    case = make_case(seed, 17, 31, 72, 5, dtype, device=device, bias=True, layout=layout)
    leaves = {name: getattr(case, name).detach().requires_grad_() for name in ("input", "lora_A", "lora_B", "bias")}
    weight = lors_cuda.SparseWeight.from_dense(case.weight, layout, case.mask)
    cache = MergedWeight()
    for _ in range(2):  # the second call finds what the first one made
        output = lors_linear(
            leaves["input"], weight, leaves["lora_A"], leaves["lora_B"], case.scaling, leaves["bias"],
            gradient=gradient, cache=cache,
        )  # fmt: skip
        check_linear(output, case)
        dX, dA, dB, db = torch.autograd.grad(output, tuple(leaves.values()), case.grad_output)
        check_grad_input(dX, case)
        check_adapter_grads(dA, dB, case, gradient)
        check_grad_bias(db, case)
    operand = cache.operand(weight, leaves["lora_A"], leaves["lora_B"], case.scaling, case.input)
    # The CPU's float32 matmuls read compressed values directly, others of more than a few tokens need the dense matrix.
    computed = build_info()["cpu_product"].get(str(dtype)[6:], str(dtype)[6:])
    stored = device.type == "cpu" and layout != "dense" and computed == "float32"
    assert operand.shape == (weight.values.shape if stored else (31, 72))
    assert cache.nbytes == operand.nbytes


@every_layout
def test_merges_once_over_many_forwards_and_backwards(device, layout):
    model, x = model_of(layout, device=device), torch.randn(5, 64, device=device)
    with merge_cache(model), counted() as counts:
        for _ in range(3):
            model(x).sum().backward()
        with torch.no_grad():
            model(x)
        with torch.inference_mode():
            model(x)
    assert (counts.kept, counts.alone) == (2, 0)  # one per layer
    with counted() as counts:
        model(x)
    assert (counts.kept, counts.alone) == (0, 2)


def test_what_inference_mode_made_serves_training(device):
    model, x = model_of("2:4", device=device), torch.randn(5, 64, device=device)
    with merge_cache(model), counted() as counts:
        with torch.inference_mode():
            model(x)
        model(x).sum().backward()
    assert counts.kept == 2
    assert all(layer.lora_B.grad is not None for _, layer in lors_cuda.named_lors_layers(model))


def _optimizer_step(model: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()


class DataWriter(torch.optim.Optimizer):
    """An optimizer of the old kind, whose writes torch does not count."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(0.1)


def _step_through_data(model: nn.Module, x: Tensor) -> None:
    DataWriter([p for p in model.parameters() if p.requires_grad]).step()


def _write_in_place(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model[0].lora_A.mul_(2)


def _new_parameter(model: nn.Module, x: Tensor) -> None:
    model[2].lora_B = nn.Parameter(model[2].lora_B.detach() * 2)
    gc.collect()


def _new_data(model: nn.Module, x: Tensor) -> None:
    model[2].lora_B.data = model[2].lora_B.detach() * 2
    gc.collect()


def _load_state(model: nn.Module, x: Tensor) -> None:
    model.load_state_dict({name: t * 2 if "lora" in name else t for name, t in model.state_dict().items()})


def _scaling(model: nn.Module, x: Tensor) -> None:
    model[0].scaling *= 2


def _base_weight(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model[0].weight_values.mul_(0.5)


CHANGES = [
    _optimizer_step, _step_through_data, _write_in_place, _new_parameter, _new_data, _load_state, _scaling,
    _base_weight,
]  # fmt: skip


@every_layout
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__[1:])
def test_a_change_is_seen(device, layout, change):
    model, x = model_of(layout, device=device), torch.randn(5, 64, device=device)
    with merge_cache(model):
        before = model(x).detach()
        change(model, x)
        after = model(x).detach()
    fresh = model(x).detach()
    torch.testing.assert_close(after, fresh, rtol=1e-5, atol=1e-5)
    assert (after - before).abs().max() > 1e-2


def test_a_conversion_inside_the_block_is_seen():
    model, x = model_of("2:4"), torch.randn(5, 64)
    with merge_cache(model):
        model(x)
        model.to(torch.float64)
        output = model(x.double())
    assert torch.equal(output, model(x.double()))


def test_autocast_and_plain_calls_have_their_own(device):
    model, x = model_of("bitmap", device=device), torch.randn(5, 64, device=device)
    with merge_cache(model):
        for _ in range(2):
            with torch.autocast(torch.device(device).type, torch.bfloat16):
                assert model(x).dtype == torch.bfloat16
            assert model(x).dtype == torch.float32


def test_memory_is_given_back_and_blocks_nest(device):
    model, x = model_of("2:4", device=device), torch.randn(5, 64, device=device)
    layers = [layer for _, layer in lors_cuda.named_lors_layers(model)]
    with merge_cache(model):
        model(x)
        caches = [layer.merged_weight for layer in layers]
        share = 2 if device.type == "cpu" else 1  # 2:4 values, or a dense matrix
        assert [cache.nbytes * share for cache in caches] == [4 * 64 * 48, 4 * 48 * 32]
        with merge_cache(model), counted() as counts:
            model(x)
        assert counts.kept == 0
        assert [layer.merged_weight for layer in layers] == caches
    assert all(layer.merged_weight is None for layer in layers)
    with pytest.raises(ZeroDivisionError), merge_cache(model):
        _ = 1 / 0
    assert all(layer.merged_weight is None for layer in layers)


def test_copies_and_pickles_hold_no_merged_weight():
    model, x = model_of("2:4"), torch.randn(5, 64)
    size = len(pickle.dumps(model.state_dict()))
    with merge_cache(model):
        model(x)
        assert copy.deepcopy(model)[0].merged_weight.nbytes == 0
        assert pickle.loads(pickle.dumps(model))[0].merged_weight.nbytes == 0
        assert len(pickle.dumps(model.state_dict())) == size


def test_disabled_adapters_and_compiled_models_are_right():
    model, x = model_of("dense"), torch.randn(5, 64)
    plain = model(x)
    with merge_cache(model):
        with lors_cuda.disable_adapter(model):
            frozen = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), plain)
        _write_in_place(model, x)
        changed = compiled(x)
    torch.testing.assert_close(changed, model(x))
    assert (frozen - plain).abs().max() > 1e-2


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_graph_holds_no_merged_weight():
    model, x = model_of("2:4"), torch.randn(5, 64)
    with merge_cache(model):
        model(x)
        traced = torch.jit.trace(model, x)
        _write_in_place(model, x)
        torch.testing.assert_close(traced(x), model(x))


@pytest.mark.parametrize("keep", [merge_cache, lors_cuda.prefetch])
def test_refused_models(keep):
    with torch.inference_mode():
        model = model_of("dense")
    with pytest.raises(ValueError, match=r"made under torch\.inference_mode"), keep(model):
        pass
    with pytest.raises(ValueError, match="no LoRS layers"), keep(nn.Linear(2, 2)):
        pass


def test_refusals():
    case = make_case(0, 3, 8, 16, 2)
    with pytest.raises(RuntimeError, match=r"merged has shape .* what lors::merged_operand gives"):
        torch.ops.lors.linear(
            case.input, case.weight, None, None, case.lora_A, case.lora_B, None, 1.0, "lors", case.weight.t()
        )
    with pytest.raises(RuntimeError, match="lors::merged_operand: dtype must be"):
        torch.ops.lors.merged_operand(case.weight, None, None, case.lora_A, case.lora_B, 1.0, torch.int32, 1)


@pytest.mark.parametrize("dtype", FLOATS)
def test_opcheck_of_the_linear_with_a_given_merge(device, seed, dtype):
    case = make_case(seed, 3, 12, 20, 3, dtype, device=device)
    merged = torch.ops.lors.merged_operand(case.weight, None, None, case.lora_A, case.lora_B, 0.5, dtype, 3)
    tensors = [t.detach().requires_grad_() for t in (case.input, case.lora_A, case.lora_B)]
    torch.library.opcheck(
        torch.ops.lors.linear.default,
        (tensors[0], case.weight, None, None, *tensors[1:], None, 0.5, "lors", merged),
    )


class Scaled(nn.Module):
    """A parametrisation whose state is no tensor: only the computed factor shows a change."""

    factor = 2.0

    def forward(self, stored: Tensor) -> Tensor:
        return self.factor * stored


@every_layout
@pytest.mark.parametrize("which", ["lora_A", "lora_B"])
def test_a_computed_factor_merges_once_while_it_stays_the_same(device, layout, which):
    model, x = model_of(layout, device=device), torch.randn(5, 64, device=device)
    scale = Scaled()
    parametrize.register_parametrization(model[0], which, scale)
    with merge_cache(model), counted() as counts:
        for _ in range(3):
            model(x).sum().backward()
        with torch.inference_mode():
            model(x)
        with torch.no_grad():
            model(x)
        assert (counts.kept, counts.alone) == (2, 0)
        for change in (lambda: setattr(scale, "factor", 3.0), lambda: _change_stored(model, which)):
            before = model(x).detach()
            change()
            after = model(x).detach()
            assert not torch.equal(after, before)
            with torch.no_grad():
                fresh = copy.deepcopy(model)
                for layer in fresh.modules():
                    if isinstance(layer, lors_cuda.LoRSLinear):
                        layer.merged_weight = MergedWeight()
                torch.testing.assert_close(fresh(x), after, rtol=0, atol=0)
        assert counts.kept == 2 + 2 + 4  # one for each change; the deep copies' own


def _change_stored(model: nn.Module, which: str) -> None:
    with torch.no_grad():
        model[0].parametrizations[which].original.mul_(1.5)


def test_a_plain_tensor_that_is_written_in_place_is_seen():
    torch.manual_seed(0)
    weight = lors_cuda.SparseWeight.from_dense(model_of("2:4")[0].sparse_weight.to_dense())
    lora_A, lora_B, x = torch.randn(4, 64), torch.randn(48, 4), torch.randn(5, 64)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            A, B, cache = lora_A.clone(), lora_B.clone(), MergedWeight()
            for _ in range(3):
                found = lors_linear(x, weight, A, B, 0.5, cache=cache)
                torch.testing.assert_close(found, lors_linear(x, weight, A, B, 0.5), rtol=1e-4, atol=1e-4)
                A += 1
                B[:, 0] = 3
