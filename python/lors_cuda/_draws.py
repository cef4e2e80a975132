# SPDX-License-Identifier: Apache-2.0
"""The random numbers that a merge draws: how it rounds, the noise that it adds, and their seeds."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from torch import Tensor

from ._checks import check_choice

ROUNDINGS = ("nearest", "stochastic")


class Draws(NamedTuple):
    """The random numbers of a merge, the last arguments of the operators (csrc/core/include/lors/random.h).

    They are a hash of the seed and the entry's place: the same arguments give the same bits, in forward and backward,
    in every layout and on every device.
    """

    rounding_seed: int | None = None  # None: to nearest
    noise: Tensor | None = None  # float32 [N]: standard deviation of what is added to each row's kept entries
    noise_seed: int = 0

    @property
    def any(self) -> bool:
        return self.rounding_seed is not None or self.noise is not None


NO_DRAWS = Draws()


def rounding_draws(rounding: str, seed: int | None) -> Draws:
    """What ``rounding`` and ``seed`` ask for.

    Raises:
        ValueError: an unknown rounding; a seed that is missing, of no use, or out of range.
    """
    check_choice("rounding", rounding, ROUNDINGS)
    if rounding == "nearest":
        if seed is not None:
            raise ValueError(f"seed is {seed!r} and rounding is 'nearest', which needs none; leave one of them out.")
        return NO_DRAWS
    if seed is None:
        raise ValueError("rounding is 'stochastic' and there is no seed; give one, the same for the same result.")
    return Draws(seed_number("seed", seed))


def seed_number(name: str, value: object) -> int:
    """A seed as an int; it must fit 63 bits, as torch's integers do."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise ValueError(f"{name} is {value!r}; it must be a whole number from 0 to 2^63 - 1.")
    return value


def derived_seed(seed: int, *place: object) -> int:
    """A seed for one place of use (a layer's name, a step), from a seed for all; the same in every process."""
    digest = hashlib.sha256("/".join(map(str, (seed, *place))).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
