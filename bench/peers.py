# SPDX-License-Identifier: Apache-2.0
"""One sparse linear with a live adapter, by each method: Y [T, N] from X [T, K], W [N, K], A [r, K], B [N, r].

Every peer has the same signature and a dense weight with zeros; linear.py times it and compares it with the float64
formula of what it claims to compute (`truth`). Written from the papers' equations, not from their code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

LinearFunction = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class Peer:
    """A peer: how it is made, which float64 formula it answers to, and what a reader should know about it."""

    make: Callable[[], LinearFunction]  # called once per problem, so that torch.compile starts from a clean cache
    formula: str  # a key of FORMULAS
    note: str
    compiled: bool = False
    only_16_bit: bool = False  # in float32 it would be another peer under a second name
    only_sparse24: bool = False  # takes a 2:4 weight only


@dataclass(frozen=True)
class Problem:
    """The tensors of one measurement; adapters have the weight's dtype because not every peer accepts others."""

    input: Tensor  # [T, K], requires grad
    weight: Tensor  # [N, K], frozen, zeros where pruned
    lora_A: Tensor  # [r, K], requires grad
    lora_B: Tensor  # [N, r], requires grad, not zero: a zero B would hide errors in dA and dX
    scaling: float
    grad_output: Tensor  # [T, N]

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        return self.input, self.weight, self.lora_A, self.lora_B, self.scaling

    def bytes(self) -> int:
        tensors = (self.input, self.weight, self.lora_A, self.lora_B, self.grad_output)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def copy(self) -> Problem:
        """The same values in memory of their own."""
        held = {k: v.detach().clone().requires_grad_(v.requires_grad) for k, v in vars(self).items() if k != "scaling"}
        return Problem(**held, scaling=self.scaling)


def make_problem(
    tokens: int,
    shape: tuple[int, int],
    rank: int,
    dtype: torch.dtype,
    *,
    density: float | None = None,
    scaling: float = 2.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Problem:
    """Random tensors; the mask has the given density at random places, or, without one, two at random of each four.

    `scaling` is not 1, so that forgetting it shows.
    """
    out_features, in_features = shape
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=generator, device=device) * std

    chances = torch.rand(out_features, in_features, generator=generator, device=device)
    if density is None:
        mask = (chances.view(-1, 4).argsort(-1).argsort(-1) < 2).view(out_features, in_features)
    else:
        mask = chances < density
    weight = (normal(out_features, in_features, std=in_features**-0.5) * mask).to(dtype)
    return Problem(
        input=normal(tokens, in_features).to(dtype).requires_grad_(),
        weight=weight,
        lora_A=normal(rank, in_features, std=in_features**-0.5).to(dtype).requires_grad_(),
        lora_B=normal(out_features, rank, std=0.25 * rank**-0.5).to(dtype).requires_grad_(),
        scaling=scaling,
        grad_output=normal(tokens, out_features).to(dtype),
    )


# --- the formulas in float64 ------------------------------------------------------------------------------------------


def _unmasked_adapter_gradients(x: Tensor, a: Tensor, b: Tensor, s: float, grad: Tensor) -> tuple[Tensor, Tensor]:
    return s * (grad @ b).T @ x, s * grad.T @ (x @ a.T)


def _lors(x: Tensor, w: Tensor, a: Tensor, b: Tensor, s: float, grad: Tensor) -> tuple[Tensor, ...]:
    merged = w + s * (w != 0) * (b @ a)
    return (x @ merged.T, grad @ merged, *_unmasked_adapter_gradients(x, a, b, s, grad))


def _exact(x: Tensor, w: Tensor, a: Tensor, b: Tensor, s: float, grad: Tensor) -> tuple[Tensor, ...]:
    mask = w != 0
    merged = w + s * mask * (b @ a)
    grad_merged = mask * (grad.T @ x)
    return x @ merged.T, grad @ merged, s * b.T @ grad_merged, s * grad_merged @ a.T


def _unmasked(x: Tensor, w: Tensor, a: Tensor, b: Tensor, s: float, grad: Tensor) -> tuple[Tensor, ...]:
    merged = w + s * (b @ a)
    return (x @ merged.T, grad @ merged, *_unmasked_adapter_gradients(x, a, b, s, grad))


