# SPDX-License-Identifier: Apache-2.0
# The layer of LoRS adapters in PEFT. Fused wherever one matmul with the merged weight is the answer: any number of
# active adapters, no dropout in effect. Otherwise PEFT's own forward, with the masked update as the side branch.
"""LoRSLoraLinear: PEFT's LoRA layer with masked adapters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import Linear
from peft.tuners.lora.layer import LoraVariant
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from .._checks import check_adapters, check_stored
from .._draws import Draws
from .._linears import make_linear
from .._weight_reads import reads_past
from ..fingerprints import Fingerprint
from ..functional import layer_linear, lors_linear, merge, stored_merge
from ..sparse_linear import SparseLayer, SparseLinear
from ..weight import SparseWeight
from .config import LoRSLoraConfig

# How adapters are merged: those of one layer must agree.
MERGING_FIELDS = ("rounding", "rounding_seed", "requantize", "remainder", "dither_seed")


class MaskedVariant(LoraVariant):  # type: ignore[misc]
    """The side branch: ``result + dropout(x) (s M o (B A))^T``, where dropout or other samples need it apart from W."""

    def supports_lora_conversion(self) -> bool:
        return False  # PEFT would keep the low rank and lose the mask

    @staticmethod
    def init(module: LoRSLoraLinear, adapter_name: str, **kwargs: Any) -> None:
        pass

    @staticmethod
    def forward(module: LoRSLoraLinear, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        if module.requantize:
            raise ValueError(
                "The layer's merged weight is requantised, and here no weight is merged: dropout, adapters with "
                "different gradients or adapter_names keep adapters apart from it. Set lora_dropout=0 and use one kind "
                "of gradient, or requantize=False."
            )
        if module.draws(module.training).any:
            raise ValueError(
                "The layer's merged weight is rounded by chance or has noise (rounding='stochastic', Flat-LoRA), and "
                "here no weight is merged: dropout, adapters with different gradients or adapter_names keep adapters "
                "apart from it. Set lora_dropout=0 and use one kind of gradient, or rounding='nearest'."
            )
        # Codes are computed with in the type of the activations.
        zeros = module.zero_weight(result.dtype if module.base_layer.kind else None)
        lora_A, lora_B, scaling = module.stacked([active_adapter])
        x = module.lora_dropout[active_adapter](x.to(zeros.dtype))  # PEFT hands it over in the adapter's dtype
        gradient = module.gradient[active_adapter]
        return result + lors_linear(x, zeros, lora_A, lora_B, scaling, gradient=gradient)


class LoRSLoraLinear(Linear, SparseLayer):  # type: ignore[misc]
    """PEFT's LoRA layer on a frozen sparse linear: ``Y = X (W + sum_i s_i M o (B_i A_i))^T + bias`` (arXiv 2501.08582).

    The base layer is a :class:`lors_cuda.SparseLinear`, also where its layout is "dense", so that there is one place
    that keeps masks: what it says of averages, conversions and states holds here. Adapters are
    PEFT's: ``lora_A[name].weight`` [r, K], ``lora_B[name].weight`` [N, r].

    Attributes:
        gradient: {adapter name: "lors" or "exact"}.
        unmerged_values: the base's stored values while adapters are merged, so that unmerge restores every bit; None
            otherwise. NOTE: a merged layer therefore stores its values twice.
        base_was_linear: the base layer was an ``nn.Linear``; ``unload`` gives one back.
        mask_was_implicit: the base, of layout "dense", was given mask bits for the time that adapters are merged.
        fingerprint: of the base layer's weight, None before the first adapter is complete.
    """

    other_param_names = (*Linear.other_param_names, "gradient")
    has_adapters = True
    base_layer: SparseLinear
    unmerged_values: Tensor | None
    base_was_linear = False
    mask_was_implicit = False
    fingerprint: Fingerprint | None = None
    _merging: tuple[Any, ...] = ()  # how its adapters' configurations say that they are merged

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoRSLoraConfig, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        # For PEFT's code: adapters and stored weight have one orientation, also of a Conv1D.
        self.fan_in_fan_out = False
        self.register_buffer("unmerged_values", None, persistent=False)

    # ---- adapters ----

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoRSLoraConfig, **kwargs: Any) -> None:
        """Add an adapter, as PEFT does; refuse a configuration that does not ask for masked ones."""
        if not isinstance(config, LoRSLoraConfig):
            raise TypeError(
                f"The adapter '{adapter_name}' has a {type(config).__name__}, and this layer's adapters are masked; "
                "use lors_cuda.peft.LoRSLoraConfig, or add the adapter to a model of its own."
            )
        self.__dict__.setdefault("gradient", {})
        wanted = tuple(getattr(config, name) for name in MERGING_FIELDS)
        if self.gradient and wanted != self._merging:
            own, others = (
                ", ".join(f"{name}={value!r}" for name, value in zip(MERGING_FIELDS, values, strict=True))
                for values in (wanted, self._merging)
            )
            raise ValueError(
                f"The adapter '{adapter_name}' has {own}, and the layer's others {others}; they are merged into one "
                "weight, which is rounded once. Give all the same."
            )
        self._merging, self.rounding = wanted, config.rounding
        if not self.gradient:
            self.set_requantization(config.requantize, config.remainder, config.dither_seed)
        super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)
        self.gradient[adapter_name] = config.gradient

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        """As in PEFT; refuses factors that are computed, by a parametrisation or a method of lors_cuda.methods."""
        if adapter_name in self.lora_A:
            for which, factors in (("lora_A", self.lora_A), ("lora_B", self.lora_B)):
                check_stored(f"{which} of '{adapter_name}'", factors[adapter_name].weight, "drawn anew")
        super().reset_lora_parameters(adapter_name, init_lora_weights)

    def resolve_lora_variant(self, *, config: LoRSLoraConfig, **kwargs: Any) -> MaskedVariant:
        return MaskedVariant()

    def stacked(self, names: Sequence[str]) -> tuple[Tensor, Tensor, float]:
        """One pair lora_A [r, K], lora_B [N, r] and scaling whose product is the sum of these adapters'.

        Where scalings differ, or are tensors (PEFT makes them so for hotswapping in compiled models, where reading one
        would wait for the device), they are multiplied into lora_B, in float32 at least.
        """
        scalings = [self.scaling[name] for name in names]
        pairs = [self.factors(name) for name in names]
        if len(names) == 1 and not isinstance(scalings[0], Tensor):
            return (*pairs[0], float(scalings[0]))
        scaled = [
            lora_B.to(torch.promote_types(lora_B.dtype, torch.float32)) * scaling
            for (_, lora_B), scaling in zip(pairs, scalings, strict=True)
        ]
        if len(names) == 1:
            return pairs[0][0], scaled[0], 1.0
        return torch.cat([lora_A for lora_A, _ in pairs], dim=-2), torch.cat(scaled, dim=-1), 1.0

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """lora_A [r, K] and lora_B [N, r] of an adapter."""
        return self.lora_A[name].weight, self.lora_B[name].weight

    def set_rank(self, adapter_name: str, r: int) -> None:
        """Record the rank that an adapter has been given, at the same scaling; save_pretrained writes it."""
        rslora = self.use_rslora[adapter_name]
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = self.scaling[adapter_name] * (math.sqrt(r) if rslora else r)
        for which, features in ((self.lora_A, "out_features"), (self.lora_B, "in_features")):
            setattr(which[adapter_name], features, r)

    # ---- the base ----

    @property
    def stored_values(self) -> Tensor:
        """The base layer's parameter that merging changes."""
        return self.base_layer.weight_values

    @property
    def sparse_weight(self) -> SparseWeight:
        """The base weight, without what is merged into it."""
        base = self.base_layer
        return base.sparse_weight if self.unmerged_values is None else base._stored(self.unmerged_values)

    @property
    def storage(self) -> nn.Module:
        return self.base_layer

    @property
    def weight(self) -> Tensor:
        base: Any = self.base_layer
        if self.disable_adapters or self.merged or not reads_past(self):
            return base.weight
        merged = self._merged(self.draws(self.training))
        return merged.t() if getattr(base, "conv1d", False) else merged

    def merged_dense(self) -> Tensor:
        return self._merged(self.draws(training=False))

    def _merged(self, draws: Draws, names: Sequence[str] | None = None) -> Tensor:
        """With these adapters; None: those that are active."""
        if names is None:
            names = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.lora_A]
        dtype = self.base_layer._dense_dtype
        if not names:
            return self.sparse_weight.to_dense(dtype)
        return stored_merge(self.sparse_weight, *self.stacked(names), draws, self.requantization, dtype).flatten(0, -2)

    def zero_weight(self, dtype: torch.dtype | None = None) -> SparseWeight:
        """See :meth:`lors_cuda.SparseWeight.zeros`; in the base's dtype unless another is given."""
        weight = self.sparse_weight
        return weight.zeros(dtype or weight.dtype)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the weight: ``s M o (B A)`` [N, K], in lora_B's dtype."""
        return merge(self.zero_weight(self.lora_B[adapter].weight.dtype), *self.stacked([adapter]))

    def restored_base(self) -> nn.Module:
        """The base layer as it was before the first adapter: compressed, or a plain ``nn.Linear``."""
        return self.base_layer.to_linear() if self.base_was_linear else self.base_layer

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        linear: Any = module
        return linear.in_features, linear.out_features

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        base = self.base_layer  # PEFT would read `weight`, which decompresses it
        return base.weight_values.device, base.dense_dtype

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT also casts to the base's dtype: right for a new adapter, but one that was just loaded would be rounded.
        if adapter_name not in self.gradient:
            super()._move_adapter_to_device_of_base_layer(adapter_name, device)
            return
        for adapters in (self.lora_A, self.lora_B, self.lora_dropout):
            if not any(parameter.is_meta for parameter in adapters[adapter_name].parameters()):
                adapters[adapter_name].to(self.stored_values.device if device is None else device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Of a version whose dense base layers were nn.Linear.
        former = state_dict.pop(f"{prefix}base_layer.weight", None)
        if former is not None:
            state_dict[f"{prefix}base_layer.weight_values"] = former
        super()._load_from_state_dict(state_dict, prefix, *args)

    # ---- forward ----

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        names = [name for name in self.active_adapters if name in self.lora_A]
        if not names or not self._is_one_matmul(names):
            return super().forward(x)
        base = self.base_layer
        # Every call stacks new tensors, which a cached merge could not recognise.
        kept = self.merged_weight if len(names) == 1 and not isinstance(self.scaling[names[0]], Tensor) else None
        weight, (lora_A, lora_B, scaling) = base.check_mask(), self.stacked(names)
        check_adapters(weight, lora_A, lora_B)
        gradient, draws = self.gradient[names[0]], self.draws(self.training)
        return layer_linear(x, weight, lora_A, lora_B, scaling, base.bias, gradient, kept, draws, self.requantization)

    def _is_one_matmul(self, names: list[str]) -> bool:
        """Whether these adapters give one merged weight: no dropout in effect, and one kind of gradients."""
        dropouts = [self.lora_dropout[name] for name in names]
        if any(dropout.training and not isinstance(dropout, nn.Identity) for dropout in dropouts):
            return False
        return all(self.gradient[name] == self.gradient[names[0]] for name in names)

    # ---- merging ----

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters (None: the active ones) into the base weight, rounded once, with exact zeros off the mask.

        The values that stood there are kept for :meth:`unmerge`. Adapters that are merged later join those merged
        before in one sum, so that the order does not matter. Codes are replaced by codes, with ``requantize`` alone.

        Raises:
            ValueError: what is merged, or the merged weight, has a NaN or an infinity, with ``safe_merge`` or without;
                the first place is named and nothing is changed. The base is quantised, and the result is not, or
                has another kind of codes.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        if self.base_layer.kind and self.requantization.steps != 1:
            raise ValueError(
                f"The base holds {self.base_layer.kind} codes, and the merged weight has none of their grid: the "
                "adapter cannot be merged in place. Use merge_and_unload, which gives a plain linear, or train with "
                "requantize=True and remainder 'dither' or 'none'."
            )
        values = self.merged_values([*self.merged_adapters, *names])
        stored = self.stored_values
        if self.unmerged_values is None:
            self.unmerged_values = stored.data
        stored.data = values
        if self.sparse_weight.layout == "dense" and self.base_layer.weight_mask is None:
            # It must not change where a merged value is zero, or rounds to zero in a conversion.
            self.mask_was_implicit, self.base_layer.weight_mask = True, self.sparse_weight.packed_mask()
        self._update_digest()
        self.merged_adapters.extend(names)

    def _update_digest(self) -> None:
        """The digest of a quantised base is that of its codes too, which merging changes."""
        if self.base_layer.kind:
            self.base_layer.mask_digest = self.base_layer.sparse_weight.digest()

    def merged_sparse_weight(self, names: Sequence[str] | None = None) -> SparseWeight:
        """The base weight with these adapters (None: the active ones) merged in, in its layout; with ``requantize`` its
        codes are those that the layer computes with. Refused as :meth:`merge` says."""
        if names is None:
            names = [name for name in self.active_adapters if name in self.lora_A]
        self.base_layer.check_mask(always=True)
        seed = self.draws(training=False).rounding_seed
        rounding = "nearest" if seed is None else "stochastic"
        with torch.no_grad():
            return self.sparse_weight.merge(
                *self.stacked(names), rounding=rounding, seed=seed, requantize=self.requantization
            )

    @torch.no_grad()
    def merged_values(self, names: Sequence[str]) -> Tensor:
        """The base's stored values with these adapters merged in; a new tensor. Refused as :meth:`merge` says."""
        return self.merged_sparse_weight(names).values

    def unmerge(self) -> None:
        """Put the base's values back as they were before :meth:`merge`, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self.unmerged_values is not None:
            self.stored_values.data = self.unmerged_values
            self.unmerged_values = None
            self._update_digest()
        bits = self.base_layer.weight_mask
        if self.mask_was_implicit and bits is not None:
            if torch.equal(SparseWeight(self.stored_values).packed_mask(), bits):
                self.base_layer.weight_mask = None
            self.mask_was_implicit = False
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """What PEFT puts in this layer's place: a plain ``nn.Linear`` if merged, otherwise :meth:`restored_base`."""
        if not merge:
            return self.restored_base()
        if self.base_layer.kind:
            self.base_layer.check_mask(always=True)
            chosen = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
            with torch.no_grad():
                merged = self._merged(self.draws(training=False), [*self.merged_adapters, *chosen])
            merged += 0.0  # -0.0, which a kept weight may have become, reads as +0.0
            return make_linear(merged, self.base_layer.bias, self.base_layer.conv1d).requires_grad_(False)
        self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        self.unmerged_values = None  # not twice in memory; the layer is dropped
        return self.base_layer.to_linear()
