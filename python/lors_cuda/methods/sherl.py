# SPDX-License-Identifier: Apache-2.0
# The first c blocks are frozen and see no gradient. Their states h_0 .. h_c, projected to z_i = LayerNorm(down_i h_i),
# enter the late blocks as
#   up(relu(sum_i w_i z_i + z_c)) + gate h_c,   w_i = relu(fc(z_i z_c)) / sum_j relu(cos(z_i, z_j)), sum_i w_i = 1,
# where i and j run over 0 .. c - 1. Only `up`, down_i, fc, the gate and the late blocks' adapters are trained.
# SHERL, arXiv 2407.07523.
"""SHERL: a side network before the last blocks, so that the early ones keep nothing for a backward."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .._checks import check_choice, check_count
from .._linears import is_linear
from ..config import LoRSConfig
from ..sparse_linear import SparseLinear
from ..targets import SIDE_NETWORK
from ._method import Method
from .gelora import model_blocks

_GATES = ("identity", "paper")
_SHARPNESS = 0.1  # the gate is tanh(g / 0.1)


@dataclasses.dataclass(frozen=True)
class SHERL(Method):
    """Trains the last blocks and a small network in front of them, on the states of all blocks before.

    ``configure`` attaches the network to the sparse model as its module ``side_network``, compresses the early blocks'
    linears, and returns a configuration that adapts the late ones and has the network in modules_to_save: so it is
    trained, saved and loaded like any such module. To load what was saved, call :meth:`attach` on the sparse model
    first. It cannot be merged. Models are decoders of transformers, whose blocks are one list. Source: arXiv
    2407.07523; of its three forms of down_i we have Linear and LayerNorm.

    Args:
        late: blocks at the end through which gradients run, at least 1 and fewer than there are.
        reduction: the hidden size over the network's width, at least 1.
        gate: "identity" (ours) begins as the sparse model, with 1 + tanh(g / 0.1) and up = 0; "paper" with
            tanh(g / 0.1) = 0, which drops the model's own state at first, and a random up.
    """

    late: int = 1
    reduction: int = 8
    gate: str = "identity"
    name: ClassVar[str] = "sherl"

    def __post_init__(self) -> None:
        check_choice("gate", self.gate, _GATES)
        for field in ("late", "reduction"):
            check_count(field, getattr(self, field))

    def configure(
        self, config: LoRSConfig, model: nn.Module | None = None, batches: Iterable[Any] | None = None
    ) -> LoRSConfig:
        if model is None:
            raise ValueError("SHERL puts a side network into the model: configure(config, model).")
        early = self.attach(model, config.layout)
        configured = copy.deepcopy(config)
        configured.modules_to_save = [*(config.modules_to_save or []), SIDE_NETWORK]
        others = config.exclude_modules
        names = "|".join(map(re.escape, early))
        if isinstance(others, str):
            configured.exclude_modules = f"(?:{others})|{names}"
        else:
            configured.exclude_modules = [*(others or []), *early]
        return configured

    def attach(self, model: nn.Module, layout: str = "auto") -> list[str]:
        """Put a new side network into a sparse model, which is not converted yet, and compress its early blocks.

        Args:
            model: a decoder of transformers.
            layout: of the early blocks' linears, as in :class:`lors_cuda.LoRSConfig`.

        Returns:
            The names of the early blocks' linears.

        Raises:
            ValueError: it has a side network, no list of blocks, or no block before the late ones; nothing is changed.
        """
        if hasattr(model, SIDE_NETWORK):
            raise ValueError(f"The model has a module '{SIDE_NETWORK}' already; load the sparse model again.")
        settings: Any = getattr(model, "config", None)
        count, width = (getattr(settings, key, None) for key in ("num_hidden_layers", "hidden_size"))
        if not isinstance(count, int) or not isinstance(width, int) or getattr(settings, "is_encoder_decoder", False):
            raise ValueError(
                f"{type(model).__name__} is no decoder of transformers whose configuration has num_hidden_layers and "
                "hidden_size; SHERL needs one."
            )
        name, blocks = model_blocks(model, count)
        if self.late >= count:
            raise ValueError(f"late is {self.late}, and the model has {count} blocks; at least one must come before.")
        if self.reduction > width:
            raise ValueError(f"reduction is {self.reduction}, and the hidden size {width}; it must not exceed that.")
        early = [
            f"{name}.{number}.{inner}"
            for number in range(count - self.late)
            for inner, module in blocks[number].named_modules()
            if is_linear(module)
        ]
        dtype = torch.promote_types(next(blocks.parameters()).dtype, torch.float32)
        side = SideNetwork(width, width // self.reduction, count - self.late + 1, self.gate)
        for each in early:
            parent, _, child = each.rpartition(".")
            linear: Any = model.get_submodule(each)
            setattr(model.get_submodule(parent), child, SparseLinear.compress(linear, layout))
        model.add_module(SIDE_NETWORK, side.to(next(blocks.parameters()).device, dtype))
        _Route(model).through(blocks, count - self.late)
        return early


class SideNetwork(nn.Module):
    """What the late blocks are given, from the states of the blocks before.

    Args:
        width: of the states. inner: of z_i. count: c + 1 states. gate: as in :class:`SHERL`.
    """

    unmergeable = "SHERL's side network has no place in a merged model, which its late blocks would need"

    def __init__(self, width: int, inner: int, count: int, gate: str) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            self.down = nn.ModuleList(nn.Sequential(nn.Linear(width, inner), nn.LayerNorm(inner)) for _ in range(count))
            self.fc = nn.Linear(inner, 1)
            self.up = nn.Linear(inner, width)
        self.gate = nn.Parameter(torch.zeros(1))
        self.own = float(gate == "identity")  # the share of h_c that needs no gate
        if gate == "identity":
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, states: list[Tensor]) -> Tensor:
        """States h_0 .. h_c, each [..., width], to one of the same shape and dtype."""
        deepest = states[-1].to(self.gate.dtype)
        z = [down(state.to(self.gate.dtype)) for down, state in zip(self.down, states, strict=True)]
        mixed = self.up(mix(torch.stack(z[:-1], -2), z[-1], self.fc))
        own: Tensor = (mixed + (self.own + torch.tanh(self.gate / _SHARPNESS)) * deepest).to(states[-1].dtype)
        return own


def mix(shallow: Tensor, deepest: Tensor, fc: nn.Module) -> Tensor:
    """relu(sum_i w_i z_i + z_c) of shallow [..., c, h] and deepest [..., h]."""
    unit = nn.functional.normalize(shallow, dim=-1, eps=1e-12)
    alike = torch.relu(unit @ unit.transpose(-1, -2)).sum(-1, keepdim=True).clamp_min(1e-6)
    weight = torch.relu(fc(shallow * deepest.unsqueeze(-2))) / alike
    weight = weight / weight.sum(-2, keepdim=True).clamp_min(1e-12)
    return torch.relu((weight * shallow).sum(-2) + deepest)


class _Route:
    """Hooks that collect the early blocks' states and hand the late ones what the side network makes of them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.states: list[Tensor] = []

    def through(self, blocks: nn.ModuleList, late: int) -> None:
        blocks[0].register_forward_pre_hook(self.begin, with_kwargs=True)
        for block in blocks[:late]:
            block.register_forward_hook(self.collect)
        blocks[late].register_forward_pre_hook(self.enter, with_kwargs=True)

    def begin(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state, args, kwargs = _hidden(args, kwargs)
        self.states = [state.detach()]  # also where the embeddings were told to give gradients
        return _with_hidden(self.states[0], args, kwargs)

    def collect(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.states.append(output[0] if isinstance(output, tuple) else output)

    def enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state, args, kwargs = _hidden(args, kwargs)
        if not self.states or state is not self.states[-1]:
            raise ValueError(
                "SHERL's late blocks were given another state than the early ones have made: recomputed after another "
                "forward (activation checkpointing), or called by themselves. Run backward before the next forward."
            )
        side: Any = getattr(self.model, SIDE_NETWORK)
        mixed = side(self.states)
        if not torch.is_grad_enabled():
            self.states = []
        return _with_hidden(mixed, args, kwargs)


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """A block's hidden states, and its other arguments."""
    if args:
        return args[0], args[1:], kwargs
    others = dict(kwargs)
    return others.pop("hidden_states"), (), others


def _with_hidden(state: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return (state, *args), kwargs
