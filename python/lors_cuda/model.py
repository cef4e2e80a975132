# SPDX-License-Identifier: Apache-2.0
# Conversion of whole models: nn.Linear -> LoRSLinear, experts -> LoRSExperts (get_lors_model) and back
# (merge_and_unload), in place.
# targets.py selects the modules, linear.py does the layer's work. Everything that can be refused is refused first.
"""Convert a model to LoRS layers, merge it back, switch the adapters off, keep what is merged."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ._distributed import check_gathered, hand_over_placement, is_partitioned
from ._draws import derived_seed, rounding_draws
from ._merged_weight import MergedWeight
from ._saving import guard_saving, unguard_saving
from .advice import new_heads, warn_of_conversion
from .config import LoRSConfig
from .experts import LoRSExperts, LoRSExpertWeight
from .linear import LoRSLinear, SparseLayer, SparseLinear
from .targets import Target, check_targets, conversion_advice, find_targets, saved_modules


def get_lors_model(
    model: nn.Module, config: LoRSConfig | None = None, *, targets: list[Target] | None = None
) -> nn.Module:
    """Replace the linears that `config` selects by LoRSLinear, experts by LoRSExperts, and freeze everything else; in
    place.

    Each weight is stored in the configuration's layout, compressed where that asks for it; "auto" decides by layer. A
    :class:`SparseLinear`, quantised or not, keeps its weight as it is stored.
    Afterwards only lora_A, lora_B and the parameters of `modules_to_save` require gradients. Each linear is let go as
    soon as its replacement exists, so no second copy of the model exists. The configuration used is kept as
    `model.lors_config`. `save_pretrained` of a transformers model is refused until it is merged: an ordinary checkpoint
    cannot hold these layers. Source: LoRS, arXiv 2501.08582.

    Warns (UserWarning) where the adapted weights have no zeros, where experts of the model get no adapters, and where a
    head that no checkpoint has filled stays frozen.

    Args:
        model: any module that contains nn.Linear, transformers' Conv1D or transformers' experts; already pruned: a
            weight is kept where it is not zero, or by the mask of a SparseLinear.
        config: what to adapt; None: LoRSConfig().
        targets: what `targets.find_targets` found in this model with this `config` already, so that it is not searched
            again. The list is emptied on the way: it would keep the dense weights alive.

    Returns:
        The same model object.

    Raises:
        ValueError: nothing is selected; a module that is named cannot be adapted (see `find_targets`); its rank exceeds
            min(out_features, in_features); a weight does not fit the layout, or `requantize`; the model already has
            LoRS layers.
        TypeError: `model` is no nn.Module or `config` no LoRSConfig. The model is unchanged after any of these.
    """
    config = LoRSConfig() if config is None else config
    _check_arguments(model, config)
    heads = new_heads(model)
    convert(model, find_targets(model, config) if targets is None else targets, config)
    adapted: set[nn.Module] = {layer for _, layer in named_lors_layers(model)}
    warn_of_conversion(model, adapted, heads, config.modules_to_save, stacklevel=2)
    return model


def convert(model: nn.Module, targets: list[Target], config: LoRSConfig) -> nn.Module:
    """Replace `targets` (emptied on the way, to free each linear) and set requires_grad; for get_lors_model and load.

    Raises:
        ValueError: as `get_lors_model`; the model is then as it was, also if an error comes halfway (out of memory).
    """
    saved = saved_modules(model, config)
    check_targets(targets, config)
    done: list[tuple[tuple[str, ...], Callable[[], nn.Module]]] = []  # names, and what puts the module before there
    targets.reverse()
    try:
        while targets:
            target = targets.pop()
            names, module = target.module_names, target.module
            layer: LoRSLinear | LoRSExperts
            undo: Callable[[], nn.Module]
            if target.stack:
                adapters = {target.stack: _options(target, config)}
                while targets and targets[-1].module is module:
                    other = targets.pop()
                    adapters[other.stack] = _options(other, config)
                    del other
                trained = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
                layer = LoRSExperts(module, config.layout, adapters)
                undo = functools.partial(_experts_before, layer, trained)
            else:
                layer = LoRSLinear.from_linear(module, layout=config.layout, **_options(target, config))
                bias_trained = module.bias is not None and module.bias.requires_grad
                # One that is stored sparse is kept for undoing: the new layer has its tensors.
                weight_trained = not isinstance(module, SparseLinear) and module.weight.requires_grad
                stored = module if isinstance(module, SparseLinear) else None
                undo = functools.partial(_linear_before, layer, weight_trained, bias_trained, stored)
            done.append((names, undo))
            _replace(model, names, layer)
            del target, module
    except BaseException:
        for names, undo in done:
            _replace(model, names, undo())
        raise
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for _, adapted in named_lors_layers(model):
        adapted.lora_A.requires_grad_(True)
        adapted.lora_B.requires_grad_(True)
    for each in saved.values():
        for parameter in each.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
    # Through vars(): nn.Module's __setattr__ is typed for tensors and modules only.
    vars(model)["lors_config"] = copy.deepcopy(config)
    guard_saving(model)
    return model


def merge_and_unload(model: nn.Module, *, rounding: str | None = None, seed: int | None = None) -> nn.Module:
    """Merge every adapter into its weight and put plain nn.Linear (or Conv1D) modules, and transformers' experts, back,
    in place.

    The merged weight is W + s * mask * (B A), rounded once, as the configuration's `rounding` and `rounding_seed` say,
    with exact zeros off the mask (arXiv 2501.08582, eq. 3); with `requantize` it is what the requantised codes stand
    for, which `LoRSLinear.merged_sparse_weight` gives as codes, before. In evaluation the adapted model has computed
    with the same bits. All layers are merged once to check the result, one at a time, before the first is replaced. As
    after PEFT's merge_and_unload the weights stay frozen; call `model.requires_grad_(True)` to train the whole model.

    Args:
        model: with LoRS layers.
        rounding: "nearest" or "stochastic" instead of the configuration's.
        seed: of "stochastic", instead of the configuration's `rounding_seed`.

    Returns:
        The same model object.

    Raises:
        ValueError: `rounding` is unknown, or `seed` does not go with it; a weight or an adapter holds NaN or infinity,
            or a merged weight would (the module, the first place and its value are named), the model has no LoRS
            layers, its parameters are sharded among processes, it has a side network (lors_cuda.methods.SHERL), or a
            method of lors_cuda.methods trains it; nothing is changed then.
    """
    layers = _lors_layers_with_names(model)
    check_gathered(model)
    check_no_method(model, "merged")
    check_mergeable(model)
    replaced = [
        (names, module)
        for module, names in _names_of(model, (LoRSLinear, LoRSExperts)).items()
        if not isinstance(module, LoRSExpertWeight)  # whose LoRSExperts is replaced
    ]
    whole_model = next((module for names, module in replaced if "" in names), None)
    if whole_model is not None:
        raise ValueError(
            f"The model is itself a {type(whole_model).__name__} and cannot be replaced in place; call its merge()."
        )
    before = [(layer, layer.rounding, layer.rounding_seed) for _, layer in layers]
    try:
        for names, layer in layers:
            layer.rounding = layer.rounding if rounding is None else rounding
            if rounding is not None or seed is not None:
                own = layer.rounding_seed if layer.rounding == "stochastic" else None
                rounding_draws(layer.rounding, own if seed is None else seed)
            if seed is not None:
                layer.rounding_seed = derived_seed(seed, "rounding", names[0])
            try:
                layer.merge()
            except ValueError as error:
                raise ValueError(f"Layer '{names[0]}': {error} Nothing was merged.") from error
    except BaseException:
        for layer, its_rounding, its_seed in before:
            layer.rounding, layer.rounding_seed = its_rounding, its_seed
        raise
    layers.clear()
    before.clear()
    replaced.reverse()
    while replaced:
        names, module = replaced.pop()
        merged = module.merge()
        _replace(model, names, merged.requires_grad_(False) if isinstance(module, LoRSLinear) else merged)
    vars(model).pop("lors_config", None)
    unguard_saving(model)
    return model


@contextlib.contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Run the model with its frozen sparse weights alone inside a `with` block; nests, and undoes itself on an error.

    Layers that were already disabled stay so afterwards. Modules of `modules_to_save` keep their trained values:
    unlike PEFT, no second copy of them exists.

    Raises:
        ValueError: the model has no LoRS layers.
    """
    before = [(layer, layer.adapter_enabled) for _, layer in _lors_layers_with_names(model)]
    try:
        for layer, _ in before:
            layer.adapter_enabled = False
        yield
    finally:
        for layer, enabled in before:
            layer.adapter_enabled = enabled


