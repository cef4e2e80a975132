# SPDX-License-Identifier: Apache-2.0
# PEFT adapts a parameter by wrapping its module, once for each parameter, and computes the whole adapted stack in every
# forward. Here the experts' module becomes a LoRSExperts first, whose stacks are modules, and each is adapted like any
# layer. Only the names in files are PEFT's (LoRSLoraModel renames them).
"""LoRSLoraExpertWeight: PEFT's LoRA with masked adapters on the stacked weights of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .._checks import check_adapters
from ..adapter_directory import file_names, from_file
from ..experts import LoRSExperts, SparseExpertWeight, is_experts, stack_names
from ..functional import layer_grouped_linear
from .config import LoRSLoraConfig
from .layer import LoRSLoraLinear


class LoRSLoraExpertWeight(LoRSLoraLinear):
    """The masked adapters of PEFT on the frozen weights of a layer's experts: of expert e
    ``Y_e = X_e (W_e + sum_i s_i M_e o (B_ie A_ie))^T + bias_e``.

    A :class:`LoRSLoraLinear` inside a :class:`lors_cuda.experts.LoRSExperts`, whose base layer is a
    :class:`lors_cuda.experts.SparseExpertWeight`. ``lora_A[name].weight`` is [E r, K] and ``lora_B[name].weight``
    [N, r E], as in PEFT's wrappers of parameters.

    Attributes:
        num_experts: E.
    """

    base_layer: SparseExpertWeight

    @property
    def num_experts(self) -> int:  # type: ignore[override]
        return self.base_layer.num_experts

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoRSLoraConfig, **kwargs: Any) -> None:
        """Add an adapter, as PEFT does.

        Raises:
            ValueError: the configuration asks for what adapters of experts cannot have.
        """
        refused = {
            "lora_dropout": config.lora_dropout,
            "init_lora_weights": config.init_lora_weights if config.init_lora_weights == "orthogonal" else None,
            "rounding": config.rounding if config.rounding != "nearest" else None,
            "requantize": config.requantize,
        }
        for field, value in refused.items():
            if value:
                raise ValueError(
                    f"{field}={value!r} is not supported for adapters of experts. Leave it out, or the experts "
                    "(exclude_modules=['experts'], or no target_parameters)."
                )
        super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)
        like = self.lora_A[adapter_name].weight
        options: dict[str, Any] = {"bias": False, "device": like.device, "dtype": like.dtype}
        self.lora_A[adapter_name] = nn.Linear(self.in_features, r * self.num_experts, **options)
        self.lora_B[adapter_name] = nn.Linear(r * self.num_experts, self.out_features, **options)
        if config.init_lora_weights:
            self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """lora_A [E, r, K] and lora_B [E, N, r] of an adapter."""
        stored = (("lora_A", self.lora_A[name].weight), ("lora_B", self.lora_B[name].weight))
        lora_A, lora_B = (from_file(which, tensor, self.num_experts) for which, tensor in stored)
        return lora_A, lora_B

    def forward(self, x: Tensor, offsets: Tensor, rows: Tensor | None = None, **kwargs: Any) -> Tensor:
        """As :meth:`lors_cuda.experts.LoRSExpertWeight.forward`."""
        if kwargs:
            raise ValueError(
                f"{', '.join(kwargs)} is not supported with adapters of experts, whose rows are not samples. Give each "
                "batch one adapter: model.set_adapter(name)."
            )
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not names:
            output: Tensor = self.base_layer(x, offsets, rows)
            return output
        if not self._is_one_matmul(names):
            raise ValueError(
                "The active adapters have different gradients ('lors', 'exact'), and of experts they are merged into "
                "one weight. Give all the same."
            )
        base = self.base_layer
        kept = self.merged_weight if len(names) == 1 and not isinstance(self.scaling[names[0]], Tensor) else None
        weight, (lora_A, lora_B, scaling) = base.check_mask(), self.stacked(names)
        check_adapters(weight, lora_A, lora_B, experts=True)
        gradient = self.gradient[names[0]]
        return layer_grouped_linear(x, offsets, weight, lora_A, lora_B, scaling, base.bias, gradient, kept, rows=rows)

    def restored_base(self) -> nn.Module:
        return self.base_layer

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """What PEFT puts in this layer's place: its base, merged if asked; `experts_before` restores the module."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            self.unmerged_values = None  # not twice in memory; the layer is dropped
        return self.base_layer


def stacks_of(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """{path: (the experts, the stack's name there)} of a model, whether it is converted or not."""
    found = {}
    for path, module in model.named_modules():
        if is_experts(module):
            names = stack_names(module)
        elif isinstance(module, LoRSExperts):
            names = stack_names(module.before)
        else:
            continue
        found.update({f"{path}.{name}".lstrip("."): (module, name) for name in names})
    return found


def convert_experts(model: nn.Module, path: str, layout: str) -> None:
    """Put a LoRSExperts, without adapters, in the place of the experts at `path`."""
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, LoRSExperts(model.get_submodule(path), layout, {}))


def experts_before(model: nn.Module) -> None:
    """Put transformers' modules in the place of every LoRSExperts whose stacks have no adapters."""
    for path, module in list(model.named_modules()):
        if isinstance(module, LoRSExperts):
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, module.merge())


def names_in_file(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """{module: its name in the file} of the stacks that have this adapter."""
    layers = {
        name: module.num_experts
        for name, module in model.named_modules()
        if isinstance(module, LoRSLoraExpertWeight) and adapter_name in module.lora_A
    }
    return file_names(layers)


def renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """A state with the modules of its adapters' tensors called by other names."""

    def called(key: str) -> str:
        module, separator, rest = key.rpartition(".lora_")
        return f"{names.get(module, module)}{separator}{rest}"

    return {called(key): tensor for key, tensor in state.items()}
