# SPDX-License-Identifier: Apache-2.0
# G = mean over batches of dLoss/dW [N, K]; G = U S V^T; lora_A = V[:, :r]^T / gamma, lora_B = 0. Of experts
# each has its own: G_e is the sum of dY_e^T X_e over the rows of expert e, divided by the number of batches.
# estimate_gradients runs on the sparse model before conversion, init_from_gradients on the converted one.
# The mask is not used: G is the gradient with respect to the whole weight, as in the paper.
"""Gradient-based initialisation of the adapters (LoRS, arXiv 2501.08582)."""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn

from ._batches import device_of, progress_bar, running, to_device
from ._checks import all_finite, check_stored, check_whole, is_packed, joined, shortened
from ._distributed import check_gathered, summed, together
from ._expert_runs import Product, expert_product, running_experts
from ._linears import is_conv1d
from .config import LoRSConfig
from .model import check_no_method, named_lors_layers, require_unconverted
from .sparse_linear import SparseLinear
from .targets import Target, find_targets

# The authors' settings for torch.svd_lowrank (github.com/hyx1999/LoRS): q = 4 r, 4 power iterations.
_OVERSAMPLING = 4
_POWER_ITERATIONS = 4
_SEED = 0


def estimate_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int = 8,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    progress: bool = True,
    config: LoRSConfig | None = None,
    targets: Sequence[Target] | None = None,
    sketch_experts: bool = False,
) -> dict[str, Tensor]:
    """Average the gradient of the loss with respect to each target weight over a few calibration batches.

    Call it on the sparse model, before get_lors_model. The model runs in eval mode (no dropout); training flags,
    requires_grad and existing gradients are restored afterwards, also after an error. Memory: one float32 accumulator
    per target on the host, and the gradient of one layer at a time on the device (LoRA-GA ran out of memory here,
    LoRA-GA issue 14). NOTE: if the model uses one linear several times, autograd holds its partial gradient until
    backward reaches the first use.

    Of experts it is the gradient of one expert at a time on the device; the accumulators on the host take 4 bytes per
    weight, 116 GB for 29 G of them. `sketch_experts` accumulates q = 4 r rows for each expert instead: Omega G_e, with
    one Omega [q, N] of normal numbers (the range finder of arXiv 0909.4061, from the side whose singular vectors are
    needed).

    With torch.distributed initialised, every process must call this on its own model (not under DistributedDataParallel
    or fully_shard) with its own batches, possibly none, and gets the mean over all processes; an error in one process
    raises in all.

    Args:
        model: the sparse model; its target weights are floating-point [N, K], or those of SparseLinear layers, also
            quantised.
        batches: arguments for `loss_fn`; at most `steps` of them are used.
        steps: number of batches, at least 1 (per process).
        loss_fn: `loss_fn(model, batch)` returns the scalar loss; None: `model(**batch).loss`, the batch moved to the
            model's device.
        progress: show a progress bar if tqdm is installed and the output is a terminal.
        config: selects the targets; None: "all-linear".
        targets: what `targets.find_targets` found in this model already, instead of `config`.
        sketch_experts: of experts return sketches, enough for `init_from_gradients` with the ranks of `config`.

    Returns:
        {module name: mean gradient}, float32 [N, K] on the CPU; zeros for a weight that took part in no batch. Of a
        stack of experts {parameter's name: [E, N, K]}, with `sketch_experts` [E, min(4 r, N), K]; zeros for an expert
        without rows.

    Raises:
        ValueError: no batches; a gradient or loss is not finite (the module and batch are named); no target matches;
            the model is already converted.
        TypeError: an argument or the loss is of the wrong type.
        RuntimeError: with torch.distributed, another process failed.
    """
    require_unconverted(model)
    try:
        steps = operator.index(steps)
    except TypeError:
        raise TypeError(f"steps must be an integer of at least 1, but is {steps!r}.") from None
    if steps < 1:
        raise ValueError(f"steps must be at least 1, but is {steps}.")
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches must be an iterable of batches, but is {type(batches).__name__}.")
    if targets is None:
        targets = find_targets(model, LoRSConfig(r=1) if config is None else config)  # any rank may follow
    plain = [target for target in targets if not target.stack and not isinstance(target.module, SparseLinear)]
    packed = next((target for target in plain if is_packed(target.module.weight)), None)
    if packed is not None:
        raise ValueError(
            f"The weight of '{packed.name}' is of the class {type(packed.module.weight).__name__}, and gradients are "
            "estimated with respect to ordinary tensors. Put its to_dense() or dequantize() in its place first."
        )
    sums = {target.name: _zeros(target, sketch_experts) for target in targets}
    count = 0
    # An error in one process must raise in all: the others would wait for it in the next collective.
    with (
        together(),
        _only_weights_require_grad(model, plain),
        _collected(targets, sums) as first_bad,
        torch.enable_grad(),
    ):
        for batch in progress_bar(
            itertools.islice(batches, steps),
            total=_expected(batches, steps),
            description="estimating gradients",
            unit="batch",
            shown=progress,
        ):
            torch.autograd.backward(_loss(model, batch, loss_fn, count))
            if first_bad:
                raise ValueError(
                    f"The gradient of the loss with respect to the weight of '{first_bad[0]}' has NaN or "
                    f"infinity in batch {count}. Check that batch, or run the estimate in float32 or bfloat16."
                )
            count += 1
    count = int(summed(torch.tensor(count)))
    if count == 0:
        raise ValueError("batches is empty, and at least one batch is needed to estimate gradients.")
    for name, gradient in sums.items():
        sums[name] = summed(gradient).div_(count)
    return sums


