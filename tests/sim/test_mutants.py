# SPDX-License-Identifier: Apache-2.0
"""Every barrier and every wait of the kernels is there for a reason: without it, the family's case fails.

And so it does on the mistakes that the case files plant.
"""

from __future__ import annotations

import pytest

import lors_sim
import mutants

# What may go and leave the kernel right, by the mutant's name, and why it stays.
HARMLESS = {
    "fused_linear.cuh: cp_async_wait 4": "never reached: with four stages at most two groups are pending",
    "fused_linear.cuh: cp_async_wait 5": "the groups it waits for are empty: no step beyond the last is copied",
}

ALL = [mutant for family in mutants.families() for mutant in mutants.all_of(family)]


@pytest.mark.parametrize("flavour", lors_sim.FLAVOURS)
@pytest.mark.parametrize("family", mutants.families())
def test_kernels_are_right_in_every_flavour(family, flavour):
    mutants.require_right(family, flavour)


@pytest.fixture(scope="module")
def right() -> set[str]:
    """Families whose case is known to pass without a mutant."""
    return set()


@pytest.mark.parametrize("mutant", ALL, ids=lambda mutant: f"{mutant.family}: {mutant.name}")
def test_no_mistake_passes(mutant, right):
    if mutant.family not in right:
        mutants.require_right(mutant.family)
        right.add(mutant.family)
    result = mutants.run(mutant, mutants.case_of(mutant.family))
    if mutant.name in HARMLESS:
        assert not result.caught, f"{mutant.name} is listed as harmless, and was caught: {result.how}"
    else:
        assert result.caught, f"no case of cases/{mutant.family}.py notices: {mutant.name}"


def test_replacement_has_to_be_unique():
    with pytest.raises(ValueError, match="it has to occur once"):
        mutants.replacement("merge", "merge.cuh", "the", "")
