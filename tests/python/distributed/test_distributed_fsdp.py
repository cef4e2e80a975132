# SPDX-License-Identifier: Apache-2.0
"""FSDP2 (fully_shard): compressed weights in parts, the same training as one process, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from distributed_cases import (
    assert_close,
    converted,
    every_layout,
    shard,
    train_alone,
    train_shared,
    trained_values,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from lors_cuda import (
    LoRSConfig,
    LoRSLinear,
    SparseWeight,
    disable_adapter,
    get_lors_model,
    init_from_gradients,
    lors_linear,
    merge,
    merge_and_unload,
    merge_cache,
    named_lors_layers,
    prefetch,
)
from models import assert_unchanged, batch, logits, refused, snapshot, tiny_net

pytest_plugins = ["pair"]

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


# ---- training ----


def train_two(rank: int, layout: str, dtype: torch.dtype, checkpointed: bool, reshard: bool, gradient: str) -> None:
    alone = converted(layout, dtype, gradient=gradient)
    expected = train_alone(alone)
    model = converted(layout, dtype, gradient=gradient)
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    shard(model, reshard_after_forward=reshard)
    losses = train_shared(model, rank)
    assert losses == pytest.approx(expected, rel=1e-5 if dtype == FLOAT32 else 4e-3)
    assert expected[2] < 0.99 * expected[0]
    assert expected[3] < 0.99 * expected[1]
    if dtype == FLOAT32:
        assert_close(trained_values(model), trained_values(alone))


@every_layout
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_training_is_that_of_one_process(pair, layout, dtype, checkpointed):
    pair.run(train_two, layout, dtype, checkpointed, True, "lors")


@pytest.mark.parametrize(("reshard", "gradient"), [(False, "lors"), (True, "exact")])
def test_training_without_resharding_and_with_exact_gradients(pair, reshard, gradient):
    pair.run(train_two, "bitmap", FLOAT32, False, reshard, gradient)


def hold(rank: int, layout: str) -> None:
    model = converted(layout, BFLOAT16)
    whole = {name: p.nbytes for name, p in model.named_parameters()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    shard(model)
    parameters = dict(model.named_parameters())
    held = {name: p.to_local().nbytes for name, p in parameters.items()}
    assert whole.keys() == held.keys()
    assert {name for name, p in parameters.items() if p.requires_grad} == trained
    for name, p in parameters.items():
        row = whole[name] // p.shape[0]
        assert abs(2 * held[name] - whole[name]) <= row, name  # half, up to one row
    assert sum(held.values()) < 0.53 * sum(whole.values())

    layer = model.model.layers[0].mlp.up_proj
    seen = {}

    def look(module, arguments):
        seen.update(dict(module.named_parameters()))

    handle = layer.register_forward_pre_hook(look)
    loss = model(**batch(rank)).loss
    handle.remove()
    # What autograd has saved of the gathered parameters holds no memory until backward gathers them again.
    assert set(seen) == {name for name, _ in layer.named_parameters()}
    for name, tensor in seen.items():
        assert not isinstance(tensor, DTensor), name
        assert tensor.untyped_storage().size() == 0, name
        assert isinstance(getattr(layer, name), DTensor), name
    loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@every_layout
def test_every_stored_tensor_is_held_by_halves(pair, layout):
    pair.run(hold, layout)


def train_mixed(rank: int, layout: str) -> None:
    model = converted(layout)
    shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=BFLOAT16, reduce_dtype=FLOAT32))
    layer, dtypes = model.model.layers[0].mlp.up_proj, {}
    stored = {name: p.dtype for name, p in layer.named_parameters()}

    def look(module, arguments):
        dtypes.update({name: p.dtype for name, p in module.named_parameters()})

    layer.register_forward_pre_hook(look)
    losses = train_shared(model, rank, steps=1)
    for name, dtype in stored.items():  # floating tensors are cast, integers are not, and what is stored stays
        assert dtypes[name] == (BFLOAT16 if dtype.is_floating_point else dtype), name
        assert getattr(layer, name).dtype == dtype
    cast = converted(layout).to(BFLOAT16)
    assert losses == pytest.approx(train_alone(cast, steps=1), rel=4e-3)


@every_layout
def test_a_mixed_precision_policy_leaves_integers_alone(pair, layout):
    pair.run(train_mixed, layout)


def train_two_dtypes(rank: int) -> None:
    """A norm that is trained in bfloat16 beside float32 adapters needs a fully_shard of its own."""
    fields = {"layout": "2:4", "dtype": BFLOAT16, "modules_to_save": ["input_layernorm"]}
    model = converted(**fields)
    shard(model)
    with pytest.raises(AssertionError, match="uniform original parameter dtype"):
        model(**batch(rank))
    model = converted(**fields)
    for block in model.model.layers:
        fully_shard(block.input_layernorm)
    shard(model)
    assert train_shared(model, rank) == pytest.approx(train_alone(converted(**fields)), rel=4e-3)


def test_modules_trained_in_another_dtype_are_sharded_by_themselves(pair):
    pair.run(train_two_dtypes)


class AddOne(nn.Module):
    """Writes into what it is given."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        input += 1
        return input.square()


