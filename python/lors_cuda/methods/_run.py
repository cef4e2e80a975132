# SPDX-License-Identifier: Apache-2.0
"""One training with an adapter method: its step, its optimizer, its state in files."""

from __future__ import annotations

import contextlib
import json
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .._checks import joined, listed
from .._distributed import process_rank, reshard, together
from .._draws import derived_seed
from .._files import replace_files
from ..adapter_directory import read_weights, require_safetensors
from ..sparse_linear import SparseLayer
from ._pair import FACTORS, Pair

if TYPE_CHECKING:
    from ._method import Method

STATE_NAME, TENSORS_NAME = "method.json", "method.safetensors"


class Run:
    """One training with a method: its adapters, step and state. Made by :meth:`Method.start`.

    Attributes:
        method, model, steps, seed: as given to :meth:`Method.start`.
        pairs: the adapters that are trained, in the model's order.
        step: optimizer steps done.
        tensors: tensors that a method keeps between steps, by name; saved and loaded.
    """

    def __init__(
        self,
        method: Method,
        model: nn.Module,
        steps: int | None,
        seed: int,
        gradients: Mapping[str, Tensor] | None = None,
    ) -> None:
        # PEFT's model is merged by the tuner inside, which must know of the run too.
        tuner = vars(model).get("_modules", {}).get("base_model")
        self._known_to = [model] if tuner is None else [model, tuner]
        running = next((vars(each)["lors_run"] for each in self._known_to if "lors_run" in vars(each)), None)
        if running is not None:
            raise ValueError(
                f"The model trains with the method '{running.method.name}' already; call finish() of that run first."
            )
        self.pairs = list(_trained_pairs(model))
        if not self.pairs:
            raise ValueError(
                "The model has no adapters that are trained. Convert it first, with lors_cuda.get_lors_model or "
                "lors_cuda.peft, and start the method then."
            )
        if "noise" in method.places() and any(pair.layer.requantize for pair in self.pairs):
            raise ValueError(
                f"The method '{method.name}' adds noise to the merged weight, and the layers requantise it, which "
                "would round the noise to whole steps. Convert the model with requantize=False, or take another method."
            )
        if any(pair.is_sharded for pair in self.pairs):
            raise ValueError("The model is sharded; start the method before fully_shard.")
        self.method, self.model, self.steps, self.seed = method, model, steps, seed
        self.step = 0
        self.tensors: dict[str, Tensor] = {}
        self._gradients = gradients
        self._optimizer: Optimizer | None = None
        self._rates: list[float] = []
        self._handles: list[Any] = []
        if method.needs_gradients and gradients is None:
            raise ValueError(
                f"The method '{method.name}' starts from gradients: call lors_cuda.estimate_gradients(sparse_model, "
                "batches) before the model is converted, and give them to start(model, gradients=...)."
            )
        with torch.no_grad():
            for pair in self.pairs:
                method.parametrise(pair, self)
        self._gradients = None
        self._begin_step()
        for each in self._known_to:
            vars(each)["lors_run"] = self
        if {"optimizer", "step controller"} & set(method.places()):
            self._handles.append(register_optimizer_step_pre_hook(_refuses_others(weakref.ref(self))))

    def generator(self, name: str, step: int = 0) -> torch.Generator:
        """A generator on the CPU that depends on the seed, a name and a step alone: the same in every process."""
        return torch.Generator().manual_seed(derived_seed(self.seed, step, name))

    def gradient(self, pair: Pair) -> Tensor:
        """The gradient [N, K] of an adapter's weight that :meth:`Method.start` was given, in float32.

        Raises:
            ValueError: there is none for it, or it has another shape or numbers that are not finite.
        """
        assert self._gradients is not None
        name, shape = pair.name.removeprefix("base_model.model."), (pair.layer.out_features, pair.layer.in_features)
        found = self._gradients.get(name)
        if found is None or tuple(found.shape) != shape or not bool(found.isfinite().all()):
            raise ValueError(
                f"The gradients have none of shape {list(shape)} with finite numbers for '{name}', which is adapted. "
                "Estimate them with the same targets, of the same sparse model."
            )
        return found.detach().to(pair["lora_A"].device, torch.float32)

    # ---- the optimizer ----

    def optimizer(self, lr: float, **options: Any) -> Optimizer:
        """The method's optimizer over everything that is trained, attached; ``options`` are those of its class."""
        return self._attach(self.method.optimizer(self, lr, **options))

    def attach(self, optimizer: Optimizer) -> Optimizer:
        """Let the method act around the steps of an optimizer of yours; a GradScaler's skipped steps do not count.

        Raises:
            ValueError: it does not hold every parameter that is trained, the method is an optimizer itself, or the run
                has an optimizer already.
        """
        if "optimizer" in self.method.places():
            raise ValueError(
                f"The method '{self.method.name}' has an optimizer of its own, and would do nothing beside another one "
                f"({type(optimizer).__name__}); take run.optimizer(lr)."
            )
        return self._attach(optimizer)

    def _attach(self, optimizer: Optimizer) -> Optimizer:
        if self._optimizer is not None:
            raise ValueError("The run has an optimizer already; a run has one.")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [name for name, p in self.model.named_parameters() if p.requires_grad and id(p) not in held]
        if missing:
            raise ValueError(
                f"The optimizer does not hold {listed(missing)}, which is trained. Make it after the method has "
                "started, over all parameters that require gradients, or take run.optimizer(lr)."
            )
        self._optimizer = optimizer
        self._rates = [float(group["lr"]) for group in optimizer.param_groups]
        self._handles.append(optimizer.register_step_pre_hook(self._before))
        self._handles.append(optimizer.register_step_post_hook(self._after))
        return optimizer

    @torch.no_grad()
    def _before(self, *_: Any) -> None:
        assert self._optimizer is not None
        held = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        replaced = [pair.name for pair in self.pairs if not held.issuperset(map(id, pair.trained()))]
        if replaced:
            raise ValueError(
                f"The adapters of {listed(replaced)} have other parameters than the optimizer was made with, as after "
                "fully_shard, and would not move. Make it afterwards, with a run that was started before."
            )
        counts = [int(state["step"]) for state in self._optimizer.state.values() if "step" in state]
        if counts and max(counts) > self.step:
            raise ValueError(
                f"The optimizer has done {max(counts)} steps and the method '{self.method.name}' {self.step}: the "
                "training was resumed without the method's state. Call run.load(checkpoint), or resume with a Trainer "
                "that has lors_cuda.hf.LoRSTrainerMixin."
            )
        self.method.before_step(self)

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        self.method.after_step(self)
        self.step += 1
        self._begin_step()

    @torch.no_grad()
    def _begin_step(self) -> None:
        """What the layers draw until the next step of the optimizer, in every forward and its backward."""
        for pair in self.pairs:
            if pair.layer.rounding == "stochastic":
                pair.layer.step_seed = derived_seed(self.seed, self.step, f"{pair.name}.rounding")
        self.method.begin_step(self)

    def rate(self, parameter: nn.Parameter) -> float:
        """The learning rate of a parameter's group, as a share of the one that the schedule began from."""
        assert self._optimizer is not None
        for group, first in zip(self._optimizer.param_groups, self._rates, strict=True):
            if any(p is parameter for p in group["params"]):
                base = float(group.get("initial_lr", first))
                return float(group["lr"]) / base if base else 1.0
        raise ValueError("The parameter is in no group of the optimizer.")

    def forget(self, parameters: Iterable[nn.Parameter]) -> None:
        """Drop what the optimizer keeps for parameters that from now on belong to another function."""
        assert self._optimizer is not None
        for parameter in parameters:
            self._optimizer.state.pop(parameter, None)

    def require_whole(self, who: str) -> None:
        """Refuse factors that ``fully_shard`` has cut, for a method that cannot work on parts.

        Raises:
            ValueError: a factor is sharded.
        """
        if any(pair.is_sharded for pair in self.pairs):
            raise ValueError(
                f"{who} needs whole factors, and fully_shard has cut them. Train it in one process or under "
                "DistributedDataParallel."
            )

    def require_adapters_alone(self, who: str) -> None:
        """Refuse trained parameters that belong to no adapter, for an optimizer that moves pairs.

        Raises:
            ValueError: one is trained.
        """
        known = {id(parameter) for pair in self.pairs for parameter in pair.trained()}
        others = [name for name, p in self.model.named_parameters() if p.requires_grad and id(p) not in known]
        if others:
            raise ValueError(
                f"{who} moves adapters alone, and {listed(others)} is trained too (modules_to_save). Freeze it, or use "
                "another method."
            )

    # ---- the end, and files ----

    def finish(self) -> None:
        """Leave plain LoRS layers, whose lora_A and lora_B are what the method has computed; then save or merge.

        The optimizer and its schedule are of no use afterwards. A second call does nothing.

        Raises:
            ValueError: factors are computed from what fully_shard has cut; the run goes on.
        """
        if vars(self.model).get("lors_run") is not self:
            return
        cut = [pair.name for pair in self.pairs if pair.is_sharded and any(map(pair.is_parametrised, FACTORS))]
        if cut:
            raise ValueError(
                f"The factors of {listed(cut)} are computed by the method '{self.method.name}' from parameters that "
                "fully_shard has cut and holds on to, so they cannot become plain ones here. Write them as they are by "
                "lors_cuda.save_adapter, in all processes; load that into a model that is not sharded."
            )
        for handle in self._handles:
            handle.remove()
        with torch.no_grad():
            for pair in self.pairs:
                pair.fold()
                self.method.folded(pair)
                pair.layer.step_seed = pair.layer.noise = None
        for each in self._known_to:
            del vars(each)["lors_run"]

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs beside optimizer and data: plain values, and tensors under "tensors".

        Under fully_shard the tensors are gathered: call it in all processes.
        """
        tensors = {f"run.{name}": tensor for name, tensor in self.tensors.items()}
        for pair in self.pairs:
            tensors |= pair.state()
        return {
            "method": self.method.fields(),
            "seed": self.seed,
            "steps": self.steps,
            "step": self.step,
            "tensors": {name: tensor.detach() for name, tensor in tensors.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken.

        Raises:
            ValueError: it is of another method, other options, another seed or another model; nothing is changed.
        """
        own = self.state_dict()
        problems = [
            f"Its {what} is {_shown(state.get(what))}, and this run's {_shown(own[what])}."
            for what in ("method", "seed")
            if _plain(own[what]) != _plain(state.get(what))
        ]
        tensors: Mapping[str, Tensor] = state["tensors"]
        names = {name for name in own["tensors"] if not name.startswith("run.")}
        given = {name for name in tensors if not name.startswith("run.")}
        problems += [f"It has no tensor '{name}'." for name in sorted(names - given)]
        problems += [f"It has a tensor '{name}', and the model has none." for name in sorted(given - names)]
        for name in sorted(name for name in names & given if not name.endswith("_extra_state")):
            shape = list(own["tensors"][name].shape)
            if list(tensors[name].shape) != shape:
                problems.append(f"'{name}' has shape {list(tensors[name].shape)}, and {shape} is needed.")
        if problems:
            raise ValueError(f"The method's state was not loaded. {joined(problems)}")
        before = {name: tensor.clone() for name, tensor in own["tensors"].items()}
        try:
            for pair in self.pairs:
                pair.load_state(tensors)
        except ValueError as error:
            for pair in self.pairs:
                pair.load_state(before)
            raise ValueError(f"The method's state was not loaded. {error}") from None
        self.tensors = {
            name.removeprefix("run."): tensor.clone() for name, tensor in tensors.items() if name.startswith("run.")
        }
        self.step = int(state["step"])
        self._begin_step()

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write method.safetensors and method.json into ``directory``, beside the adapter.

        With several processes, call it in one; under fully_shard in all of them, and the first one writes.

        Raises:
            OSError: with the system's reason; what was there is unchanged.
        """
        sharded = reshard(self.model)
        state = self.state_dict()
        with together() if sharded else contextlib.nullcontext():
            if sharded and process_rank():
                return
            tensors = {name: tensor.contiguous().cpu() for name, tensor in state.pop("tensors").items()}
            written = require_safetensors().save(tensors)
            text = json.dumps(state, indent=2).encode()
            replace_files(Path(directory), {TENSORS_NAME: written, STATE_NAME: text})

    def load(self, directory: str | os.PathLike[str]) -> None:
        """Go on from a checkpoint that :meth:`save` has written.

        Raises:
            FileNotFoundError: the directory holds no method's state.
            ValueError: a file is damaged, or as :meth:`load_state_dict`; nothing is changed.
        """
        reshard(self.model)
        path = Path(directory) / STATE_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"'{directory}' holds no {STATE_NAME}: it is no checkpoint of a training with the method "
                f"'{self.method.name}'."
            )
        try:
            state = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"'{path}' is not JSON: it is cut short or corrupted ({error}).") from None
        self.load_state_dict({**state, "tensors": read_weights(Path(directory) / TENSORS_NAME)})


def _refuses_others(run: weakref.ref[Run]) -> Callable[..., None]:
    """A hook of every optimizer: a method that acts around the steps must not be passed by."""

    def check(optimizer: Optimizer, *_: Any) -> None:
        own = run()
        if own is None or optimizer is own._optimizer:
            return
        trained = {id(parameter) for pair in own.pairs for parameter in pair.trained()}
        if any(id(parameter) in trained for group in optimizer.param_groups for parameter in group["params"]):
            raise ValueError(
                f"An optimizer ({type(optimizer).__name__}) moves the adapters, and the method '{own.method.name}' "
                "acts around another one's steps or none's. Call run.attach(optimizer) first, or take "
                "run.optimizer(lr); or run.finish(), to train on without the method."
            )

    return check


def _trained_pairs(model: nn.Module) -> Iterator[Pair]:
    """The adapters that require gradients: of LoRSLinear, and the active ones of lors_cuda.peft."""
    for name, module in model.named_modules():
        if not isinstance(module, SparseLayer) or not module.has_adapters:
            continue
        if module.num_experts is not None:
            raise ValueError(
                f"'{name}' has adapters of experts, and the methods of lors_cuda.methods work on those of linears. "
                "Leave the experts out (exclude_modules=['experts']), or train without a method."
            )
        layer: Any = module
        own = layer.storage is layer
        adapters = [None] if own else [a for a in layer.active_adapters if a in layer.lora_A]
        for adapter in adapters:
            pair = Pair(name, layer, adapter)
            if any(pair.is_parametrised(which) for which in FACTORS):
                raise ValueError(
                    f"'{name}' has a parametrisation already; a method starts on plain adapters. Remove it with "
                    "torch.nn.utils.parametrize.remove_parametrizations."
                )
            if pair["lora_A"].requires_grad:
                yield pair


def _plain(value: Any) -> Any:
    """A value as a file gives it back: a tuple is a list there."""
    return json.loads(json.dumps(value))


def _shown(value: Any) -> str:
    return json.dumps(value)
