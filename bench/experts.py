#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""The experts of one mixture-of-experts layer, 2:4, with adapters: forward + backward against PEFT and masks under
autograd; and the forward of one token against transformers' own dense experts.

python bench/experts.py --output experts.json      Qwen3-MoE's at a quarter: 32 of 512 x 192, 4 a token; 1/64/512 tokens
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import lors_cuda
import report
from lors_cuda import LoRSConfig, get_lors_model, reference
from protocol import AGAIN, CPU, Protocol, measure, peak_bytes, poisoned_memory, relative_error, saved_bytes, summary

STEP_BASELINE, FORWARD_BASELINE = "peft", "dense_grouped_mm"
SPEED_GOAL = 1.5  # of the faster of PEFT and masks under autograd
MEMORY_GOAL = 0.5  # of PEFT's peak
STACKS = ("gate_up_proj", "down_proj")
STEPS = {
    "peft": "PEFT's LoRA on both stacks (target_parameters), which loses the zeros; transformers' grouped_mm experts",
    "sqft": "W + M o (s B A) of both stacks under autograd; transformers' grouped_mm experts",
    "lors_cuda": "get_lors_model, dense stacks",
    "lors_cuda_24": "get_lors_model, 2:4 stacks",
    "lors_cuda_bitmap": "get_lors_model, bitmap stacks",
}
FORWARDS = {
    "dense_grouped_mm": "transformers' experts without adapters, its grouped_mm",
    "dense_batched_mm": "the same, its batched_mm",
    "dense_eager": "the same, its loop over experts",
    "lors_cuda_cached": "live adapters inside lors_cuda.merge_cache, dense stacks",
    "lors_cuda_24_cached": "the same, 2:4 stacks",
    "lors_cuda_bitmap_cached": "the same, bitmap stacks",
}
LAYOUTS = {"24": "2:4", "bitmap": "bitmap"}


@dataclass(frozen=True)
class Sizes:
    experts: int
    chosen: int  # for each token
    hidden: int
    intermediate: int
    rank: int

    def stacks(self) -> dict[str, tuple[int, int]]:
        """(N, K) of an expert."""
        return {"gate_up_proj": (2 * self.intermediate, self.hidden), "down_proj": (self.hidden, self.intermediate)}

    def config(self, implementation: str) -> Qwen3MoeConfig:
        config = Qwen3MoeConfig(
            hidden_size=self.hidden,
            moe_intermediate_size=self.intermediate,
            num_experts=self.experts,
            num_experts_per_tok=self.chosen,
        )
        config._experts_implementation = implementation
        return config


@dataclass(frozen=True)
class Problem:
    """What all peers are given, once."""

    sizes: Sizes
    weights: dict[str, Tensor]  # [E, N, K], 2:4
    adapters: dict[str, tuple[Tensor, Tensor]]  # [E, r, K] and [E, N, r], in float32
    hidden_states: Tensor  # [T, H], requires grad
    index: Tensor  # [T, k]
    routing: Tensor  # [T, k], requires grad
    grad_output: Tensor  # [T, H]

    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden_states, self.index, self.routing