def write_into_output(rank: int, shape: tuple[int, ...]) -> None:
    """fully_shard hangs its backward on the layer's output, and would lose it where that is a view."""
    results = []
    for sharded in (False, True):
        layer = get_lors_model(tiny_net(), LoRSConfig(r=2, layout="2:4", init_lora_weights=False))[0]
        net = nn.Sequential(layer, AddOne())
        if sharded:
            fully_shard(layer)
            fully_shard(net)
        inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
        net(inputs).sum().backward()
        gradient = layer.lora_B.grad
        results.append((inputs.grad, gradient.full_tensor() if sharded else gradient))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 8), (8,)])
def test_the_output_of_a_sharded_layer_may_be_written_into(pair, shape):
    pair.run(write_into_output, shape)


# ---- sizes ----


def small_net(layout: str, N: int, kept: int, bias: bool) -> nn.Sequential:
    torch.manual_seed(0)
    linear = nn.Linear(8, N, bias=bias)
    with torch.no_grad():
        linear.weight.view(-1)[kept:] = 0
    return get_lors_model(nn.Sequential(linear), LoRSConfig(r=1, layout=layout, init_lora_weights=False))


def run_small(rank: int, layout: str) -> None:
    """One row for two processes, one value, none at all: what is cut unevenly, or not at all."""
    for N, kept, bias in [(1, 2, True), (1, 1, False), (3, 2, True), (3, 0, True), (2, 1, False), (5, 2, True)]:
        inputs = torch.arange(16.0).view(2, 8).requires_grad_(True)
        net = small_net(layout, N, kept, bias)
        expected = net(inputs)
        expected.square().sum().backward()
        gradients = [p.grad for p in net.parameters() if p.requires_grad]
        (expected_input,), inputs.grad = (inputs.grad,), None
        net = small_net(layout, N, kept, bias)
        fully_shard(net)
        output = net(inputs)
        output.square().sum().backward()
        assert torch.equal(output, expected), (N, kept)
        assert torch.equal(inputs.grad, expected_input), (N, kept)
        ours = [p.grad.full_tensor() for p in net.parameters() if p.requires_grad]
        assert all(torch.equal(a, b) for a, b in zip(ours, gradients, strict=True)), (N, kept)


@every_layout
def test_layers_too_small_to_share_work_all_the_same(pair, layout):
    pair.run(run_small, layout)


# ---- refusals ----