@contextlib.contextmanager
def merge_cache(model: nn.Module) -> Iterator[None]:
    """Keep each layer's merged weight from one forward to the next, inside a `with` block.

    For generation, evaluation and gradient accumulation: there the adapters stay the same over many calls. The outputs
    are those of a fresh merge, up to the order of summation of the matmul, and training goes on as before: a merged
    weight is made again once one of the tensors behind it has changed. It costs one dense weight per layer, in the type
    its matmuls run in (that of the activations; float32 for 16-bit ones on a CPU without instructions for them), or its
    kept values alone (2:4, on the CPU, where its matmuls run in float32), until the block ends. Nests. Without effect
    in `torch.compile`, under CUDA graph capture, and on layers whose adapter is disabled.

    NOTE: a change is seen by the tensors' version counters, and every step of a `torch.optim.Optimizer` invalidates it.
    Outside an optimizer do not write through `tensor.data` or a raw pointer inside the block: torch counts neither.

    Raises:
        ValueError: the model has no LoRS layers, or is sharded, or its parameters were made under
            `torch.inference_mode`.
    """
    caches: list[MergedWeight] = []

    def cache_of(layer: SparseLayer) -> MergedWeight:
        outer = layer.merged_weight
        caches.append(outer if isinstance(outer, MergedWeight) else MergedWeight())
        return caches[-1]

    def forget(*_: object) -> None:
        for cache in caches:
            cache.clear()

    with keep_merged_weights(model, "merge_cache", cache_of, forget):
        yield