def _frozen(x: Tensor, w: Tensor, a: Tensor, b: Tensor, s: float, grad: Tensor) -> tuple[Tensor, ...]:
    return x @ w.T, grad @ w


def _spp(x: Tensor, w: Tensor, a: Tensor, b: Tensor, s: float, grad: Tensor) -> tuple[Tensor, ...]:
    rank, in_features = a.shape
    groups = w.shape[0] // rank
    rows = a.repeat_interleave(groups, dim=0)  # [N, K]
    column = b[:, :1]  # [N, 1]
    merged = w + s * w * rows * column
    grad_merged = w * (grad.T @ x)
    grad_b = torch.zeros_like(b)
    grad_b[:, 0] = s * (grad_merged * rows).sum(1)
    grad_a = s * (grad_merged * column).reshape(rank, groups, in_features).sum(1)
    return x @ merged.T, grad @ merged, grad_a, grad_b


FORMULAS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "lors": _lors,  # masked forward, the paper's adapter gradients
    "exact": _exact,  # masked forward, its true gradients
    "unmasked": _unmasked,  # plain LoRA: zeros are not kept
    "frozen": _frozen,  # no adapter
    "spp": _spp,  # row and column scaling of the weight
}
RESULTS = ("output", "grad_input", "grad_lora_A", "grad_lora_B")


@torch.no_grad()
def truth(formula: str, problem: Problem) -> dict[str, Tensor]:
    """The results of a formula in float64, from the problem's rounded tensors: {"output": [T, N], "grad_input", …}."""
    x, w, a, b, s = problem.arguments()
    tensors = FORMULAS[formula](x.double(), w.double(), a.double(), b.double(), s, problem.grad_output.double())
    return dict(zip(RESULTS, tensors, strict=False))


# --- the peers --------------------------------------------------------------------------------------------------------


