# SPDX-License-Identifier: Apache-2.0
# Models with PEFT's wrapping, and what they must compute by the reference, for the test_peft_*.py files.
"""PEFT models that several test files share; skips where peft is not installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from lors_cuda import SparseLinear, reference
from models import tiny_net

peft = pytest.importorskip("peft")

import lors_cuda.peft as lors_peft  # noqa: E402 (peft may be missing; tests take it from here)

LoRSLoraConfig, LoRSLoraLinear = lors_peft.LoRSLoraConfig, lors_peft.LoRSLoraLinear

every_layout = pytest.mark.parametrize("layout", ["dense", "2:4", "bitmap"])
every_base = pytest.mark.parametrize("base", ["linear", "dense", "2:4", "bitmap"])
LAYERS = ("0", "2")  # of tiny_net


def config_of(**fields: object) -> LoRSLoraConfig:
    return LoRSLoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": list(LAYERS), **fields})


def net(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return tiny_net(seed, dtype)


def compressed(model: nn.Module, layout: str) -> nn.Module:
    """The model with each linear stored sparse, as a base that was loaded so; "linear" leaves it as it is."""
    for name, module in list(model.named_modules()):
        if layout != "linear" and isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, SparseLinear.compress(module, layout))
    return model


def adapted(model: nn.Module | None = None, adapters: Sequence[str] = ("default",), **fields: object) -> nn.Module:
    """A PEFT model, by default of tiny_net in float64, with filled adapters; in evaluation."""
    model = net() if model is None else model
    result = peft.get_peft_model(model, config_of(**fields), adapter_name=adapters[0])
    for name in adapters[1:]:
        result.add_adapter(name, config_of(**fields))
    fill(result)
    return result.eval()


def fill(model: nn.Module, seed: int = 0, size: float = 0.3) -> None:
    """Give every adapter other random values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)


def layers(model: nn.Module) -> dict[str, LoRSLoraLinear]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoRSLoraLinear)
    }


def inputs(rows: int = 5, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def merged_reference(model: nn.Module, adapters: Sequence[str] = ("default",)) -> dict[str, Tensor]:
    """{layer: W + sum of s M o (B A)} of an adapted tiny_net, from a fresh base, in float64."""
    base, result = net(), {}
    for name, layer in layers(model).items():
        weight = base.get_submodule(name).weight.detach().double()
        total = weight.clone()
        for each in adapters:
            pair = layer.lora_A[each].weight.detach(), layer.lora_B[each].weight.detach()
            total += reference.merge(weight, *pair, float(layer.scaling[each])) - weight
        result[name] = total
    return result


def output_reference(model: nn.Module, x: Tensor, adapters: Sequence[str] = ("default",)) -> Tensor:
    """What an adapted tiny_net must return."""
    weights, bias = merged_reference(model, adapters), net()[2].bias.detach().double()
    return torch.relu(x.double() @ weights["0"].T) @ weights["2"].T + bias


def check_output(model: nn.Module, adapters: Sequence[str] = ("default",), call: Callable | None = None) -> None:
    x = inputs()
    torch.testing.assert_close((call or model)(x).detach(), output_reference(model, x, adapters))