@contextlib.contextmanager
def keep_merged_weights(
    model: nn.Module, by: str, keeper_of: Callable[[SparseLayer], Any], forget: Callable[..., None]
) -> Iterator[list[Any]]:
    """Give each layer with adapters what keeps its merged weight, inside a `with` block; yields the layers.

    Args:
        by: the function that does so, for messages.
        forget: called before and after every step of an optimizer, whose writes torch may not count.

    Raises:
        ValueError: as `merge_cache`.
    """
    layers = _adapted_layers(model)
    if is_partitioned(model):
        # Gathering leaves the version counters as they were, so that a changed parameter would go unseen.
        raise ValueError(
            f"The model is sharded by fully_shard or DeepSpeed's ZeRO-3, and {by} would hold merged weights whole in "
            "each process, without seeing when they change. Use it on a model that one process holds."
        )
    for layer in layers:
        MergedWeight.check_countable([*layer.parameters(), *layer.buffers()])
    before = [layer.merged_weight for layer in layers]
    hooks = [register_optimizer_step_pre_hook(forget), register_optimizer_step_post_hook(forget)]
    try:
        for layer in layers:
            layer.merged_weight = keeper_of(layer)
        yield layers
    finally:
        for hook in hooks:
            hook.remove()
        for layer, outer in zip(layers, before, strict=True):
            layer.merged_weight = outer


def dither_seed_of(config: Any, name: str) -> int:
    """The seed of the dither of the layer called `name`."""
    return derived_seed(config.dither_seed, "dither", name)


def named_lors_layers(model: nn.Module) -> Iterator[tuple[str, LoRSLinear]]:
    """Iterate over (name, layer) of the LoRS layers, in the model's order; a shared layer comes once, first name."""
    for name, module in model.named_modules():
        if isinstance(module, LoRSLinear):
            yield name, module


def running_method(model: nn.Module) -> Any:
    """The :class:`lors_cuda.methods.Run` that trains the model; None without one."""
    return vars(model).get("lors_run")


def check_no_method(model: nn.Module, done: str) -> None:
    """Refuse what cannot be `done` to adapters that a method computes.

    Raises:
        ValueError: a method trains the model.
    """
    run = running_method(model)
    if run is not None:
        raise ValueError(
            f"The model trains with the method '{run.method.name}', so its adapters cannot be {done}; call "
            "run.finish() first."
        )


