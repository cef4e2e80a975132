# SPDX-License-Identifier: Apache-2.0
# A Method fills one or two of five places: the ranks before conversion (configure), what lora_A and lora_B are made of
# (parametrise, folded), how they move (optimizer), what happens around a step (before_step, after_step), and what is
# drawn for the next (begin_step). A Run (_run.py) carries it through one training. Neither ever writes a stored weight,
# and both leave plain LoRS layers.
"""Adapter methods around LoRS: what they share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ..config import LoRSConfig
from ._pair import FACTORS, Pair
from ._run import Run

_PLACES = {  # what a method fills, by the functions that it defines
    "ranks": ("configure",),
    "parametrisation": ("parametrise", "folded"),
    "optimizer": ("optimizer",),
    "step controller": ("before_step", "after_step"),
    "noise": ("begin_step",),
}


@dataclasses.dataclass(frozen=True)
class Method:
    """An adapter method. This one is LoRS itself, and changes nothing.

    Every method's fields have its authors' defaults, or its documentation says that they are ours. A method is a value:
    what changes during training is in the :class:`Run`.

    Attributes:
        name: what the command line and the files call it.
        gradient: the adapter gradients that are recommended for it, "lors" or "exact".
        has_own_start: whether it draws the adapters' start itself, so that :func:`lors_cuda.init_from_gradients` before
            it has no effect.
        alone_in: places that no other method beside this one may fill.
        clips: whether its optimizer clips gradients by itself, so that a Trainer must not (``max_grad_norm=0``).
    """

    name: ClassVar[str] = "lors"
    gradient: ClassVar[str] = "lors"
    has_own_start: ClassVar[bool] = False
    alone_in: ClassVar[tuple[str, ...]] = ()
    clips: ClassVar[bool] = False

    @property
    def needs_gradients(self) -> bool:
        """Whether :meth:`start` must be given the gradients of the sparse model's weights."""
        return False

    def configure(
        self, config: LoRSConfig, model: nn.Module | None = None, batches: Iterable[Any] | None = None
    ) -> LoRSConfig:
        """The configuration to convert the model with; ``config`` is not changed.

        Args:
            config: what was asked for.
            model: the sparse model before conversion, for a method that looks at it.
            batches: for such a method, as :func:`lors_cuda.estimate_gradients` takes them.
        """
        return config

    def parametrise(self, pair: Pair, run: Run) -> None:
        """Say what the factors of one adapter are made of, by :meth:`Pair.parametrise`."""

    def folded(self, pair: Pair) -> None:
        """Called for each adapter when its factors are ordinary parameters again; may :meth:`Pair.replace` them."""

    def optimizer(self, run: Run, lr: float, **options: Any) -> Optimizer:
        """An optimizer over everything that is trained; AdamW, without decay where ``options`` ask for none.

        Parameters that a parametrisation adds (gates) are never decayed.
        """
        options.setdefault("weight_decay", 0.0)
        stored = {id(pair.stored(which)) for pair in run.pairs for which in FACTORS}
        added = [p for pair in run.pairs for p in pair.trained() if id(p) not in stored]
        known = {id(p) for p in added}
        plain = [p for p in run.model.parameters() if p.requires_grad and id(p) not in known]
        groups: list[dict[str, Any]] = [{"params": plain}]
        if added:
            groups.append({"params": added, "weight_decay": 0.0})
        return AdamW(groups, lr=lr, **options)

    def begin_step(self, run: Run) -> None:
        """Called before the first forward and after every optimizer step, also of a resumed run, without gradients."""

    def before_step(self, run: Run) -> None:
        """Called once per optimizer step, without gradients: they are complete, and nothing has moved."""

    def after_step(self, run: Run) -> None:
        """Called once per optimizer step, without gradients, after it."""

    def start(
        self,
        model: nn.Module,
        *,
        steps: int | None = None,
        seed: int = 0,
        gradients: Mapping[str, Tensor] | None = None,
    ) -> Run:
        """Begin training a converted model with this method; then take ``run.optimizer`` or ``run.attach``.

        Args:
            model: what :func:`lors_cuda.get_lors_model` or PEFT has converted, not yet wrapped or sharded.
            steps: optimizer steps of the whole training, for methods with a schedule.
            seed: of every draw; the same seed gives the same run.
            gradients: as :func:`lors_cuda.estimate_gradients` returns them for the model before conversion, for a
                method that ``needs_gradients``.

        Raises:
            ValueError: the model has no adapters, is sharded, or trains with a method already; nothing is changed.
        """
        return Run(self, model, steps, seed, gradients)

    def fields(self) -> dict[str, Any]:
        """Name and options, as files hold them."""
        return {"name": self.name, **dataclasses.asdict(self)}

    def parts(self) -> tuple[Method, ...]:
        return (self,)

    def places(self) -> list[str]:
        """Which of the places it fills."""
        return [
            place
            for place, functions in _PLACES.items()
            if any(getattr(type(self), name) is not getattr(Method, name) for name in functions)
        ]


class Combined(Method):
    """Several methods that fill different places."""

    _parts: tuple[Method, ...]

    def __init__(self, methods: Iterable[Method]) -> None:
        parts = tuple(part for method in methods for part in method.parts())
        filled: dict[str, Method] = {}
        for part in parts:
            for place in part.places():
                if place in filled:
                    raise ValueError(
                        f"The methods '{filled[place].name}' and '{part.name}' both fill the place '{place}', so they "
                        "cannot be combined; leave one of them out."
                    )
                filled[place] = part
        for part in parts:
            for place in part.alone_in:
                if filled.get(place, part) is not part:
                    raise ValueError(
                        f"The method '{part.name}' would pass by what '{filled[place].name}' does, which fills the "
                        f"place '{place}', so they cannot be combined; leave one of them out."
                    )
        own = {
            "_parts": parts,
            "name": "+".join(part.name for part in parts),
            "gradient": "exact" if any(part.gradient == "exact" for part in parts) else "lors",
            "has_own_start": any(part.has_own_start for part in parts),
            "clips": any(part.clips for part in parts),
        }
        for field, value in own.items():  # a method is frozen
            object.__setattr__(self, field, value)

    def parts(self) -> tuple[Method, ...]:
        return self._parts

    @property
    def needs_gradients(self) -> bool:
        return any(part.needs_gradients for part in self._parts)

    def places(self) -> list[str]:
        return [place for part in self._parts for place in part.places()]

    def configure(
        self, config: LoRSConfig, model: nn.Module | None = None, batches: Iterable[Any] | None = None
    ) -> LoRSConfig:
        for part in self._parts:
            config = part.configure(config, model, batches)
        return config

    def parametrise(self, pair: Pair, run: Run) -> None:
        for part in self._parts:
            part.parametrise(pair, run)

    def folded(self, pair: Pair) -> None:
        for part in self._parts:
            part.folded(pair)

    def optimizer(self, run: Run, lr: float, **options: Any) -> Optimizer:
        own = next((part for part in self._parts if "optimizer" in part.places()), None)
        return super().optimizer(run, lr, **options) if own is None else own.optimizer(run, lr, **options)

    def begin_step(self, run: Run) -> None:
        for part in self._parts:
            part.begin_step(run)

    def before_step(self, run: Run) -> None:
        for part in self._parts:
            part.before_step(run)

    def after_step(self, run: Run) -> None:
        for part in self._parts:
            part.after_step(run)

    def fields(self) -> dict[str, Any]:
        return {"name": self.name, "parts": [part.fields() for part in self._parts]}