def init_from_gradients(model: nn.Module, gradients: Mapping[str, Tensor], *, stable_gamma: float = 1.0) -> None:
    """Set lora_A to the leading right singular vectors of each layer's gradient, lora_B to zero.

    With G = U S V^T: lora_A = V[:, :r]^T / stable_gamma (arXiv 2501.08582). The model's output is unchanged, because
    lora_B is zero. The decomposition is torch.svd_lowrank with q = min(4 r, N, K), or an exact SVD if q is min(N, K);
    seeded, so that equal gradients give equal adapters, without changing the global random state. A layer whose
    gradient is all zero has no leading direction and keeps its lora_A; so does an expert, and experts are counted in a
    warning: no token of the batches was routed to them.

    Args:
        model: a converted model.
        gradients: {module name: [N, K]} as `estimate_gradients` returns it, one for each LoRS layer, of experts
            {parameter's name: [E, N, K]} or a sketch [E, q, K] of at least r rows; those of other modules are ignored,
            so that one estimate serves every choice of targets.
        stable_gamma: finite, greater than 0.

    Raises:
        ValueError: a layer has no gradient, or one of another shape, or with NaN or infinity (all problems are listed
            and nothing is changed); the model is already sharded, or a method of lors_cuda.methods trains it.
        TypeError: `gradients` is not a mapping of tensors.
    """
    check_start(gradients, stable_gamma)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but is {type(model).__name__}.")
    layers = dict(named_lors_layers(model))
    if not layers:
        raise ValueError("The model has no LoRS layers. Convert it with get_lors_model first.")
    check_gathered(model)
    check_no_method(model, "given another start")
    set_from_gradients({name: (layer.lora_A, layer.lora_B) for name, layer in layers.items()}, gradients, stable_gamma)


def set_from_gradients(
    adapters: Mapping[str, tuple[Tensor, Tensor]], gradients: Mapping[str, Tensor], stable_gamma: float
) -> None:
    """Set pairs lora_A [r, K], lora_B [N, r], of experts with E in front, for `init_from_gradients`; the caller has
    called `check_start`.

    Raises:
        ValueError: as `init_from_gradients`; nothing is changed.
    """
    check_whole("lora_A", next(iter(adapters.values()))[0])
    for name, pair in adapters.items():
        for which, factor in zip(("lora_A", "lora_B"), pair, strict=True):
            stored = factor if factor._base is None else factor._base  # lors_cuda.peft gives views of experts'
            check_stored(f"{which} of '{name}'", stored, "given another start")
    problems = _problems(adapters, gradients)
    if problems:
        raise ValueError(f"The gradients do not fit the model, nothing was changed. {joined(problems)}")
    starts: dict[str, Tensor] = {}
    kept: dict[str, int] = {}
    for name, (lora_A, _) in adapters.items():
        starts[name] = lora_A.detach().clone()
        for start, gradient in zip(_matrices(starts[name]), _matrices(gradients[name].detach()), strict=True):
            gradient = gradient.to(lora_A.device, torch.float32)
            if bool((gradient != 0).any()):
                start.copy_(leading_right_singular_vectors(gradient, lora_A.shape[-2]) / stable_gamma)
            elif lora_A.dim() == 3:
                kept[name] = kept.get(name, 0) + 1
    with torch.no_grad():
        for name, (lora_A, lora_B) in adapters.items():
            lora_A.copy_(starts[name])
            lora_B.zero_()
    if kept:
        every = sum(len(lora_A) for lora_A, _ in adapters.values() if lora_A.dim() == 3)
        which = shortened([f"{count} of '{name}'" for name, count in kept.items()])
        warnings.warn(
            f"{sum(kept.values())} of {every} adapters of experts have no gradient, because no token of the batches "
            f"was routed to them, and keep the lora_A that they had: {which}. More batches reach more experts.",
            UserWarning,
            stacklevel=3,
        )