def refuse(rank: int, layout: str) -> None:
    net = tiny_net()
    fully_shard(net)
    before = snapshot(net)
    refused(ValueError, lambda: get_lors_model(net, LoRSConfig(r=2, layout=layout)),
            "not converted", "weight is a DTensor", "outside fully_shard")  # fmt: skip
    assert_unchanged(net, before)

    model = converted(layout)
    shard(model)
    before = snapshot(model)
    refused(ValueError, lambda: merge_and_unload(model), "weight is a DTensor", "merge a model outside fully_shard")
    gradients = {name: torch.randn(layer.out_features, layer.in_features) for name, layer in named_lors_layers(model)}
    refused(ValueError, lambda: init_from_gradients(model, gradients), "lora_A is a DTensor")
    for keep in (merge_cache, prefetch):
        refused(
            ValueError,
            keep(model).__enter__,
            "sharded by fully_shard",
            f"{keep.__name__} would hold merged weights whole",
        )
    # A part that fully_shard was not applied to gathers nothing.
    layer = model.model.layers[0].mlp.up_proj
    refused(ValueError, lambda: layer(torch.randn(2, 32)), "is a DTensor", "call the module that it was applied to")
    weight = layer.sparse_weight
    for call in (weight.to_dense, weight.mask, weight.packed_mask, weight.fingerprint, lambda: weight.to("cpu"),
                 lambda: weight.merge(torch.randn(3, 32), torch.randn(64, 3), 1.0), layer.to_linear):  # fmt: skip
        refused(ValueError, call, "is a DTensor")
    assert_unchanged(model, before)
    assert layout in repr(layer)
    with disable_adapter(model):
        expected = converted(layout)
        with disable_adapter(expected):
            torch.testing.assert_close(logits(model), logits(expected))


@every_layout
def test_what_needs_whole_tensors_is_refused(pair, layout):
    pair.run(refuse, layout)


def refuse_tensor_parallel(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    whole = {"input": torch.randn(2, 8), "weight": torch.randn(4, 8), "lora_A": torch.randn(2, 8),
             "lora_B": torch.randn(4, 2), "bias": torch.randn(4)}  # fmt: skip
    for name in whole:
        tensors = dict(whole)
        tensors[name] = distribute_tensor(whole[name], mesh, [Replicate()])
        refused(ValueError, lambda tensors=tensors: lors_linear(**tensors, scaling=1.0),
                f"{name} is a DTensor", "tensor parallelism is not supported")  # fmt: skip
    split = distribute_tensor(whole["weight"], mesh, [Replicate()])
    refused(ValueError, lambda: merge(SparseWeight(split), whole["lora_A"], whole["lora_B"], 1.0), "is a DTensor")
    refused(ValueError, lambda: SparseWeight.from_dense(split), "weight is a DTensor")
    # torch itself refuses to cut a layer that is no nn.Linear.
    net = get_lors_model(tiny_net(), LoRSConfig(r=2))
    before = snapshot(net)
    with pytest.raises(NotImplementedError, match="ColwiseParallel currently only support"):
        parallelize_module(net, mesh, {"0": ColwiseParallel()})
    assert_unchanged(net, before)


def test_tensor_parallelism_is_refused(pair):
    pair.run(refuse_tensor_parallel)


def convert_dtype(rank: int) -> None:
    linear = nn.Linear(8, 4, bias=False)
    with torch.no_grad():
        linear.weight.zero_()
        linear.weight[:, 0] = 0.5
        linear.weight[3, 1] = 1e-30  # bfloat16 holds it, float16 does not
    layers = nn.Sequential(LoRSLinear.from_linear(linear, r=2, layout="dense"))
    fully_shard(layers)
    if rank == 1:  # that row is process 1's
        before = snapshot(layers)
        refused(ValueError, layers.half, "rounds weights that are kept to zero", "before fully_shard")
        assert_unchanged(layers, before)
    layers.bfloat16()
    assert layers[0].weight_values.dtype == BFLOAT16
    layers(torch.ones(1, 8, dtype=BFLOAT16)).sum().backward()
    assert layers[0].lora_A.grad.full_tensor().shape == (2, 8)


def test_a_conversion_that_would_lose_a_kept_weight_is_refused(pair):
    pair.run(convert_dtype)
