# SPDX-License-Identifier: Apache-2.0
# Small models for the model-level tests: a Llama of transformers' own class and nets of a few linears, pruned 2:4.
"""Models that several test files share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lors_cuda import SparseLinear, SparseWeight, targets
from lors_cuda.config import LoRSConfig
from lors_cuda.model import get_lors_model

VOCABULARY = 64


def prune_two_of_four(model: nn.Module) -> nn.Module:
    """Zero the two smallest of each aligned group of four in every nn.Linear, except a head called lm_head."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and not name.endswith("lm_head"):
                groups = module.weight.view(module.out_features, -1, 4)
                smallest = groups.abs().argsort(dim=-1)[..., :2]
                groups.scatter_(-1, smallest, 0.0)
    return model


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32, layers: int = 2) -> nn.Module:
    """A pruned Llama with hidden size 32 and 64 tokens; skips the test where transformers is not installed."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        initializer_range=0.1,  # the default 0.02 leaves a model this small with almost uniform output
    )
    return prune_two_of_four(transformers.LlamaForCausalLM(config).to(dtype).eval())


def quantised(
    model: nn.Module, kind: str = "int4", group: int | None = 32, layout: str = "2:4", symmetric: bool = True
) -> nn.Module:
    """The model with each linear's weight as codes, as one that was loaded so; a head called lm_head stays."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and not name.endswith("lm_head"):
            weight = SparseWeight.quantize(module.weight, None, kind, group, symmetric=symmetric, layout=layout)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, SparseLinear(weight, module.bias))
    return model


def tiny_net(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Linear 8 -> 16, ReLU, Linear 16 -> 12 with bias, pruned; its linears are called "0" and "2"."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 12))
    prune_two_of_four(net)
    return net.to(dtype)


def tokens(seed: int = 0, batch: int = 2, length: int = 16) -> Tensor:
    """Random token numbers [batch, length]."""
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def batch(seed: int = 0) -> dict[str, Tensor]:
    """A language-modelling batch for `model(**batch).loss`."""
    ids = tokens(seed)
    return {"input_ids": ids, "labels": ids.clone()}


def logits(model: nn.Module, seed: int = 0) -> Tensor:
    """The model's logits [2, 16, 64] without gradients."""
    with torch.no_grad():
        return model(input_ids=tokens(seed)).logits


def fill_adapters(model: nn.Module, seed: int = 0, size: float = 0.05) -> None:
    """Give every lora_A and lora_B random values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("lora_A", "lora_B")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)


def trained(dtype: torch.dtype = torch.float32, **fields) -> nn.Module:
    """A converted tiny Llama whose adapters, and modules_to_save, have changed."""
    model = get_lors_model(tiny_llama(dtype=dtype), LoRSConfig(**{"r": 4, "lora_alpha": 8, **fields}))
    fill_adapters(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.endswith(("lora_A", "lora_B")):
            parameter.data += 0.1
    return model


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything of a model that a refused call must not change: names, classes, flags and values."""
    return {
        "modules": [(name, type(module).__name__, module.training) for name, module in model.named_modules()],
        "required": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "attributes": sorted(vars(model)),
    }


def assert_unchanged(model: nn.Module, before: dict[str, object]) -> None:
    """Compare with a snapshot, values bit for bit."""
    after = snapshot(model)
    assert after["modules"] == before["modules"]
    assert after["required"] == before["required"]
    assert after["attributes"] == before["attributes"]
    old, new = before["values"], after["values"]
    assert list(old) == list(new)
    for name in old:
        torch.testing.assert_close(new[name], old[name], rtol=0, atol=0, equal_nan=True)


def refused(exception: type[Exception], call: Callable[[], object], *fragments: str) -> str:
    """Run `call`, which must raise `exception` with a message that holds every fragment; return the message."""
    with pytest.raises(exception) as caught:
        call()
    message = str(caught.value)
    for fragment in fragments:
        assert fragment in message, f"{fragment!r} is missing in: {message}"
    return message


def searched_models(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Grows by a model whenever targets are searched in one."""
    searched: list[nn.Module] = []

    class Counted(targets.Places):
        def __init__(self, model: nn.Module) -> None:
            searched.append(model)
            super().__init__(model)

    monkeypatch.setattr(targets, "Places", Counted)
    return searched