def _matrices(tensor: Tensor) -> Tensor:
    """[E, N, K]; of a linear's [N, K] E is 1."""
    return tensor if tensor.dim() == 3 else tensor[None]


def check_start(gradients: Mapping[str, Tensor], stable_gamma: float) -> None:
    """Refuse arguments of `init_from_gradients` that are wrong for any model."""
    if isinstance(stable_gamma, bool) or not isinstance(stable_gamma, (int, float)):
        raise TypeError(f"stable_gamma must be a number, but is {stable_gamma!r}.")
    if not (math.isfinite(stable_gamma) and stable_gamma > 0):
        raise ValueError(f"stable_gamma must be finite and greater than 0, but is {stable_gamma}.")
    if not isinstance(gradients, Mapping):
        raise TypeError(f"gradients must map module names to tensors, but is {type(gradients).__name__}.")


def _problems(adapters: Mapping[str, tuple[Tensor, Tensor]], gradients: Mapping[str, Tensor]) -> list[str]:
    problems = [f"There is no gradient for '{name}'." for name in adapters if name not in gradients]
    for name, (lora_A, lora_B) in adapters.items():
        if name not in gradients:
            continue
        gradient, needed = gradients[name], [*lora_B.shape[:-1], lora_A.shape[-1]]
        r = lora_A.shape[-2]
        if isinstance(gradient, Tensor) and gradient.dim() == lora_A.dim() == 3 and r <= gradient.shape[1] < needed[1]:
            needed[1] = gradient.shape[1]  # a sketch
        if not isinstance(gradient, Tensor) or not gradient.is_floating_point():
            kind = gradient.dtype if isinstance(gradient, Tensor) else type(gradient).__name__
            problems.append(f"The gradient of '{name}' must be a floating-point tensor, but is {kind}.")
        elif list(gradient.shape) != needed:
            problems.append(f"The gradient of '{name}' has shape {list(gradient.shape)}, but {needed} is needed.")
        elif not all_finite(gradient):
            problems.append(f"The gradient of '{name}' has NaN or infinity.")
        elif r > min(needed[-2:]):
            problems.append(
                f"'{name}' has rank {r}, and a gradient of shape {needed} has {min(needed[-2:])} singular vectors; use "
                "a smaller rank."
            )
    return problems


def leading_right_singular_vectors(matrix: Tensor, r: int) -> Tensor:
    """Return the first r right singular vectors of `matrix` [N, K] as rows [r, K], float32, orthonormal."""
    full = min(matrix.shape)
    q = min(_OVERSAMPLING * r, full)
    if q == full:
        exact: Tensor = torch.linalg.svd(matrix, full_matrices=False).Vh
        return exact[:r]
    on_cuda = matrix.device.type == "cuda"
    with torch.random.fork_rng(devices=[matrix.device] if on_cuda else []):
        # torch.manual_seed would also seed devices whose state is not restored here.
        if on_cuda:
            with torch.cuda.device(matrix.device):
                torch.cuda.manual_seed(_SEED)
        else:
            torch.default_generator.manual_seed(_SEED)
        _, _, right = torch.svd_lowrank(matrix, q=q, niter=_POWER_ITERATIONS)
    return right[:, :r].T.contiguous()


@contextlib.contextmanager
def _only_weights_require_grad(model: nn.Module, targets: Sequence[Target]) -> Iterator[None]:
    """Eval mode, gradients for the target weights only; restores everything afterwards."""
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    existing = [(target.module.weight, target.module.weight.grad) for target in targets]
    try:
        for parameter, _ in required:
            parameter.requires_grad_(False)
        for weight, _ in existing:
            weight.requires_grad_(True)
            weight.grad = None
        with running(model, training=False):
            yield
    finally:
        for weight, gradient in existing:
            weight.grad = gradient
        for parameter, was_required in required:
            parameter.requires_grad_(was_required)


