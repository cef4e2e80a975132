# SPDX-License-Identifier: Apache-2.0
"""The mathematics of the adapter methods in float64, from their definitions: the tests compare the methods with it.

Nothing here is fast, and nothing here is used in training. Shapes as in :mod:`lors_cuda.reference`: ``lora_A`` [r, K],
``lora_B`` [N, r]; an update dW [N, K] is what is added to the weight before the mask, scaling included where it is an
argument. SP-LoRA is ``reference.linear_backward(gradient="exact")``. Sources: the heads of the methods' files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def sora_update(lora_A: Tensor, lora_B: Tensor, gate: Tensor, scaling: float) -> Tensor:
    """s B diag(g) A for gates [r]."""
    return scaling * lora_B.double() @ torch.diag(gate.double()) @ lora_A.double()


def sora_prox(gate: Tensor, threshold: float) -> Tensor:
    """argmin over z of (z - g)^2 / 2 + threshold |z|, case by case."""
    gate = gate.double()
    shrunk = torch.where(gate > threshold, gate - threshold, gate + threshold)
    return torch.where(gate.abs() > threshold, shrunk, 0.0)


def rm_lora_penalty(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The mean over all factors of ||A A^T - I||_F and ||B^T B - I||_F; differentiable."""
    rows = [factor.double() for lora_A, lora_B in pairs for factor in (lora_A, lora_B.T)]
    eye = [torch.eye(len(factor), dtype=torch.float64) for factor in rows]
    return torch.stack([(f @ f.T - one).norm() for f, one in zip(rows, eye, strict=True)]).mean()


def lora_mini_update(A_train: Tensor, A_aux: Tensor, B_aux: Tensor, B_train: Tensor, scaling: float) -> Tensor:
    """s B_aux B_train A_train A_aux."""
    return scaling * B_aux.double() @ B_train.double() @ A_train.double() @ A_aux.double()