def make_problem(sizes: Sizes, tokens: int, dtype: torch.dtype, seed: int) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=generator)

    weights, adapters = {}, {}
    for name, (N, K) in sizes.stacks().items():
        weight = normal(sizes.experts, N, K, scale=K**-0.5)
        kept = weight.abs().view(*weight.shape[:2], -1, 4).topk(2).indices
        mask = torch.zeros(*weight.shape[:2], K // 4, 4, dtype=torch.bool).scatter_(-1, kept, True).view_as(weight)
        weights[name] = (weight * mask).to(dtype)
        scales = (K**-0.5, 0.3 * sizes.rank**-0.5)
        shapes = ((sizes.experts, sizes.rank, K), (sizes.experts, N, sizes.rank))
        # Numbers that 16 bits hold, so that peers with adapters of either width have the same ones.
        A, B = (normal(*shape, scale=scale).to(dtype).float() for shape, scale in zip(shapes, scales, strict=True))
        adapters[name] = (A, B)
    routing, index = normal(tokens, sizes.experts).softmax(-1).topk(sizes.chosen)
    return Problem(
        sizes,
        weights,
        adapters,
        normal(tokens, sizes.hidden).to(dtype).requires_grad_(),
        index,
        (routing / routing.sum(-1, keepdim=True)).to(dtype).requires_grad_(),
        normal(tokens, sizes.hidden).to(dtype),
    )


# --- the peers --------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """The experts where a model has them: `experts` of a module."""

    def __init__(self, problem: Problem, implementation: str) -> None:
        super().__init__()
        self.experts = Qwen3MoeExperts(problem.sizes.config(implementation))
        for name, weight in problem.weights.items():
            setattr(self.experts, name, nn.Parameter(weight.clone(), requires_grad=False))

    def forward(self, *arguments: Tensor) -> Tensor:
        output: Tensor = self.experts(*arguments)
        return output


class Masked(nn.Module):
    """W + M o (B A) with s = 1."""

    def __init__(self, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", weight != 0)
        self.lora_A, self.lora_B = nn.Parameter(lora_A.to(weight.dtype)), nn.Parameter(lora_B.to(weight.dtype))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.mask * torch.bmm(self.lora_B, self.lora_A)


@dataclass(frozen=True)
class Peer:
    model: nn.Module
    factors: list[Tensor]  # lora_A and lora_B of gate_up_proj, then of down_proj; none where nothing is trained
    stacked: Callable[[int, Tensor], Tensor]  # gradient number i as [E, r, K] or [E, N, r]

    def step(self, problem: Problem) -> list[Tensor]:
        """Output, and the gradients of the hidden states, the routing weights and the factors."""
        output = self.model(*problem.arguments())
        wanted = (problem.hidden_states, problem.routing, *self.factors)
        gradients = torch.autograd.grad(output, wanted, problem.grad_output)
        return [output.detach(), *gradients]


def _as_they_are(number: int, gradient: Tensor) -> Tensor:
    return gradient


def make_peer(name: str, problem: Problem) -> Peer:
    sizes, adapters = problem.sizes, problem.adapters
    if name.startswith("dense_"):
        return Peer(Layer(problem, name.removeprefix("dense_")), [], _as_they_are)
    model: Any = Layer(problem, "grouped_mm")
    if name == "sqft":
        masked = {stack: Masked(problem.weights[stack], *adapters[stack]) for stack in STACKS}
        for stack, parametrization in masked.items():
            nn.utils.parametrize.register_parametrization(model.experts, stack, parametrization, unsafe=True)
        return Peer(model, [f for m in masked.values() for f in (m.lora_A, m.lora_B)], _as_they_are)
    if name == "peft":
        from peft import LoraConfig, get_peft_model

        targets = [f"experts.{stack}" for stack in STACKS]
        config = LoraConfig(r=sizes.rank, lora_alpha=sizes.rank, target_modules=[], target_parameters=targets)
        model = get_peft_model(model, config)
        outer = model.base_model.model.experts
        factors = []
        for stack, wrapper in zip(STACKS, (outer.base_layer, outer), strict=True):
            A, B = (getattr(wrapper, which)["default"].weight for which in ("lora_A", "lora_B"))
            with torch.no_grad():
                A.copy_(adapters[stack][0].flatten(0, 1))
                B.copy_(adapters[stack][1].permute(1, 2, 0).flatten(1))
            factors += [A, B]

        def stacked(number: int, gradient: Tensor) -> Tensor:
            if number % 2 == 0:
                return gradient.unflatten(0, (sizes.experts, sizes.rank))
            return gradient.unflatten(1, (sizes.rank, sizes.experts)).permute(2, 0, 1)

        return Peer(model, factors, stacked)
    layout = LAYOUTS.get(name.removesuffix("_cached").removeprefix("lors_cuda_"), "dense")
    model = get_lors_model(model, LoRSConfig(r=sizes.rank, lora_alpha=sizes.rank, layout=layout))
    factors = []
    for stack in STACKS:
        layer = model.experts.get_submodule(stack)
        with torch.no_grad():
            for factor, value in zip((layer.lora_A, layer.lora_B), adapters[stack], strict=True):
                factor.copy_(value)
                factors.append(factor)
    return Peer(model, factors, _as_they_are)


# --- what they must give ----------------------------------------------------------------------------------------------


def truth(name: str, problem: Problem) -> list[Tensor]:
    """What a peer's `step` must give, in float64: masked or not, gradients of the adapters exact or LoRS's."""
    masks = {stack: None if name != "peft" else torch.ones_like(w, dtype=bool) for stack, w in problem.weights.items()}
    gradient = "lors" if name.startswith("lors_cuda") else "exact"
    adapters = problem.adapters
    if name.startswith("dense_"):
        adapters = {stack: (A, torch.zeros_like(B)) for stack, (A, B) in adapters.items()}
    k, order = problem.sizes.chosen, problem.index.flatten().argsort(stable=True)
    counts = problem.index.flatten().bincount(minlength=problem.sizes.experts)
    offsets = counts.cumsum(0)

    def product(stack: str, states: Tensor) -> Tensor:
        merged = torch.stack(
            [
                reference.merge(*of_one, 1.0, None if masks[stack] is None else masks[stack][0])
                for of_one in zip(problem.weights[stack], *adapters[stack], strict=True)
            ]
        )
        parts = [own @ w.T for own, w in zip(states.split(counts.tolist()), merged, strict=True)]
        return torch.cat(parts)

    hidden, routing = (t.detach().double().requires_grad_() for t in (problem.hidden_states, problem.routing))
    states = hidden[order // k]
    up = product("gate_up_proj", states)
    gate, value = up.chunk(2, dim=-1)
    gated = nn.functional.silu(gate) * value
    down = product("down_proj", gated)
    weighted = down * routing.flatten()[order, None]
    output = torch.zeros_like(hidden).index_add(0, order // k, weighted)
    if name.startswith("dense_") or name.endswith("_cached"):
        return [output.detach()]
    grad_output = problem.grad_output.double()
    grads = torch.autograd.grad(output, (hidden, routing, up, down), grad_output)
    results = [output.detach(), *grads[:2]]
    for stack, inputs, grad in zip(STACKS, (states, gated), grads[2:], strict=True):
        arguments = (grad, inputs.detach(), offsets, problem.weights[stack], *adapters[stack], 1.0, masks[stack])
        results += reference.grouped_linear_backward(*arguments, gradient)[1:3]
    return results


def worst_error(peer: Peer, results: Sequence[Tensor], expected: Sequence[Tensor]) -> dict[str, float]:
    names = ("output", "grad_hidden", "grad_routing", "grad_A_up", "grad_B_up", "grad_A_down", "grad_B_down")
    shaped = [peer.stacked(i - 3, result) if i >= 3 else result for i, result in enumerate(results)]
    pairs = zip(names, shaped, expected, strict=False)
    return {name: relative_error(result, wanted) for name, result, wanted in pairs}


# --- a case -----------------------------------------------------------------------------------------------------------


def frozen_tensors(model: nn.Module) -> list[Tensor]:
    return [t for t in (*model.parameters(), *model.buffers()) if not t.requires_grad]


def memory(peer: Peer, problem: Problem) -> dict[str, int | None]:
    """Bytes of the frozen weights, of what is kept for backward, and the peaks of one step."""
    weights = frozen_tensors(peer.model)
    own = [*problem.arguments(), *weights, *peer.factors]
    output, sizes = saved_bytes(lambda: peer.model(*problem.arguments()), own)
    del output
    return {"weight": sum(t.nbytes for t in weights), **sizes, **peak_bytes(lambda: peer.step(problem))}


def bench_case(problem: Problem, what: str, common: dict[str, Any], protocol: Protocol) -> list[dict[str, Any]]:
    """The rows of one dtype and token count; `what`: "step" or "forward"."""
    notes, baseline = (STEPS, STEP_BASELINE) if what == "step" else (FORWARDS, FORWARD_BASELINE)
    rows: dict[str, dict[str, Any]] = {}
    cases: dict[str, Callable[[], object]] = {}
    label = f"{what} {common['dtype']} T={common['tokens']}"
    with torch.set_grad_enabled(what == "step"), contextlib.ExitStack() as caches:
        for name, note in notes.items():
            report.progress(f"{label} checking {name}")
            peer = make_peer(name, problem)
            if name.endswith("_cached"):
                caches.enter_context(lors_cuda.merge_cache(peer.model))

            def run(peer: Peer = peer) -> list[Tensor]:
                return peer.step(problem) if what == "step" else [peer.model(*problem.arguments())]

            with poisoned_memory():
                error = worst_error(peer, run(), truth(name, problem) if what == "step" else _output_of(name, problem))
            rows[name] = {**common, "peer": name, "note": note, "baseline": baseline, "failed": None, "error": error}
            if what == "step":
                rows[name]["bytes"] = memory(peer, problem)
            cases[name] = run
        timings = measure(cases, protocol, baseline=baseline, progress=lambda text: report.progress(f"{label} {text}"))
    report.progress("")
    rows[baseline + AGAIN] = {**rows[baseline], "peer": baseline + AGAIN, "note": "the baseline again: the noise"}
    for name, timing in timings.items():
        rows[name].update(timing.row())
    fastest = {"step": ("peft", "sqft"), "forward": tuple(n for n in FORWARDS if n.startswith("dense_"))}[what]
    for row in rows.values():  # in each round, the fastest of the others over this one
        others = zip(*(rows[name]["raw_seconds"] for name in fastest), row["raw_seconds"], strict=False)
        row["of_fastest"] = summary([min(times) / own for *times, own in others])
    return list(rows.values())


def _output_of(name: str, problem: Problem) -> list[Tensor]:
    with torch.enable_grad():
        return truth(name, problem)


def print_case(rows: Sequence[dict[str, Any]]) -> None:
    first = rows[0]
    what, is_step = first["benchmark"], first["benchmark"] == "experts"
    print(
        f"\n{what}: {'forward + backward' if is_step else 'forward'}, {first['dtype']}, {first['tokens']} tokens, "
        f"{first['experts']} experts, {first['chosen']} a token, {first['hidden']} x {first['intermediate']}, "
        f"r = {first['rank']}"
    )
    goal, lines = SPEED_GOAL if is_step else 1.0, []
    peak = next((row["bytes"]["peak"] for row in rows if row["peer"] == "peft" and "bytes" in row), None)
    for row in rows:
        is_ours = row["peer"].startswith("lors_cuda")
        line = [
            row["peer"],
            report.milliseconds(row["seconds"]),
            report.times(row["ratio"]),
            report.times(row["of_fastest"]),
            report.verdict(goal if is_ours else None, row["of_fastest"]),
            str(row["rounds"]),
            report.page_faults(row),
            f"{max(row['error'].values()):.1e}",
        ]
        if is_step:
            sizes = row["bytes"]
            of_peft = f"{sizes['peak'] / peak:.2f}"
            line += [report.megabytes(sizes[key]) for key in ("weight", "saved", "peak", "peak_resident")] + [of_peft]
        lines.append(line)
    header = ["peer", "ms [p20, p80]", f"x {first['baseline']}", "x fastest other", "goal", "rounds", "faults", "error"]
    print(
        report.table(
            header + (["weight MB", "saved MB", "peak MB", "resident MB", "of PEFT"] if is_step else []), lines
        )
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="bench/experts.py")
    report.add_run_arguments(parser)
    parser.add_argument("--dtype", nargs="+", choices=list(report.DTYPES))
    parser.add_argument("--tokens", nargs="+", type=report.positive)
    for name, default in (("experts", 32), ("chosen", 4), ("hidden", 512), ("intermediate", 192), ("rank", 16)):
        parser.add_argument(f"--{name}", type=report.positive, default=default)
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    sizes = Sizes(*(getattr(arguments, field.name) for field in dataclasses.fields(Sizes)))
    if arguments.quick:
        sizes = Sizes(experts=8, chosen=2, hidden=64, intermediate=32, rank=4)
    protocol = report.protocol_from(arguments)
    where = report.environment()
    print(report.describe(where))
    before = report.rows_before(arguments)
    rows: list[dict[str, Any]] = []
    for dtype in arguments.dtype or ["float32", "bfloat16"]:
        for tokens in arguments.tokens or ([1, 8] if arguments.quick else [1, 64, 512]):
            problem = make_problem(sizes, tokens, report.DTYPES[dtype], arguments.seed)
            common = {
                "device": CPU.type,
                "dtype": dtype,
                "tokens": tokens,
                **dataclasses.asdict(sizes),
                "pattern": "2:4",
            }
            kinds = {"step": "experts", "forward": "experts_forward"} if tokens == 1 else {"step": "experts"}
            for what, benchmark in kinds.items():
                case = bench_case(problem, what, {"benchmark": benchmark, **common}, protocol)
                print_case(case)
                rows += case
                if arguments.output:
                    report.write_json(arguments.output, rows, where, dataclasses.asdict(protocol), before)
    if arguments.output:
        print(f"\n{len(rows)} rows in {arguments.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
