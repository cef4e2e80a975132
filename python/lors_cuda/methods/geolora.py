# SPDX-License-Identifier: Apache-2.0
# dW = s U S V^T with orthonormal U [N, r], V [K, r]. Most steps move S alone, by Adam. A basis step doubles the rank:
#   U' = orth[U, G V],  V' = orth[V, G^T U],  S' = [[S - h U^T G V, L^T V_new], [U_new^T K, 0]],
#   K = U S - h G V,  L = V S^T - h G^T U,
# and later the SVD of S keeps the smallest r whose tail is below `tolerance` of ||S||. GeoLoRA, arXiv 2410.18720.
# The pair is lora_B = U S, lora_A = V^T, whose gradient of lora_B is G V. For a basis step it is lora_B = [U S, U],
# lora_A = [V^T; 0], the same product: then the second half of lora_A's gradient is (G^T U)^T, from the same backward.
"""GeoLoRA: an optimizer that moves the bases of an update and finds its rank."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._checks import check_count, check_number
from ._method import Method
from ._pair import FACTORS, Pair
from ._run import Run


@dataclasses.dataclass(frozen=True)
class GeoLoRA(Method):
    """Integrates the flow of a low-rank update; the rank of every layer follows the singular values.

    Starts from random orthonormal bases and S = 0, at the rank of the configuration; where ``steps`` are known, the
    last basis step is one that is still truncated. Parameters beside the adapters are not trained. With
    ``gradient="exact"`` a basis step of small rate does not raise the loss. A layer whose rank cannot be doubled takes
    half of min(N, K). Source: arXiv 2410.18720 and its code, whose vision layer swaps the factors in the truncation,
    which we do not follow.

    Args:
        tolerance: share of the norm of S that a truncation may drop, 0 to less than 1.
        cycle: steps of S between two basis steps, at least 1; the truncation comes after three quarters of them.
        max_rank: at most this rank is kept by a truncation.
        min_rank: and at least this, 1 or more.
        basis_lr: h of the basis steps where the learning rate is at its peak; it follows the schedule. None: as ``lr``.
    """

    tolerance: float = 0.15
    cycle: int = 30
    max_rank: int = 32
    min_rank: int = 2
    basis_lr: float | None = None
    name: ClassVar[str] = "geolora"
    gradient: ClassVar[str] = "exact"
    alone_in: ClassVar[tuple[str, ...]] = ("step controller",)
    has_own_start: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("tolerance", self.tolerance, "at least 0 and less than 1", lambda x: 0 <= x < 1)
        for field in ("cycle", "max_rank", "min_rank"):
            check_count(field, getattr(self, field))
        if self.min_rank > self.max_rank:
            raise ValueError(f"min_rank is {self.min_rank} and max_rank {self.max_rank}; it must not exceed that.")
        if self.basis_lr is not None:
            check_number("basis_lr", self.basis_lr, "more than 0", lambda x: 0 < x < math.inf)

    def parametrise(self, pair: Pair, run: Run) -> None:
        N, K = pair.layer.out_features, pair.layer.in_features
        most = min(self.max_rank, min(N, K) // 2)
        if most < self.min_rank:
            raise ValueError(
                f"'{pair.name}' of {N} x {K} has room for rank {min(N, K)}, and a basis step doubles min_rank = "
                f"{self.min_rank}: lower min_rank, or leave the layer out (exclude_modules)."
            )
        r = min(max(pair.r, self.min_rank), most)
        V = orthonormal(K, r, run.generator(f"{pair.name}.V"))
        # Constant shapes, as DistributedDataParallel needs them; a view narrows them to what is in use.
        lora_A, lora_B = V.new_zeros(2 * most, K), V.new_zeros(N, 2 * most)
        lora_A[:r] = V.T
        pair.parametrise("lora_A", Narrow(0, r), lora_A)
        pair.parametrise("lora_B", Narrow(1, r), lora_B)
        pair.note_rank()

    def optimizer(self, run: Run, lr: float, **options: Any) -> Optimizer:
        return GeometricOptimizer(self, run, lr, **options)


class Narrow(nn.Module):
    """The first ``rank`` rows (``dim`` 0) or columns (1) of what is stored."""

    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        self.dim, self.rank = dim, rank

    def forward(self, stored: Tensor) -> Tensor:
        return stored.narrow(self.dim, 0, self.rank)

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.rank])

    def set_extra_state(self, state: Tensor) -> None:
        self.rank = int(state)


class GeometricOptimizer(Optimizer):
    """Moves pairs as the head of the file says; made by :meth:`GeoLoRA.optimizer`.

    Its state, kept under each lora_B: U [N, r], S [r, r], Adam's moments of S, and the steps since S's bases changed.

    Args:
        method, run: what it works for.
        lr: of S.
        betas, eps: of Adam.

    Raises:
        ValueError: parameters beside the adapters are trained.
    """

    def __init__(
        self, method: GeoLoRA, run: Run, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        run.require_whole("GeoLoRA")
        run.require_adapters_alone("GeoLoRA")
        self.method, self.run = method, run
        self._truncated_at = 3 * method.cycle // 4
        share = 1.0 if method.basis_lr is None else method.basis_lr / lr
        factors = [pair.stored(which) for pair in run.pairs for which in FACTORS]
        super().__init__(factors, {"lr": lr, "betas": betas, "eps": eps, "basis_share": share})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.run.require_whole("GeoLoRA")
        (group,) = self.param_groups
        for pair in self.run.pairs:
            self._step(pair, group)
        return loss

    def _step(self, pair: Pair, group: dict[str, Any]) -> None:
        lora_A, lora_B = pair.stored("lora_A"), pair.stored("lora_B")
        state = self.state[lora_B]
        if not state:
            if self.run.step:
                raise ValueError(
                    f"The method 'geolora' has done {self.run.step} steps and its optimizer none: the bases are in the "
                    "optimizer's state. Load that too (optimizer.load_state_dict)."
                )
            state["step"] = 0
            state["U"] = orthonormal(lora_B.shape[0], pair.r, self.run.generator(f"{pair.name}.U")).to(lora_B)
            _restart(state, lora_B.new_zeros(pair.r, pair.r))
        U, S, V = state["U"], state["S"], lora_A[: len(state["S"])].T
        r = len(S)
        dB = torch.zeros_like(U) if lora_B.grad is None else lora_B.grad[:, :r]
        if self._is_basis_step(state["step"]):
            dL = torch.zeros_like(V) if lora_A.grad is None else lora_A.grad[r : 2 * r].T
            U, S, V = augmented(U, S, V, dB, dL, group["lr"] * group["basis_share"])
            _restart(state, S)
        elif lora_B.grad is not None:
            _adam(state, U.T @ dB, group)
            if state["step"] > self.method.cycle and state["step"] % (self.method.cycle + 1) == self._truncated_at:
                most = lora_A.shape[0] // 2
                U, S, V = truncated(U, S, V, self.method.tolerance, self.method.min_rank, most)
                _restart(state, S)
        state["step"] += 1
        state["U"] = U
        self._write(pair, U, state["S"], V, basis=self._is_basis_step(state["step"]))

    def _is_basis_step(self, step: int) -> bool:
        """Whether this step doubles the rank: at the end of each cycle, if it can still be truncated."""
        steps = self.run.steps
        enough = steps is None or step + 1 + self._truncated_at < steps
        return enough and step % (self.method.cycle + 1) == self.method.cycle

    def _write(self, pair: Pair, U: Tensor, S: Tensor, V: Tensor, basis: bool) -> None:
        """The pair's factors for the next step."""
        lora_A, lora_B = pair.stored("lora_A"), pair.stored("lora_B")
        r, rank = len(S), 2 * len(S) if basis else len(S)
        lora_A[:r] = V.T.clone()
        lora_A[r:] = 0
        lora_B[:, :r] = U @ S
        lora_B[:, r:] = 0
        if basis:
            lora_B[:, r:rank] = U
        for which in FACTORS:
            pair.parametrisation(which).rank = rank
        pair.note_rank()