def check_mergeable(model: nn.Module) -> None:
    """Refuse to merge a model of which a merged one would lose a part.

    Raises:
        ValueError: a module says so, by its attribute ``unmergeable``.
    """
    for name, module in model.named_modules():
        reason = getattr(module, "unmergeable", None)
        if isinstance(reason, str):
            raise ValueError(
                f"The model cannot be merged: {reason} ('{name}'). Use it as it is, saved by save_adapter or PEFT."
            )


def require_unconverted(model: nn.Module) -> None:
    """Refuse a model that has LoRS layers already.

    Raises:
        TypeError: `model` is no nn.Module. ValueError: it has LoRS layers.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but is {type(model).__name__}.")
    name = next((name for name, _ in named_lors_layers(model)), None)
    if name is not None:
        raise ValueError(
            f"The model already has LoRS layers ('{name}' is one), and this needs the sparse model before conversion. "
            "Call merge_and_unload(model) first, or load the base model again."
        )


def _check_arguments(model: nn.Module, config: LoRSConfig) -> None:
    require_unconverted(model)
    if not isinstance(config, LoRSConfig):
        raise TypeError(f"config must be a LoRSConfig, but is {type(config).__name__}.")


def _lors_layers_with_names(model: nn.Module) -> list[tuple[list[str], LoRSLinear]]:
    """List every LoRS layer with all names it has in the model.

    Raises:
        TypeError, ValueError: `model` is no nn.Module, or it has none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but is {type(model).__name__}.")
    names_of = _names_of(model, (LoRSLinear,))
    if not names_of:
        raise ValueError(f"The model has no LoRS layers. {conversion_advice(model)}")
    return [(names, layer) for layer, names in names_of.items()]


def _names_of(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> dict[Any, list[str]]:
    """{module: all its names in the model} of the modules of these kinds, in the model's order."""
    names_of: dict[Any, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, kinds):
            names_of.setdefault(module, []).append(name)
    return names_of


def _adapted_layers(model: nn.Module) -> list[Any]:
    """The layers with adapters: LoRSLinear, and those of lors_cuda.peft, which is not imported here."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    found = [module for module in modules if isinstance(module, SparseLayer) and module.has_adapters]
    return found or [layer for _, layer in _lors_layers_with_names(model)]  # which refuses a model that has none


def _replace(model: nn.Module, names: tuple[str, ...] | list[str], module: nn.Module) -> None:
    """Put `module` in the place of all `names`: one shared layer stays one shared layer."""
    for name in names:
        parent, _, child = name.rpartition(".")
        hand_over_placement(model.get_submodule(name), module)
        setattr(model.get_submodule(parent), child, module)


def _options(target: Target, config: LoRSConfig) -> dict[str, Any]:
    """What a LoRSLinear is made with."""
    return {
        "r": target.r,
        "lora_alpha": target.lora_alpha,
        "gradient": config.gradient,
        "use_rslora": config.use_rslora,
        "init_lora_weights": config.init_lora_weights,
        "rounding": config.rounding,
        "rounding_seed": derived_seed(config.rounding_seed, "rounding", target.names[0]),
        "requantize": config.requantize,
        "remainder": config.remainder,
        "dither_seed": dither_seed_of(config, target.names[0]),
    }


def _experts_before(layer: LoRSExperts, trained: dict[str, bool]) -> nn.Module:
    """The module that `layer` was made from, for undoing a conversion."""
    experts = layer.without_adapters()
    for name, parameter in experts.named_parameters():
        parameter.requires_grad_(trained[name])
    return experts


def _linear_before(
    layer: LoRSLinear, weight_trained: bool, bias_trained: bool, stored: SparseLinear | None
) -> nn.Module:
    """The module that `layer` was made from, adapter dropped, for undoing a conversion; one stored sparse is given."""
    if stored is not None:
        return stored
    linear = layer.to_linear()
    linear.weight.requires_grad_(weight_trained)
    if linear.bias is not None:
        linear.bias.requires_grad_(bias_trained)
    return linear
