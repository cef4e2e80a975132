# SPDX-License-Identifier: Apache-2.0
"""Where the experts of a model are."""

from __future__ import annotations

import pytest
from expert_models import EXPERT_MODELS, experts_model

from families import family
from lors_cuda.experts import expert_stacks, stack_of
from models import tiny_llama


@pytest.mark.parametrize("name", EXPERT_MODELS)
def test_every_stack_is_found_as_its_parameter_whatever_way_the_family_keeps_it(name):
    model = experts_model(name)
    named = {key for key, parameter in model.named_parameters() if parameter.ndim == 3 and "experts" in key}

    stacks = list(expert_stacks(model))

    assert {path for path, _, _ in stacks} == named
    for path, module, parameter in stacks:
        stack = stack_of(module, parameter)
        hidden = stack.shape[1] if parameter == "down_proj" else stack.shape[2]
        assert hidden == (24 if name == "muse_spark" else 32), path
        stack[1, 2, 3] = 7.0
        kept = getattr(module, parameter)
        assert kept[1, 3, 2] == 7.0 if module.is_transposed else kept[1, 2, 3] == 7.0


@pytest.mark.parametrize("name", ["llama4", "dbrx", "jetmoe"])
def test_experts_of_the_families_of_other_classes_are_none(name):
    assert not list(expert_stacks(family(name)[0]))


def test_a_dense_model_has_none():
    assert not list(expert_stacks(tiny_llama()))