def official_merge(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """The eager merge of the paper's code, three passes over [N, K]: compare, addmm, multiply in place."""
    mask = weight != 0
    merged = torch.addmm(weight, lora_B, lora_A, alpha=scaling)
    return merged.mul_(mask)


class _Official(torch.autograd.Function):
    """LoRS in eager torch: the weight recomputed in backward, the adapter gradients as four thin matmuls.

    NOTE: the authors' code leaves `scaling` out of both adapter gradients; it is here so that errors compare. It
    multiplies [r, K] and [N, r] only, which costs nothing next to the rest.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(input, weight, lora_A, lora_B)
        ctx.scaling = scaling
        return input @ official_merge(weight, lora_A, lora_B, scaling).T

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        input, weight, lora_A, lora_B = ctx.saved_tensors
        grad_input = grad_output @ official_merge(weight, lora_A, lora_B, ctx.scaling)
        x, grad = input.flatten(0, -2), grad_output.flatten(0, -2)
        grad_lora_A = ((grad @ lora_B).T @ x).mul_(ctx.scaling)
        grad_lora_B = (grad.T @ (x @ lora_A.T)).mul_(ctx.scaling)
        return grad_input, None, grad_lora_A, grad_lora_B, None


def official(input: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    output: Tensor = _Official.apply(input, weight, lora_A, lora_B, scaling)
    return output


class _OfficialUpcast(torch.autograd.Function):
    """The same with every matmul in float32: what a person would write who found torch's 16-bit matmuls slow."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(input, weight, lora_A, lora_B)
        ctx.scaling = scaling
        x, w, a, b = _upcast(input, weight, lora_A, lora_B)
        return (x @ official_merge(w, a, b, scaling).T).to(input.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        input, _, lora_A, lora_B = ctx.saved_tensors
        x, w, a, b, grad_output = _upcast(*ctx.saved_tensors, *grad_outputs)
        grad_input = (grad_output @ official_merge(w, a, b, ctx.scaling)).to(input.dtype)
        x, grad = x.flatten(0, -2), grad_output.flatten(0, -2)
        grad_lora_A = ((grad @ b).T @ x).mul_(ctx.scaling).to(lora_A.dtype)
        grad_lora_B = (grad.T @ (x @ a.T)).mul_(ctx.scaling).to(lora_B.dtype)
        return grad_input, None, grad_lora_A, grad_lora_B, None


def _upcast(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]


def official_upcast(input: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    output: Tensor = _OfficialUpcast.apply(input, weight, lora_A, lora_B, scaling)
    return output


def sqft(input: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    return F.linear(input, weight + (lora_B @ lora_A) * scaling * (weight != 0))


def spp(input: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """SPP's parameters in our tensors: all of lora_A, and the first column of lora_B; r must divide N."""
    rows = lora_A.repeat_interleave(weight.shape[0] // lora_A.shape[0], dim=0)
    return F.linear(input, weight + weight * rows * lora_B[:, :1] * scaling)


def peft_lora(input: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    return F.linear(input, weight) + F.linear(F.linear(input, lora_A), lora_B) * scaling


def frozen_linear(input: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    return F.linear(input, weight)


def checkpointed(function: LinearFunction) -> LinearFunction:
    """The same function under activation checkpointing: its forward runs again during backward."""

    def run(input: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        output: Tensor = checkpoint(function, input, weight, lora_A, lora_B, scaling, use_reentrant=False)
        return output

    return run


def _reference_merge(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    # Out of place and through `where`, so that the compiler may fuse compare, select and add as it likes.
    return torch.where(weight != 0, torch.addmm(weight, lora_B, lora_A, alpha=scaling), 0.0)


class _Reference(torch.autograd.Function):
    """The LoRS formulas written for a compiler: functional, nothing in place.

    NOTE: the compiler sees forward and backward as one graph and may keep the merged weight instead of recomputing it,
    which is faster and takes [N, K] per layer; the bytes in the table say what it did.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(input, weight, lora_A, lora_B)
        ctx.scaling = scaling
        return input @ _reference_merge(weight, lora_A, lora_B, scaling).T

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        input, weight, lora_A, lora_B = ctx.saved_tensors
        grad_input = grad_output @ _reference_merge(weight, lora_A, lora_B, ctx.scaling)
        x, grad = input.flatten(0, -2), grad_output.flatten(0, -2)
        grad_lora_A = (grad @ lora_B).T @ x * ctx.scaling
        grad_lora_B = grad.T @ (x @ lora_A.T) * ctx.scaling
        return grad_input, None, grad_lora_A, grad_lora_B, None


def _reference(input: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    output: Tensor = _Reference.apply(input, weight, lora_A, lora_B, scaling)
    return output


def compiled(mode: str | None = None) -> LinearFunction:
    """torch.compile of the reference, freshly made: code compiled for an earlier problem is dropped."""
    torch.compiler.reset()
    return torch.compile(_reference, mode=mode, fullgraph=True, dynamic=False)


class LorsCudaLinear:
    """This package. A compressed layout is made from each dense weight at its first call, which is never timed.

    `cached`: inside lors_cuda.merge_cache, as every batch but the first of an optimizer step, or evaluation, finds it.
    """

    def __init__(self, gradient: str, layout: str = "dense", *, cached: bool = False) -> None:
        self.gradient, self.layout, self.cached = gradient, layout, cached
        self.compressed: dict[int, tuple[Tensor, Any]] = {}  # by the dense weight's id, which it keeps alive
        self.merged: dict[int, Any] = {}  # likewise

    def stored(self, weight: Tensor) -> Any:
        """The weight as lors_linear is given it."""
        import lors_cuda  # here, so that the other peers run (and are tested) where the package is not built

        if self.layout == "dense":
            return weight
        if id(weight) not in self.compressed:
            self.compressed[id(weight)] = weight, lors_cuda.SparseWeight.from_dense(weight, self.layout)
        return self.compressed[id(weight)][1]

    def __call__(self, input: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        import lors_cuda
        from lors_cuda._merged_weight import MergedWeight

        cache = self.merged.setdefault(id(weight), MergedWeight()) if self.cached else None
        return lors_cuda.lors_linear(
            input, self.stored(weight), lora_A, lora_B, scaling, gradient=self.gradient, cache=cache
        )

    def held(self, weight: Tensor) -> list[Tensor]:
        """The tensors that live on between steps: the stored weight's, and the merged one where it is kept."""
        stored = self.stored(weight)
        objects = [*([stored] if isinstance(stored, Tensor) else vars(stored).values())]
        if id(weight) in self.merged:
            objects += vars(self.merged[id(weight)]).values()
        return [t for t in objects if isinstance(t, Tensor)]


class LorsCudaLayer:
    """The same as a module, whose adapters are the problem's: what the layer itself costs."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Any]] = {}  # by the dense weight's id, which it keeps alive

    def __call__(self, input: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        import lors_cuda

        if id(weight) not in self.layers:
            stored, r = lors_cuda.SparseWeight(weight), lora_A.shape[0]
            layer = lors_cuda.LoRSLinear(stored, r=r, lora_alpha=scaling * r)
            layer._parameters.update(lora_A=lora_A, lora_B=lora_B)  # not attributes, which would be found faster
            self.layers[id(weight)] = weight, layer
        output: Tensor = self.layers[id(weight)][1](input)
        return output


def stored_tensors(function: LinearFunction, weight: Tensor) -> list[Tensor]:
    """What `function` holds of a weight between steps."""
    return function.held(weight) if isinstance(function, LorsCudaLinear) else [weight]


PEERS: dict[str, Peer] = {
    "official": Peer(lambda: official, "lors", "LoRS in eager torch, the baseline"),
    "official_upcast": Peer(
        lambda: official_upcast, "lors", "LoRS in eager torch, its matmuls in float32", only_16_bit=True
    ),
    "lors_cuda": Peer(lambda: LorsCudaLinear("lors"), "lors", 'this package, gradient="lors", dense weight'),
    "lors_cuda_24": Peer(
        lambda: LorsCudaLinear("lors", "2:4"), "lors", "the same on a 2:4 weight stored compressed", only_sparse24=True
    ),
    "lors_cuda_bitmap": Peer(lambda: LorsCudaLinear("lors", "bitmap"), "lors", "the same on a bitmap weight"),
    "lors_cuda_cached": Peer(
        lambda: LorsCudaLinear("lors", cached=True), "lors", "the same with the merged weight kept from the call before"
    ),
    "lors_cuda_layer": Peer(LorsCudaLayer, "lors", "the same by LoRSLinear"),
    "lors_cuda_exact": Peer(lambda: LorsCudaLinear("exact"), "exact", 'this package, gradient="exact"'),
    "compiled": Peer(compiled, "lors", "torch.compile of the LoRS formulas, default mode", compiled=True),
    "compiled_max_autotune": Peer(
        # Without CUDA graphs, which would copy each of the rotated weights into a fixed place.
        lambda: compiled("max-autotune-no-cudagraphs"),
        "lors",
        "torch.compile of the LoRS formulas, max-autotune",
        compiled=True,
    ),
    "sqft": Peer(lambda: sqft, "exact", "masked LoRA under autograd"),
    "sqft_checkpointed": Peer(lambda: checkpointed(sqft), "exact", "masked LoRA, checkpointed"),
    "spp": Peer(lambda: spp, "spp", "row and column scaling of the weight (other parameters, other model)"),
    "spp_checkpointed": Peer(lambda: checkpointed(spp), "spp", "the same, checkpointed"),
    "peft_lora": Peer(lambda: peft_lora, "unmasked", "plain LoRA: a merge would destroy the zeros"),
    "frozen_linear": Peer(lambda: frozen_linear, "frozen", "F.linear without an adapter: trains nothing"),
}
_ON_REQUEST = ("lors_cuda_layer", "compiled_max_autotune", "spp", "spp_checkpointed")
DEFAULT_PEERS = tuple(name for name in PEERS if name not in _ON_REQUEST)


def forward_backward(function: LinearFunction, problem: Problem) -> dict[str, Tensor]:
    """One forward and one backward; the results by the names of RESULTS, without those a peer does not have."""
    output = function(*problem.arguments())
    wanted = [problem.input, problem.lora_A, problem.lora_B]
    # autograd.grad, not backward(): no peer is charged for accumulating into .grad
    gradients = torch.autograd.grad(output, wanted, problem.grad_output, allow_unused=True)
    tensors = (output.detach(), *gradients)
    return {name: tensor for name, tensor in zip(RESULTS, tensors, strict=True) if tensor is not None}
