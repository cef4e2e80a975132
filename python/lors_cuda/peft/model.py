# SPDX-License-Identifier: Apache-2.0
# The tuner that PEFT makes for a LoRSLoraConfig: it checks everything, compresses the targets, lets PEFT do the rest.
"""LoRSLoraModel: PEFT's LoraModel with masked adapters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.lora import Linear, LoraModel
from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK
from peft.utils.integrations import skip_init_on_device
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.peft_types import PeftType
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._checks import all_finite, check_has_values, check_whole, joined
from .._distributed import check_gathered
from .._draws import derived_seed
from .._linears import is_linear
from .._saving import guard_saving, unguard_saving
from ..adapter_directory import FORMER_PEFT_TYPE, PREFIX
from ..advice import new_heads, warn_of_conversion
from ..experts import LoRSExperts, SparseExpertWeight
from ..model import check_mergeable, check_no_method, dither_seed_of
from ..sparse_linear import SparseLinear
from ..targets import Target
from .config import PEFT_METHOD, LoRSLoraConfig
from .experts import LoRSLoraExpertWeight, convert_experts, experts_before, names_in_file, renamed
from .layer import LoRSLoraLinear
from .targets import candidates, check_targets, fingerprints, named_peft_layers, selected, spell_out, target_of


class LoRSLoraModel(LoraModel):  # type: ignore[misc]
    """The tuner behind ``peft.get_peft_model(model, LoRSLoraConfig(...))``; use that."""

    _combines = False  # while adapters are combined into one, whose rank may exceed a layer's sides

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Compress the target weights one by one, each dense one freed at once, and put adapters on them.

        Raises:
            ValueError, TypeError: the configuration or a target cannot be used; the model is unchanged.
        """
        config = self.peft_config[adapter_name]
        if not isinstance(config, LoRSLoraConfig):
            raise TypeError(
                f"The adapter '{adapter_name}' has a {type(config).__name__}, but this model's adapters are masked: "
                "use lors_cuda.peft.LoRSLoraConfig."
            )
        config.validate()
        config = self._prepare_adapter_config(config, self.get_model_config(model))
        spell_out(config, model)
        targets = self._targets(model, config, state_dict)
        new = config.is_new and state_dict is None and not self._combines
        check_targets(targets, model, config, new=new)
        found = fingerprints(targets, config)
        heads = new_heads(model) if new else []
        unconverted = [name for name, target in targets.items() if not target.stack and is_linear(target.module)]
        experts = {name.rpartition(".")[0]: None for name, target in targets.items() if target.stack}
        targets.clear()  # the last reference to a dense weight must be the model's
        with unchanged_on_error(model, adapter_name):
            for name in unconverted:
                _compress(model, name, config.layout)
            for name in experts:
                convert_experts(model, name, config.layout)
            super().inject_adapter(
                model,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                state_dict=state_dict,
            )
        for name, value in found.items():
            layer: Any = model.get_submodule(name)
            layer.fingerprint = value
            layer.rounding_seed = derived_seed(config.rounding_seed, "rounding", name)
            layer.dither_seed = dither_seed_of(config, name)
            layer.base_was_linear |= name in unconverted
            config.adapted[name] = (layer.r, layer.scaling, adapter_name)
        config.fingerprints, config.trained_on = found, None
        if new:
            adapted = {layer.storage for _, layer in named_peft_layers(model) if adapter_name in layer.lora_A}
            warn_of_conversion(model, adapted, heads, config.modules_to_save, stacklevel=2)
        guard_saving(model)

    def _targets(
        self, model: nn.Module, config: LoRSLoraConfig, state_dict: dict[str, Tensor] | None
    ) -> dict[str, Target]:
        """What PEFT will adapt: what the configuration selects, or the modules that a state names."""
        if state_dict is None:
            return selected(model, config)
        named = {key.rsplit(f".{self.prefix}", 1)[0].removeprefix("_orig_mod.") for key in state_dict}
        return {name: target_of(name, module, config) for name, module in candidates(model) if name in named}

    @staticmethod
    def _check_target_module_exists(config: LoRSLoraConfig, key: str) -> Any:
        # The stacks of a LoRSExperts are modules, which target_parameters has chosen.
        chosen = config.stacks.get(key)
        return LoraModel._check_target_module_exists(config, key) if chosen is None else chosen

    def _inject_parameters(self, peft_config: LoRSLoraConfig, *args: Any, **kwargs: Any) -> list[str]:
        return [path for path, chosen in peft_config.stacks.items() if chosen]  # which have their adapters by now

    @staticmethod
    def _create_new_module(
        lora_config: LoRSLoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> LoRSLoraLinear:
        kwargs.pop("device_map", None)
        kind = LoRSLoraExpertWeight if isinstance(target, SparseExpertWeight) else LoRSLoraLinear
        return kind(target, adapter_name, config=lora_config, **kwargs)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT also moves the adapters to the device of `weight`, which decompresses it; the layer itself has done so.
        setattr(parent, child_name, new_module)

    # ---- merging: whatever can be refused is refused before the first layer is changed ----

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As in PEFT; nothing is merged if an adapter or a merged weight is not finite, whatever ``safe_merge`` says.

        Raises:
            ValueError: that, or a name is no adapter's.
        """
        self._check_merge(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        check_no_method(self, "merged or unloaded")
        if merge:
            check_mergeable(self.model)
            self._check_merge(adapter_names)
        model: nn.Module = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        experts_before(model)
        unguard_saving(model)
        return model

    def _check_merge(self, adapter_names: list[str] | None) -> None:
        """Refuse names of no adapter, for which PEFT would merge nothing, and what is not finite, also once merged."""
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names must be a list of names, but is the string {adapter_names!r}.")
        unknown = [name for name in adapter_names or [] if name not in self.peft_config]
        if unknown:
            raise ValueError(
                f"There is no adapter {unknown[0]!r}, so nothing was merged. The model has "
                f"{', '.join(map(repr, self.peft_config))}."
            )
        check_gathered(self.model)
        for name, layer in named_peft_layers(self.model):
            check_whole(f"The weight of '{name}'", layer.stored_values)
            check_has_values(f"The weight of '{name}'", layer.stored_values)
            merging = [each for each in adapter_names or layer.active_adapters if each in layer.lora_A]
            for adapter in merging:
                for which in (layer.lora_A, layer.lora_B):
                    if not all_finite(which[adapter].weight):
                        raise ValueError(
                            f"The adapter '{adapter}' of '{name}' holds NaN or infinity, so nothing was merged. Put "
                            "finite values back (an earlier checkpoint, a lower learning rate) and merge again."
                        )
            joining = [each for each in merging if each not in layer.merged_adapters]
            try:
                if joining:
                    layer.merged_values([*layer.merged_adapters, *joining])
            except ValueError as error:
                raise ValueError(f"Layer '{name}': {error} Nothing was merged.") from error

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """As in PEFT. "cat", and "svd" with a sufficient svd_rank, give the sum, masked; the others approximate it.

        Raises:
            ValueError: an adapter uses use_rslora: PEFT then scales the sum by the root of its rank.
        """
        scaled = [name for name in adapters if name in self.peft_config and self.peft_config[name].use_rslora]
        if scaled:
            raise ValueError(
                f"The adapter '{scaled[0]}' has use_rslora=True, and PEFT would scale a weighted sum by the root of "
                "its rank. Activate the adapters together instead: model.base_model.set_adapter([...])."
            )
        self._combines = True
        try:
            super().add_weighted_adapter(adapters, *args, **kwargs)
        finally:
            self._combines = False

    def _svd_generalized_task_arithmetic_weighted_adapter(
        self, combination_type: str, adapters: list[str], weights: list[float], new_rank: int, target: Any, *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        # Of B A without the mask, whose rank is low; the layer masks the result. With the mask it would have full rank.
        unmasked = SimpleNamespace(
            lora_A=target.lora_A,
            lora_embedding_A=target.lora_embedding_A,
            get_delta_weight=partial(Linear.get_delta_weight, target),
        )
        return super()._svd_generalized_task_arithmetic_weighted_adapter(
            combination_type, adapters, weights, new_rank, unmasked, *args, **kwargs
        )

    # ---- saving and loading ----

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, *, adapter_name: str, **kwargs: Any) -> dict[str, Tensor]:
        state = super()._get_adapter_state_dict(model=model, adapter_name=adapter_name, **kwargs)
        return renamed(state, names_in_file(model, adapter_name))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: LoRSLoraConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As in PEFT, which calls it before it copies tensors; refuses a state that does not fit this adapter."""
        own_names = {called: name for name, called in names_in_file(model, adapter_name).items()}
        # A model that is no PeftModel has its names without the prefix of the file.
        own_names |= {f"{PREFIX}{called}": f"{PREFIX}{name}" for called, name in own_names.items()}
        state_dict = renamed(state_dict, own_names)
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        problems = _state_problems(model, adapter_name, remapped)
        if problems:
            raise ValueError(
                f"The tensors do not fit the adapter '{adapter_name}', none was loaded. {joined(problems)}"
            )
        return remapped


def _state_problems(model: nn.Module, adapter_name: str, state: Mapping[str, Tensor]) -> list[str]:
    """Why tensors under the model's names do not fit its adapter, as sentences; [] if they do."""
    own = {
        f"{name}.{which}.{adapter_name}.weight": getattr(layer, which)[adapter_name].weight
        for name, layer in named_peft_layers(model)
        for which in ("lora_A", "lora_B")
        if adapter_name in layer.lora_A
    }
    problems = [f"There is no tensor for '{key}'." for key in own if key not in state]
    computed = [key for key in own if parametrize.is_parametrized(model.get_submodule(key.rpartition(".")[0]))]
    if computed:
        problems.append(
            f"'{computed[0]}' is computed by the method that trains the model: resume with run.load(checkpoint), or "
            "call run.finish() first."
        )
    for key, tensor in state.items():
        if key not in own:
            if ".lora_A." in key or ".lora_B." in key:
                problems.append(f"There is a tensor '{key}', and the model has no such adapter.")
        elif tensor.shape != own[key].shape:
            problems.append(f"'{key}' has shape {list(tensor.shape)}, but {list(own[key].shape)} is needed.")
        elif not tensor.is_floating_point():
            problems.append(f"'{key}' has dtype {tensor.dtype}, but a floating-point one is needed.")
    return problems


@skip_init_on_device  # or PEFT's low_cpu_mem_usage, meant for new adapters, would put the weight on the meta device
def _compress(model: nn.Module, name: str, layout: str) -> None:
    """Put a SparseLinear in the place of a linear."""
    parent, _, child = name.rpartition(".")
    linear = model.get_submodule(name)
    setattr(model.get_submodule(parent), child, SparseLinear.compress(linear, layout))  # type: ignore[arg-type]


# ---- PEFT changes a model step by step, and leaves it so if a later step fails ----


@contextlib.contextmanager
def unchanged_on_error(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """If the block raises, take back what adding this adapter has changed in `model`: modules, flags, PEFT's record."""
    # Names, not modules: nothing here may keep a dense weight alive that is being compressed.
    kinds = {name: type(module) for name, module in model.named_modules()}
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    known = list(getattr(model, "peft_config", {}))
    try:
        yield
    except BaseException:
        for name, module in list(model.named_modules()):
            if isinstance(module, LoRSExperts) and kinds.get(name) is not LoRSExperts:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module.without_adapters())
        for name, module in list(model.named_modules()):
            if kinds.get(name) is type(module):
                _without(module, adapter_name)
                continue
            restored = _unwrapped(module)
            if type(restored) is SparseLinear and kinds.get(name) not in (None, SparseLinear):
                restored = restored.to_linear()
            if restored is not module:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, restored)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required.get(name, parameter.requires_grad))
        record: Any = getattr(model, "peft_config", None)
        if isinstance(record, dict) and adapter_name not in known:
            record.pop(adapter_name, None)
            if not known:
                del model.peft_config
        unguard_saving(model)
        raise


