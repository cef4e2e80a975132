# SPDX-License-Identifier: Apache-2.0
"""Models that multiply by `layer.weight` instead of calling the layer: no adapter is dead, and merged is adapted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lors_cuda import LoRSConfig, disable_adapter, get_lors_model, merge_and_unload
from lors_cuda._weight_reads import weight_readers
from models import fill_adapters, prune_two_of_four, refused

every_layout = pytest.mark.parametrize("layout", ["dense", "2:4", "bitmap"])


class Functional(nn.Module):
    """One linear is called, and `past` is multiplied by in the way that `read` chooses."""

    def __init__(self, read: str = "direct") -> None:
        super().__init__()
        self.called, self.past = nn.Linear(8, 8), nn.Linear(8, 8)
        self.inner = nn.ModuleDict({"past": nn.Linear(8, 8)})
        self.slow = False
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.read)(self.called(x))


class Direct(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return self._product(self.called(x))

    def _product(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.past.weight, self.past.bias)


class Named(Functional):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.past.weight
        return self.called(x.to(weight.dtype)) @ weight.t()


class Fetched(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return self.called(x) @ getattr(self.past, "weight").t()  # noqa: B009 (the way that is tested)


class Looped(Functional):
    def forward(self, x: Tensor) -> Tensor:
        x = self.called(x)
        for holder in (self, self):
            x = x @ holder.past.weight.t()
        return x


class Looking(Functional):
    """Asks for everything but the values, as T5 does."""

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.past.weight, Tensor) and x.dtype != self.past.weight.dtype and self.past.weight is not None:
            x = x.to(self.past.weight.data.dtype)
        weight = self.past.weight
        return self.past(self.called(x)) if hasattr(self.past, "weight") and weight.shape[1] == x.shape[-1] else x


class Switched(Functional):
    """Reads under a condition that its own attribute excludes, and one that an argument's default excludes."""

    def forward(self, x: Tensor, query: Tensor | None = None) -> Tensor:
        if self.slow and x is not None:
            return x @ self.past.weight.t()
        return self.past(self.called(x)) if query is None else query @ self.called.weight.t()


class Indexed(Functional):
    """Reaches its layers by a variable, which the source does not tell."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.called(x)
        for layer in (self.past, *self.inner.values()):
            x = nn.functional.linear(x, layer.weight, layer.bias)
        return x


def sparse(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return prune_two_of_four(kind())


def inputs() -> Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def read_of(model: nn.Module) -> dict[str, str]:
    found = weight_readers(model)
    return {name: found[module] for name, module in model.named_modules() if module in found}


@pytest.mark.parametrize(
    ("kind", "where"),
    [(Direct, "Direct._product"), (Named, "Named.forward"), (Fetched, "Fetched.forward"), (Looped, "Looped.forward")],
)
def test_a_layer_that_is_read_and_not_called_is_found_in_the_source(kind, where):
    assert read_of(sparse(kind)).pop("past") == where
    model = sparse(kind)
    with pytest.warns(UserWarning, match=f"leaves out [12] of 3 linears.*'past'.*: has its weight read by {where}"):
        get_lors_model(model, LoRSConfig(r=2))
    assert type(model.past) is nn.Linear
    config = LoRSConfig(r=2, target_modules=["called", "past"])
    refused(ValueError, lambda: get_lors_model(sparse(kind), config), "'past' cannot be adapted", where)


@pytest.mark.parametrize("kind", [Looking, Switched])
def test_looks_and_branches_that_are_off_are_no_reads(kind):
    model = sparse(kind)
    assert read_of(model) == {}
    model.slow = True
    assert ("past" in read_of(model)) == (kind is Switched)


@every_layout
@pytest.mark.parametrize("kind", [Indexed, Switched])
def test_a_read_that_is_seen_at_run_time_gets_the_merged_weight(kind, layout):
    model = get_lors_model(sparse(kind), LoRSConfig(r=2, layout=layout))
    model.slow = True  # after the conversion
    fill_adapters(model, size=0.5)
    with pytest.warns(UserWarning, match=f"{kind.__name__}.forward .*uses the weight of 'past' instead of calling"):
        output = model(inputs())
    output.sum().backward()
    for parameter in (model.past.lora_A, model.past.lora_B):
        assert bool(parameter.grad.any())
    with disable_adapter(model):
        frozen = model(inputs())
    assert not torch.allclose(frozen, output)
    merge_and_unload(model)
    torch.testing.assert_close(model(inputs()), output)


def test_a_look_at_run_time_is_silent_and_costs_no_merge(recwarn, monkeypatch):
    model = get_lors_model(sparse(Looking), LoRSConfig(r=2))
    monkeypatch.setattr(type(model.past), "merged_dense", lambda _: pytest.fail("a look at the dtype merged"))
    model(inputs())
    assert not [w for w in recwarn if "instead of calling" in str(w.message)]


def test_outside_a_forward_the_weight_is_the_frozen_one():
    base = sparse(Indexed)
    frozen = base.past.weight.detach().clone()
    model = get_lors_model(base, LoRSConfig(r=2))
    fill_adapters(model, size=0.5)
    assert torch.equal(model.past.weight, frozen)


@pytest.mark.parametrize("kind", [Indexed, Looking])
def test_compiled_forwards_get_the_merged_weight(kind):
    model = get_lors_model(sparse(kind), LoRSConfig(r=2))
    fill_adapters(model, size=0.5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(inputs())
    merge_and_unload(model)
    torch.testing.assert_close(compiled, model(inputs()))


@pytest.mark.parametrize("base", ["linear", "2:4", "bitmap"])
def test_the_layers_of_peft_do_the_same(base):
    peft_models = pytest.importorskip("peft_models")
    model = peft_models.compressed(sparse(Indexed), base)
    model = peft_models.adapted(model, target_modules="all-linear")
    with pytest.warns(UserWarning, match=r"uses the weight of 'base_model.model.past' instead"):
        output = model(inputs())
    layer = model.base_model.model.past
    output.sum().backward()
    assert bool(layer.lora_B["default"].weight.grad.any())
    with model.disable_adapter():
        assert not torch.allclose(model(inputs()), output)
    model.merge_adapter()
    torch.testing.assert_close(model(inputs()), output)
    model.unmerge_adapter()
    torch.testing.assert_close(model.merge_and_unload()(inputs()), output)
    with pytest.warns(UserWarning, match="'past': has its weight read by Direct._product"):
        peft_models.adapted(sparse(Direct), target_modules="all-linear")
    refused(ValueError, lambda: peft_models.adapted(sparse(Direct), target_modules=["past"]), "Direct._product")