def mora_update(Q: Tensor, N: int, K: int, kind: str) -> Tensor:
    """dW of the authors' operator, column by column: compress x to q numbers, multiply by Q, spread over N outputs."""
    Q, q = Q.double(), len(Q)
    x = torch.eye(K, dtype=torch.float64)
    if kind == "rotation":
        x = torch.cat([x, x[:, : -K % q]], 1).view(K, -1, q)
        y = torch.stack([x[:, i] @ _rotation(i, q).T @ Q.T for i in range(x.shape[1])], 1).flatten(1)
        return y.repeat(1, -(-N // y.shape[1]))[:, :N].T
    if kind in ("sharing", "mixed-4"):
        x = torch.cat([x, x[:, : -K % q]], 1).view(K, -1, q).sum(1)
    else:
        longer, length = K % q, K // q
        head, rest = x[:, : longer * (length + 1)], x[:, longer * (length + 1) :]
        parts = [head.view(K, longer, length + 1).sum(-1)] if longer else []
        x = torch.cat([*parts, rest.reshape(K, q - longer, length).sum(-1)], 1)
    y = x @ Q.T
    if kind in ("sharing", "mixed-3"):
        return y.repeat(1, -(-N // q))[:, :N].T
    longer, length = N % q, N // q
    return torch.cat([y[:, :longer].repeat_interleave(length + 1, 1), y[:, longer:].repeat_interleave(length, 1)], 1).T


def _rotation(position: int, q: int) -> Tensor:
    """R(theta) [q, q]: turns the numbers j and j + q / 2 by position 10000^(-2 j / q)."""
    turn = torch.zeros(q, q, dtype=torch.float64)
    for j in range(q // 2):
        angle = position * 10000 ** (-2 * j / q)
        turn[j, j] = turn[j + q // 2, j + q // 2] = math.cos(angle)
        turn[j, j + q // 2], turn[j + q // 2, j] = -math.sin(angle), math.sin(angle)
    return turn


def gelora_ranks(dimensions: Sequence[float]) -> list[int]:
    """max(d_{i+1} - d_i, 0) + 1 of each block i."""
    return [round(max(dimensions[i + 1] - dimensions[i], 0.0) + 1) for i in range(len(dimensions) - 1)]


def two_nn(points: Tensor, discard: float = 0.1) -> float:
    """The intrinsic dimension of distinct points [count, width], point by point; ``discard`` more than 0."""
    ratios = []
    for i, point in enumerate(points.double()):
        distances = sorted((point - other).norm().item() for j, other in enumerate(points.double()) if i != j)
        ratios.append(distances[1] / distances[0])
    ratios.sort()
    kept = range(int(len(ratios) * (1 - discard)))
    x = [math.log(ratios[i]) for i in kept]
    y = [-math.log(1 - (i + 1) / len(ratios)) for i in kept]
    return sum(a * b for a, b in zip(x, y, strict=True)) / sum(a * a for a in x)


def xgblora_merged(weight: Tensor, mask: Tensor, boosters: Sequence[tuple[Tensor, Tensor]], scaling: float) -> Tensor:
    """W after every booster (a [1, K], b [N, 1]) was merged into it, one after the other, under the mask."""
    weight = weight.double()
    for a, b in boosters:
        weight = weight + torch.where(mask, scaling * b.double() @ a.double(), 0.0)
    return weight


def geolora_basis_step(
    U: Tensor, S: Tensor, V: Tensor, G: Tensor, h: float, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """U', S', V' from the whole gradient G = dL/dW~ [N, K]: K-, L- and S-step of the definition."""
    U, S, V, G = U.double(), S.double(), V.double(), scaling * G.double()
    K, L = U @ S - h * G @ V, V @ S.T - h * G.T @ U
    U_new = torch.linalg.qr(torch.cat([U, G @ V], 1)).Q[:, len(S) :]
    V_new = torch.linalg.qr(torch.cat([V, G.T @ U], 1)).Q[:, len(S) :]
    top = torch.cat([S - h * U.T @ G @ V, L.T @ V_new], 1)
    bottom = torch.cat([U_new.T @ K, torch.zeros(len(S), len(S), dtype=torch.float64)], 1)
    return torch.cat([U, U_new], 1), torch.cat([top, bottom]), torch.cat([V, V_new], 1)


def lora_rite_step(
    pairs: Sequence[tuple[Tensor, Tensor]],
    gradients: Sequence[tuple[Tensor, Tensor]],
    memory: Sequence[Sequence[dict[str, Tensor]]] | None,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    clip: float = 1.0,
    escape: bool = True,
    eps: float = 1e-6,
) -> tuple[list[tuple[Tensor, Tensor]], list[list[dict[str, Tensor]]]]:
    """The pairs after a step of LoRA-RITE, and what it remembers for the next one (``step`` from 0, None before it).

    Both factors are moved as tall matrices, lora_A^T beside B and lora_B beside lora_A^T. With the other factor U R, U
    orthonormal: g = G R^-1 for the factor's gradient G, P = U_new^T U_old, V = mean of g^T g and P V P^T, rho = what
    the change of basis has lost of V, M = mean of g (V + rho 1)^(-1/2) and M P^T, and the factor moves by -lr M R^-T.
    U is that of the SVD, so that R is no triangle; any other must give the same product.
    """
    bases = [[_basis(factor) for factor in (B.double(), A.double().T)] for A, B in pairs]
    tall = [(dA.double().T, dB.double()) for dA, dB in gradients]
    unmagnified = [
        [G @ inverse for G, (_, inverse) in zip(both, other, strict=True)]
        for both, other in zip(tall, bases, strict=True)
    ]
    norm = math.sqrt(sum(float(g.square().sum()) for both in unmagnified for g in both))
    share = min(1.0, clip / norm) if clip and norm else 1.0
    kept = [beta * (1 - beta**step) / (1 - beta ** (step + 1)) for beta in betas]
    found, remembered = [], []
    for number, (lora_A, lora_B) in enumerate(pairs):
        moved, notes = [], []
        for factor, g, (U, inverse), which in zip(
            (lora_A.double().T, lora_B.double()), unmagnified[number], bases[number], (0, 1), strict=True
        ):
            one = torch.eye(g.shape[1], dtype=torch.float64)
            old = memory[number][which] if memory else {"U": U, "V": 0 * one, "M": 0 * g, "rho": torch.zeros(())}
            P, g = U.T @ old["U"], share * g
            carried = P @ old["V"] @ P.T
            lost = (torch.linalg.eigvalsh(old["V"]) - torch.linalg.eigvalsh(carried)).max()
            rho = kept[1] * (old["rho"] + torch.minimum(lost, (old["V"] - carried).trace()).clamp_min(0) * escape)
            V = kept[1] * carried + (1 - kept[1]) * g.T @ g / len(g)
            sizes, directions = torch.linalg.eigh(V)
            root = directions @ torch.diag(1 / ((sizes.clamp_min(0) + rho + eps**2).sqrt() + eps)) @ directions.T
            M = kept[0] * old["M"] @ P.T + (1 - kept[0]) * g @ root
            moved.append(factor - lr * M @ inverse.T)
            notes.append({"U": U, "V": V, "M": M, "rho": rho})
        found.append((moved[0].T, moved[1]))
        remembered.append(notes)
    return found, remembered


def _basis(factor: Tensor) -> tuple[Tensor, Tensor]:
    """U [n, r] and R^-1 [r, r] of a factor U R [n, r]; for a factor that has less than full rank, R's pseudoinverse."""
    U, sizes, Vh = torch.linalg.svd(factor, full_matrices=False)
    return U, torch.linalg.pinv(torch.diag(sizes) @ Vh)


def sherl_mixed(states: Sequence[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """relu(sum_i w_i z_i + z_c) for z_1 .. z_c [h] of one token; ``weight`` [h] and ``bias`` are those of fc.

    w_i = relu(fc(z_i z_c)) / sum_j relu(cos(z_i, z_j)), divided by their sum over i.
    """
    *shallow, deepest = [state.double() for state in states]
    weights = []
    for z in shallow:
        alike = sum(max(0.0, float(torch.cosine_similarity(z, other, dim=0, eps=1e-12))) for other in shallow)
        weights.append(max(0.0, float((z * deepest) @ weight.double() + bias.double())) / alike)
    total = sum(weights)
    mixed = deepest.clone()
    for z, w in zip(shallow, weights, strict=True):
        mixed += w / total * z if total else 0.0
    return torch.relu(mixed)
