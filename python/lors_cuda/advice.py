# SPDX-License-Identifier: Apache-2.0
# What a conversion warns of, in get_lors_model and lors_cuda.peft alike: nothing is refused, but a dense model, dense
# experts or a random head would otherwise be found out after the training, if at all.
"""Warnings about a model that is converted: nothing sparse, experts left out, a new head left frozen."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import nn

from ._checks import listed
from .config import selects
from .sparse_linear import SparseLayer
from .sparsity import EXPERTS, Weight, beside_base_model, task_heads, total_sparsity, weights_of

# A model that was never pruned may have a few exact zeros.
_DENSE_BELOW = 0.01


def warn_of_conversion(
    model: nn.Module,
    adapted: Collection[nn.Module],
    heads: Sequence[str],
    modules_to_save: Sequence[str] | None,
    *,
    stacklevel: int,
) -> None:
    """Warn of what a converted model is not, in one warning.

    Args:
        model: after the conversion.
        adapted: the modules that hold the frozen weights of its adapted layers.
        heads: `new_heads` of the model before.
        modules_to_save: of the configuration.
        stacklevel: as of `warnings.warn`, for the caller of this function.
    """
    weights = list(weights_of(model))
    sentences = []
    dense = _dense([weight for weight in weights if weight.module in adapted])
    if dense is not None:
        sentences.append(
            f"Nothing is sparse: {dense} of the weights of the {len(adapted)} adapted layers are zero, so that the "
            "adapters are plain LoRA, and there are no zeros to keep. Prune the model first (lors-cuda prune, or "
            "lors_cuda.pruning.prune), or see whether the pruned one was meant."
        )
    sentences += _about_experts(weights, adapted)
    frozen = [name for name in heads if not selects(list(modules_to_save or []), name)]
    frozen = [name for name in frozen if not isinstance(model.get_submodule(name), SparseLayer)]
    if frozen:
        sentences.append(
            f"{listed(frozen)} of {type(model).__name__} stays frozen, and is not known to come from a checkpoint. If "
            f"it is new, its weights are random: train it with modules_to_save={frozen}."
        )
    if sentences:
        warnings.warn(" ".join(sentences), UserWarning, stacklevel=stacklevel + 1)


def new_heads(model: nn.Module) -> list[str]:
    """The parts beside a transformers model's base model (a classifier, say) that no checkpoint has filled, also where
    a module of another kind holds that model and a head.

    transformers marks every parameter that it loads. Where none is marked (a model made from a configuration, a deep
    copy), the heads of tasks are returned, but not output embeddings: a language model is then new, or old, as a whole.
    """
    loaded = any(_is_loaded(parameter) for parameter in model.parameters())
    parts = beside_base_model(model) if loaded else task_heads(model)
    if loaded and not hasattr(model, "base_model_prefix"):
        inside = {part for each in model.modules() if hasattr(each, "base_model_prefix") for part in each.modules()}
        others = {name: module for name, module in model.named_modules() if name and module not in inside}
        parts = {name: part for name, part in others.items() if any(True for _ in part.parameters(recurse=False))}
    return [name for name, part in parts.items() if any(not _is_loaded(one) for one in part.parameters())]


def _is_loaded(parameter: Any) -> bool:
    return bool(getattr(parameter, "_is_hf_initialized", False))


def _dense(weights: Sequence[Weight]) -> str | None:
    """The share of zeros, as text, if no weight is sparse; None if one is, or if there are no values to count."""
    counted = []
    for weight in weights:
        one = None if weight.values.is_meta else weight.counted()
        if one is None or one.sparsity >= _DENSE_BELOW:
            return None
        counted.append(one)
    return f"{total_sparsity(counted):.2%}" if counted else None


def _about_experts(weights: Sequence[Weight], adapted: Collection[nn.Module]) -> Iterator[str]:
    experts = [weight for weight in weights if weight.kind == EXPERTS and weight.module not in adapted]
    if not experts:
        return
    share = sum(weight.numel for weight in experts) / sum(weight.numel for weight in weights)
    counted = [one for one in (weight.counted() for weight in experts) if one is not None]
    zeros = f", and {total_sparsity(counted):.2%} of them are zero" if counted else ""
    yield (
        f"The experts ({listed([weight.name for weight in experts])}) get no adapters and stay as they are. They are "
        f"{share:.1%} of the model's weights{zeros}."
    )