def _without(module: nn.Module, adapter_name: str) -> None:
    """Delete the adapter from a module that had others before."""
    if not isinstance(module, (LoRSLoraLinear, AuxiliaryTrainingWrapper)):
        return
    if adapter_name not in module._get_available_adapters():
        return
    if isinstance(module, LoRSLoraLinear):
        module.delete_adapter(adapter_name)
    else:
        others = [name for name in module.active_adapters if name != adapter_name]
        module.delete_adapter(adapter_name, new_active_adapters=others[:1])


def _unwrapped(module: nn.Module) -> nn.Module:
    """What stood in the place of a module that is new."""
    if isinstance(module, LoRSLoraLinear):
        return module.base_layer
    if isinstance(module, AuxiliaryTrainingWrapper):
        original: nn.Module = module.original_module
        return original
    return module


# What `peft.utils.register_peft_method` does, which takes the names of PEFT's own enumeration only.
PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_METHOD] = LoRSLoraConfig
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_METHOD] = LoRSLoraModel
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_METHOD] = LoRSLoraModel.prefix
PEFT_TYPE_TO_CONFIG_MAPPING[FORMER_PEFT_TYPE] = LoRSLoraConfig  # which writes the new one
# Hotswapping compares these fields of two adapters; "lors" holds the fingerprints of the base.
CONFIG_KEYS_TO_CHECK[PEFT_METHOD] = [*CONFIG_KEYS_TO_CHECK[PeftType.LORA], "lors"]