@contextlib.contextmanager
def _collected(targets: Sequence[Target], sums: dict[str, Tensor]) -> Iterator[list[str]]:
    """Add each weight's gradient to its sum on the host as soon as it is complete, and free it.

    Yields a list that stays empty while every gradient is finite, and else holds the name of the first one that is not.
    """
    first_bad: list[str] = []

    def add(target: Target, gradient: Tensor) -> None:
        if not first_bad and not all_finite(gradient):
            first_bad.append(target.name)
        sums[target.name] += (gradient.t() if is_conv1d(target.module) else gradient).to("cpu")

    def hook_for(target: Target) -> Callable[[Tensor], None]:
        def add_and_free(weight: Tensor) -> None:
            gradient, weight.grad = weight.grad, None
            if gradient is not None:
                add(target, gradient)

        return add_and_free

    # A layer that is stored sparse has no dense weight to differentiate by: its gradient is dY^T X.
    def with_gradient(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        input, *others = inputs
        return (input if input.requires_grad else input.detach().requires_grad_(), *others)

    def product_for(target: Target) -> Callable[..., None]:
        def on_output(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            input = inputs[0].detach().flatten(0, -2)
            output.register_hook(lambda gradient: add(target, gradient.flatten(0, -2).t() @ input.to(gradient.dtype)))

        return on_output

    # Of experts likewise, one expert after another.
    def product_of(experts: nn.Module, stacks: Mapping[str, Target]) -> Product:
        def product(name: str, expert: int, input: Tensor, tokens: Tensor, total: int) -> Tensor:
            if name not in stacks:
                return expert_product(experts, name, expert, input)
            input = input if input.requires_grad else input.detach().requires_grad_()
            output = expert_product(experts, name, expert, input)
            rows, total_sum = input.detach(), sums[stacks[name].name][expert]

            def on_gradient(gradient: Tensor) -> None:
                if not first_bad and not all_finite(gradient):
                    first_bad.append(stacks[name].name)
                q, N = total_sum.shape[0], gradient.shape[1]
                left = gradient.t() if q == N else _sketching(q, N, gradient.device) @ gradient.t().float()
                total_sum.add_((left @ rows.to(left.dtype)).to("cpu"))

            output.register_hook(on_gradient)
            return output

        return product

    handles = []
    stacks: dict[nn.Module, dict[str, Target]] = {}
    for target in targets:
        if target.stack:
            stacks.setdefault(target.module, {})[target.stack] = target
            continue
        if isinstance(target.module, SparseLinear):
            handles.append(target.module.register_forward_pre_hook(with_gradient))
            handles.append(target.module.register_forward_hook(product_for(target)))
            continue
        weight: Any = target.module.weight  # torch's method for the hook is untyped
        handles.append(weight.register_post_accumulate_grad_hook(hook_for(target)))
    with contextlib.ExitStack() as undone:
        for handle in handles:
            undone.callback(handle.remove)
        for experts, of_module in stacks.items():
            undone.enter_context(running_experts(experts, product_of(experts, of_module)))
        yield first_bad


def _zeros(target: Target, sketch_experts: bool) -> Tensor:
    N, K = target.shape
    if target.num_experts is None:
        return torch.zeros(N, K, dtype=torch.float32)
    return torch.zeros(target.num_experts, min(_OVERSAMPLING * target.r, N) if sketch_experts else N, K)


def _sketching(q: int, N: int, device: torch.device) -> Tensor:
    """[q, N], the same in every call: of variance 1 / q, so that it keeps lengths in expectation."""
    return torch.randn(q, N, generator=torch.Generator().manual_seed(_SEED)).to(device) / math.sqrt(q)


def _loss(model: nn.Module, batch: Any, loss_fn: Callable[[nn.Module, Any], Tensor] | None, index: int) -> Tensor:
    """Return the scalar loss of one batch, checked."""
    loss: Any
    if loss_fn is not None:
        loss = loss_fn(model, batch)
    else:
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"Without loss_fn a batch must be a mapping of the model's arguments (input_ids, labels, ...), but "
                f"batch {index} is {type(batch).__name__}. Give loss_fn(model, batch)."
            )
        loss = getattr(model(**to_device(batch, device_of(model))), "loss", None)
        if loss is None:
            raise ValueError(
                f"model(**batch) returned no loss for batch {index}. Put 'labels' into the batch, or give "
                "loss_fn(model, batch)."
            )
    if not isinstance(loss, Tensor):
        raise TypeError(f"The loss must be a scalar tensor, but is {type(loss).__name__} for batch {index}.")
    if loss.numel() != 1:
        raise ValueError(f"The loss must be a scalar, but has shape {list(loss.shape)} for batch {index}.")
    if not loss.requires_grad:
        raise ValueError(
            f"The loss of batch {index} depends on no target weight (it requires no gradient). Do not detach it, and "
            "do not compute it under torch.no_grad()."
        )
    if not math.isfinite(loss.item()):
        raise ValueError(f"The loss of batch {index} is {loss.item()}. Check that batch and the model's weights.")
    return loss


def _expected(batches: Iterable[Any], steps: int) -> int:
    return min(steps, len(batches)) if isinstance(batches, Sized) else steps
