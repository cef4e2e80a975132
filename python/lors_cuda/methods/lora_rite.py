# SPDX-License-Identifier: Apache-2.0
# The step of a pair depends on the product B A alone, not on how it is factored: with B = U R, lora_A's gradient is
# G_A R^-1, its second moment an r x r matrix that is carried from basis to basis. LoRA-RITE, arXiv 2410.20625.
"""LoRA-RITE: an optimizer that does not see how an update is factored."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer

from .._checks import check_flag, check_number, listed
from ._method import Method
from ._pair import FACTORS
from ._run import Run


@dataclasses.dataclass(frozen=True)
class LoRARITE(Method):
    """Moves the adapters by ``pytorch_optimizer.LoRARite``; needs the package pytorch_optimizer (4.1 or newer).

    Two of the library's defaults are changed. Its ``update_skipping`` drops a gradient whose mean size exceeds 1, and
    says nothing; here nothing is dropped. The correction of the paper's algorithm for what a change of basis loses
    (``escape``) is on. NOTE: a Trainer's ``max_grad_norm`` clips the raw gradient, which depends on the factoring: set
    it to 0. Source: arXiv 2410.20625.

    Args:
        betas: of the first and the second moment, each at least 0 and less than 1.
        clip: largest norm of all adapters' gradients, freed of the factors' sizes; 0: not clipped.
        escape: whether a second moment that a new basis cannot hold is made up for.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    escape: bool = True
    name: ClassVar[str] = "lora-rite"
    alone_in: ClassVar[tuple[str, ...]] = ("parametrisation",)
    clips: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.betas, (list, tuple)) or len(self.betas) != 2:
            raise ValueError(f"betas is {self.betas!r}; it must be two numbers.")
        for beta in self.betas:
            check_number("betas", beta, "two numbers, at least 0 and less than 1", lambda x: 0 <= x < 1)
        object.__setattr__(self, "betas", tuple(self.betas))
        check_number("clip", self.clip, "0 or more", lambda x: 0 <= x < math.inf)
        check_flag("escape", self.escape)

    def optimizer(self, run: Run, lr: float, **options: Any) -> Optimizer:
        try:
            from pytorch_optimizer import LoRARite
        except ImportError:
            raise ModuleNotFoundError(
                "LoRA-RITE needs the package pytorch_optimizer, which is not installed; run: pip install "
                "'pytorch_optimizer>=4.1,<5'"
            ) from None
        factors = _alternating(run)
        options = {"clip_unmagnified_grad": self.clip, "apply_escape": self.escape, "update_skipping": 0.0, **options}
        optimizer: Optimizer = LoRARite(factors, lr=lr, betas=self.betas, **options)
        return optimizer


def _alternating(run: Run) -> list[nn.Parameter]:
    """lora_A, lora_B, lora_A, ...: the library takes any two neighbours for a pair."""
    computed = [pair.name for pair in run.pairs if any(pair.is_parametrised(which) for which in FACTORS)]
    if computed:
        raise ValueError(
            f"LoRA-RITE moves plain factors, and those of {listed(computed)} are computed by another method. Leave "
            "one of the methods out."
        )
    run.require_whole("LoRA-RITE")
    run.require_adapters_alone("LoRA-RITE")
    return [pair.stored(which) for pair in run.pairs for which in FACTORS]
