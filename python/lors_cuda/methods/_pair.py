# SPDX-License-Identifier: Apache-2.0
# A method sees a layer's adapter through a Pair, whichever door the layer came through. What lora_A and lora_B are made
# of is torch.nn.utils.parametrize's business: the layer, its merge and its files read the computed tensors.
"""One adapter of one layer: lora_A [r, K] and lora_B [N, r]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._checks import check_rank
from .._distributed import copy_whole, is_sharded, sharded_like, whole, whole_attribute
from ..sparse_linear import SparseLayer

FACTORS = ("lora_A", "lora_B")


class Pair:
    """lora_A and lora_B of one layer, of :class:`lors_cuda.LoRSLinear` or of lors_cuda.peft.

    Attributes:
        name: the layer's name in the model.
        layer: the layer.
        adapter: the adapter's name in a layer of lors_cuda.peft; None in a LoRSLinear.
        scaling: s, as it was when the method started; a rank that grows or shrinks does not change it.
    """

    def __init__(self, name: str, layer: SparseLayer, adapter: str | None = None) -> None:
        self.name, self.layer, self.adapter = name, layer, adapter
        known: Any = layer
        self.scaling = float(known.scaling if adapter is None else known.scaling[adapter])
        self._hooks: list[Any] = []

    def _place(self, which: str) -> tuple[nn.Module, str]:
        """The module and the attribute that hold a factor."""
        holder: Any = getattr(self.layer, which) if self.adapter is not None else self.layer
        return (holder, which) if self.adapter is None else (holder[self.adapter], "weight")

    def __getitem__(self, which: str) -> Tensor:
        """A factor as the layer reads it, computed where it is parametrised."""
        factor: Tensor = getattr(*self._place(which))
        return factor

    def whole(self, which: str) -> Tensor:
        """A factor as the layer reads it; of what fully_shard has cut, all, gathered from every process."""
        return whole_attribute(*self._place(which))

    @property
    def is_sharded(self) -> bool:
        """Whether fully_shard has cut a factor, or what it is computed from."""
        return any(is_sharded(self.stored(which)) for which in FACTORS)

    @property
    def r(self) -> int:
        return int(self.whole("lora_A").shape[0])

    def is_parametrised(self, which: str) -> bool:
        return parametrize.is_parametrized(*self._place(which))

    def stored(self, which: str) -> nn.Parameter:
        """The parameter that a factor is computed from, or is."""
        module, attribute = self._place(which)
        if parametrize.is_parametrized(module, attribute):
            chain: Any = module.parametrizations
            module, attribute = chain[attribute], "original"
        parameter: nn.Parameter = getattr(module, attribute)
        return parameter

    def parametrise(self, which: str, how: nn.Module, start: Tensor | None = None) -> None:
        """Compute a factor as ``how(stored)`` from now on.

        Args:
            which: "lora_A" or "lora_B".
            how: a module without autocast of its own; its parameters are trained too.
            start: what is stored at first, of any shape; None: the factor as it is.
        """
        module, attribute = self._place(which)
        if start is not None:
            before = getattr(module, attribute)
            setattr(module, attribute, nn.Parameter(start.to(before), requires_grad=before.requires_grad))
        parametrize.register_parametrization(module, attribute, _InOwnType(how), unsafe=start is not None)
        if self.adapter is not None:
            # PEFT's files hold the pair under the names that every reader knows.
            self._hooks.append(module.register_state_dict_post_hook(_name_computed))

    def parametrisation(self, which: str) -> Any:
        """The module that was given to :meth:`parametrise`."""
        module, attribute = self._place(which)
        chain: Any = module.parametrizations
        return chain[attribute][0].how

    def trained(self) -> list[nn.Parameter]:
        """The parameters behind both factors that require gradients, the stored ones first."""
        modules = [self._place(which) for which in FACTORS]
        found = [self.stored(which) for which in FACTORS]
        for module, attribute in modules:
            if parametrize.is_parametrized(module, attribute):
                chain: Any = module.parametrizations
                found += chain[attribute][0].parameters()
        return [parameter for parameter in found if parameter.requires_grad]

    def state(self) -> dict[str, Tensor]:
        """What is stored behind the factors, gathered where it is sharded: parameters, and buffers that persist."""
        found: dict[str, Tensor] = {}
        for which in FACTORS:
            module, attribute = self._place(which)
            if parametrize.is_parametrized(module, attribute):
                chain: Any = module.parametrizations
                found |= {f"{self.name}.{which}.{key}": value for key, value in chain[attribute].state_dict().items()}
            else:
                found[f"{self.name}.{which}"] = self[which].detach()
        return {name: whole(tensor) for name, tensor in found.items()}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`state` gave; the names were compared before.

        Raises:
            ValueError: the tensors do not belong together.
        """
        for which in FACTORS:
            module, attribute = self._place(which)
            if not parametrize.is_parametrized(module, attribute):
                copy_whole(self[which], tensors[f"{self.name}.{which}"])
                continue
            chain: Any = module.parametrizations
            own = chain[attribute].state_dict()
            given = {key: sharded_like(own[key], tensors[f"{self.name}.{which}.{key}"]) for key in own}
            chain[attribute].load_state_dict(given)
        ranks = self.whole("lora_A").shape[0], self.whole("lora_B").shape[1]
        if ranks[0] != ranks[1]:
            raise ValueError(f"lora_A of '{self.name}' has {ranks[0]} rows, and lora_B {ranks[1]} columns.")
        self.note_rank()

    def fold(self) -> None:
        """Make both factors ordinary parameters again, of the values that they have."""
        while self._hooks:
            self._hooks.pop().remove()
        for which in FACTORS:
            module, attribute = self._place(which)
            if parametrize.is_parametrized(module, attribute):
                required = self.stored(which).requires_grad
                value = self[which].detach().clone()
                parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
                setattr(module, attribute, nn.Parameter(value, requires_grad=required))

    def replace(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Other factors, also of another rank, with the same scaling: lora_alpha is adjusted.

        Raises:
            ValueError: the rank does not fit the layer.
        """
        check_rank(lora_A.shape[0], self.layer.out_features, self.layer.in_features)
        for which, factor in zip(FACTORS, (lora_A, lora_B), strict=True):
            module, attribute = self._place(which)
            before = getattr(module, attribute)
            setattr(module, attribute, nn.Parameter(factor.detach().to(before), requires_grad=before.requires_grad))
        self.note_rank()

    def note_rank(self) -> None:
        """Tell the layer the rank that its factors have now; lora_alpha is adjusted to the same scaling."""
        layer: Any = self.layer
        if self.adapter is None:
            layer.r = self.r
            layer.scaling = self.scaling
        else:
            layer.set_rank(self.adapter, self.r)


def _name_computed(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict[str, Any]) -> None:
    """In the state of PEFT's lora_A or lora_B, puts the computed factor in the place of what it is computed from."""
    for key in [key for key in state if key.startswith(f"{prefix}parametrizations.")]:
        del state[key]
    holder: Any = module
    state[f"{prefix}weight"] = holder.weight.detach()


class _InOwnType(nn.Module):
    """Runs a parametrisation outside autocast: adapters of 16-bit weights train in float32."""

    def __init__(self, how: nn.Module) -> None:
        super().__init__()
        self.how = how

    def forward(self, stored: Tensor) -> Tensor:
        with torch.autocast(stored.device.type, enabled=False):
            factor: Tensor = self.how(stored)
            return factor