def orthonormal(count: int, r: int, generator: torch.Generator) -> Tensor:
    """A random basis [count, r] in float64."""
    return torch.linalg.qr(torch.randn(count, r, generator=generator, dtype=torch.float64)).Q


def _restart(state: dict[str, Any], S: Tensor) -> None:
    """Adam's moments of S are of no use in other bases."""
    state.update(S=S, first=torch.zeros_like(S), second=torch.zeros_like(S), moved=0)


def _adam(state: dict[str, Any], gradient: Tensor, group: dict[str, Any]) -> None:
    """One step of Adam on S, in place."""
    one, two = group["betas"]
    state["moved"] += 1
    state["first"].lerp_(gradient, 1 - one)
    state["second"].mul_(two).addcmul_(gradient, gradient, value=1 - two)
    mean = state["first"] / (1 - one ** state["moved"])
    size = (state["second"] / (1 - two ** state["moved"])).sqrt()
    state["S"] -= group["lr"] * mean / (size + group["eps"])


def augmented(U: Tensor, S: Tensor, V: Tensor, dK: Tensor, dL: Tensor, h: float) -> tuple[Tensor, Tensor, Tensor]:
    """The basis step: U, S, V of twice the rank, from G V = dK [N, r] and G^T U = dL [K, r]."""
    r = len(S)
    U_new = torch.linalg.qr(torch.cat([U, dK], 1)).Q[:, r:]
    V_new = torch.linalg.qr(torch.cat([V, dL], 1)).Q[:, r:]
    K, L = U @ S - h * dK, V @ S.T - h * dL
    grown = S.new_zeros(2 * r, 2 * r)
    grown[:r, :r] = S - h * (U.T @ dK)
    grown[r:, :r] = U_new.T @ K
    grown[:r, r:] = L.T @ V_new
    return torch.cat([U, U_new], 1), grown, torch.cat([V, V_new], 1)


def truncated(
    U: Tensor, S: Tensor, V: Tensor, tolerance: float, smallest: int, largest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The smallest rank whose dropped singular values have a norm below ``tolerance`` of that of all."""
    P, sigma, Qh = torch.linalg.svd(S)
    tails = sigma.flip(0).square().cumsum(0).flip(0).sqrt()  # of what is dropped with j kept
    needed = int((tails >= tolerance * sigma.norm()).sum()) if bool(sigma.any()) else 0
    r = min(max(smallest, needed), largest, len(S))
    return U @ P[:, :r], torch.diag(sigma[:r]), V @ Qh[:r].T
