# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels with experts, run on the simulator, against float64 expert by expert; and the bytes they move."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from formats import compress, pack_bitmap, sparse_weight
from numerics import DTYPES, assert_gradient_close, download, empty, pack, random, upload
from test_adapter_grad_lors import GRADIENTS, PROJECTIONS
from test_fused_linear import FAST_THREADS, SUM
from tolerance import assert_close, truncations

SCALING = 0.75
BF16, FP32 = "bfloat16", "float32"
# The numbers of rows of each expert, and of rows that have none.
ROUTINGS = {
    "all to one": ([0, 0, 37, 0], 0),
    "0, 1 and 17": ([17, 0, 1, 5, 17], 3),
    "equal ends": ([0, 4, 0, 0, 2, 0], 0),
    "nobody": ([0, 0, 0], 9),
    "more experts than lanes": ([i % 3 == 1 for i in range(40)], 2),
    "one expert": ([20], 1),
}


@dataclass(frozen=True)
class Routed:
    """A call. dtypes: of the activations, the weight, lora_A and lora_B; tokens: rows in memory, gathered from."""

    counts: tuple[int, ...]
    beyond: int
    N: int = 72
    K: int = 136
    r: int = 16
    dtypes: tuple[str, str, str, str] = (BF16, BF16, BF16, FP32)
    explicit: bool = False
    layout: str = "dense"
    bias: bool = True
    tokens: int | None = None
    seed: int = 0

    @property
    def E(self) -> int:
        return len(self.counts)

    @property
    def S(self) -> int:
        return sum(self.counts) + self.beyond

    def spans(self) -> list[slice]:
        ends = torch.tensor(self.counts).cumsum(0).tolist()
        return [slice(end - count, end) for end, count in zip(ends, self.counts, strict=True)]


def routed(name: str, **fields: Any) -> Routed:
    counts, beyond = ROUTINGS[name]
    return Routed(tuple(int(count) for count in counts), beyond, **fields)


def inputs(p: Routed) -> dict[str, Tensor]:
    x, weight, lora_A, lora_B = p.dtypes
    given = {
        "input": random(p.seed, p.tokens or p.S, p.K, dtype=x),
        "grad_output": random(p.seed + 1, p.S, p.N, dtype=x),
        "lora_A": random(p.seed + 2, p.E, p.r, p.K, dtype=lora_A),
        "lora_B": random(p.seed + 3, p.E, p.N, p.r, dtype=lora_B),
        "bias": random(p.seed + 4, p.E, p.N),
        "rows": torch.randint(p.tokens or 1, (p.S,), generator=torch.Generator().manual_seed(p.seed)).int(),
        "offsets": torch.tensor(p.counts).cumsum(0).int(),
    }
    values, kept = sparse_weight(
        p.seed + 5, p.E * p.N, p.K, weight, explicit=p.explicit or p.layout != "dense", sparse24=p.layout == "2:4"
    )
    return given | {"weight": values, "kept": kept}


def read(given: dict[str, Tensor], p: Routed) -> Tensor:
    """X [S, K]."""
    return given["input"][given["rows"].long()] if p.tokens else given["input"]


def poison_idle(given: dict[str, Tensor], p: Routed) -> dict[str, Tensor]:
    """Everything that belongs to experts without rows, and rows without an expert, become NaN."""
    given = {name: tensor.clone() for name, tensor in given.items()}
    idle = torch.tensor(p.counts) == 0
    for name in ("lora_A", "lora_B", "bias"):
        given[name][idle] = torch.nan
    given["weight"].view(p.E, p.N, p.K)[idle] = torch.nan
    given["kept"].view(p.E, p.N, p.K)[idle] &= p.layout == "2:4"
    if p.layout == "dense":
        given["kept"].view(p.E, p.N, p.K)[idle] = True
    if not p.tokens:
        given["input"][sum(p.counts) :] = torch.nan
    given["grad_output"][sum(p.counts) :] = torch.nan
    return given


def fields(device: Any, p: Routed, given: dict[str, Tensor]) -> dict[str, Any]:
    names = {dtype: name for name, dtype in DTYPES.items()}
    held: dict[str, Any] = {"experts": p.E, "offsets": upload(device, "offsets", given["offsets"])}
    for name in ("lora_A", "lora_B"):
        held |= {name: upload(device, name, given[name]), f"{name}_dtype": names[given[name].dtype]}
    return held | {"out_features": p.N, "in_features": p.K, "r": p.r, "scaling": SCALING, "tokens": p.S}


def multiply(
    sim: Any, device: Any, p: Routed, gradient: bool, given: dict[str, Tensor] | None = None, parts: int = 1
) -> Tensor:
    """`parts`: calls, each with its share of the experts."""
    given = given or inputs(p)
    x, weight = p.dtypes[:2]
    held = fields(device, p, given)
    values = given["weight"]
    if p.layout == "bitmap":
        values, bits, starts = pack_bitmap(given["weight"], given["kept"])
        held |= {"mask": device.upload("mask", bits), "row_offsets": device.upload("row_offsets", starts)}
    elif p.layout == "2:4":
        values, metadata = compress(given["weight"], given["kept"])
        held["metadata"] = device.upload("metadata", metadata)
    elif p.explicit:
        held["mask"] = device.upload("mask", pack(given["kept"]))
    activation = given["grad_output" if gradient else "input"]
    if p.tokens and not gradient:
        held["rows"] = upload(device, "rows", given["rows"])
    if p.bias and not gradient:
        held |= {"bias": upload(device, "bias", given["bias"]), "bias_dtype": FP32}
    output = empty(device, "output", (p.S, p.K if gradient else p.N), x)
    held |= {
        "input_gradient": gradient,
        "activation": upload(device, "activation", activation),
        "weight": upload(device, "weight", values),
        "weight_dtype": weight,
        "output": output,
        **dict.fromkeys(("activation_dtype", "round_to", "output_dtype"), x),
    }
    bounds = [p.E * part // parts for part in range(parts + 1)]
    for first, last in itertools.pairwise(bounds):
        sizes = {"offsets": 4} | {
            name: given[name].numel() // max(p.E, 1) * given[name].element_size()
            for name in ("lora_A", "lora_B", "bias")
        }
        sizes["weight"] = p.N * p.K * values.element_size()
        moved = {name: held[name] + first * size for name, size in sizes.items() if name in held}
        share = {"experts": last - first, "first": first == 0, "last": last == p.E}
        sim.fused_linear(device, **(held | moved | share))
    return download(device, output, (p.S, p.K if gradient else p.N), x)


def check(output: Tensor, p: Routed, gradient: bool) -> None:
    given = inputs(p)
    x = (given["grad_output"] if gradient else read(given, p)).double()
    weight, kept = given["weight"].double().view(p.E, p.N, p.K), given["kept"].view(p.E, p.N, p.K)
    A, B, bias = given["lora_A"].double(), given["lora_B"].double(), given["bias"].double()
    merged = torch.where(kept, weight + SCALING * (B @ A), 0.0)
    terms = torch.where(kept, weight.square() + SCALING**2 * B.square() @ A.square(), 0.0)
    expected, rms, mid_rms = (torch.zeros(output.shape, dtype=torch.float64) for _ in range(3))
    for e, span in enumerate(p.spans()):
        along = (lambda matrix: matrix) if gradient else (lambda matrix: matrix.T)
        add = bias[e] if p.bias and not gradient else torch.zeros(())
        expected[span] = x[span] @ along(merged[e]) + add
        rms[span] = (x[span].square() @ along(terms[e]) + add.square()).sqrt()
        mid_rms[span] = (x[span].square() @ along(merged[e].square())).sqrt()
    depth = p.N if gradient else p.K
    active = slice(0, sum(p.counts))
    assert_close(
        output[active],
        expected[active],
        rms=rms[active],
        length=depth + p.r + 1,
        dtype=output.dtype,
        mid_dtype=output.dtype,
        mid_rms=mid_rms[active],
        truncated=truncations(depth + p.r, *(DTYPES[p.dtypes[i]] for i in (0, 2, 3))),
        what=f"{'dX' if gradient else 'Y'} of {p}",
    )
    beyond = output[sum(p.counts) :]
    assert torch.equal(beyond, torch.zeros_like(beyond))


def adapter_grads(sim: Any, device: Any, p: Routed, given: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    given = given or inputs(p)
    held = fields(device, p, given)
    if p.tokens:
        held["rows"] = upload(device, "rows", given["rows"])
    shapes = {"lora_A": (p.E, p.r, p.K), "lora_B": (p.E, p.N, p.r)}
    results = {name: empty(device, f"{name}_grad", shape, held[f"{name}_dtype"]) for name, shape in shapes.items()}
    sim.adapter_grad_lors(
        device,
        **held,
        **{name: upload(device, name, given[name]) for name in ("grad_output", "input")},
        **{f"{name}_dtype": p.dtypes[0] for name in ("grad_output", "input")},
        **{f"{name}_grad": result for name, result in results.items()},
    )
    grad_A, grad_B = (download(device, results[name], shape, held[f"{name}_dtype"]) for name, shape in shapes.items())
    return grad_A, grad_B


def check_grads(results: tuple[Tensor, Tensor], p: Routed) -> None:
    given = inputs(p)
    dY, X = given["grad_output"].double(), read(given, p).double()
    for e, span in enumerate(p.spans()):
        y, x, A, B = dY[span], X[span], given["lora_A"][e].double(), given["lora_B"][e].double()
        got_A, got_B = results[0][e], results[1][e]
        if not p.counts[e]:
            assert not got_A.any()
            assert not got_B.any()
            continue
        rms = SCALING * ((y.square() @ B.square()).T @ x.square()).sqrt()
        expected = SCALING * (y @ B).T @ x
        assert_gradient_close(got_A, expected, rms, len(y) + p.N, got_A.dtype, f"lora_A_grad of expert {e} of {p}")
        rms = SCALING * (y.square().T @ (x.square() @ A.square().T)).sqrt()
        expected = SCALING * y.T @ (x @ A.T)
        assert_gradient_close(got_B, expected, rms, len(y) + p.K, got_B.dtype, f"lora_B_grad of expert {e} of {p}")


def launched(device: Any, threads: int) -> bool:
    return any(launch["block"][0] == threads for launch in device.launches())


BOTH = pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
ROUTING = pytest.mark.parametrize("routing", ROUTINGS)


@BOTH
@ROUTING
def test_routings(sim: Any, routing: str, gradient: bool) -> None:
    """Idle experts are NaN, and so are rows without an expert; gathered rows in the forward pass."""
    for seed, dtypes in enumerate([(BF16, BF16, BF16, FP32), (FP32, BF16, FP32, BF16), ("float16",) * 4]):
        p = routed(routing, dtypes=dtypes, explicit=seed % 2 == 1, tokens=(None, 7)[seed % 2], seed=seed)
        device = sim.Device(seed=seed, cp=("early", "late", "random")[seed], multiprocessors=(1, 4, 60)[seed])
        check(multiply(sim, device, p, gradient, poison_idle(inputs(p), p)), p, gradient)


@BOTH
@pytest.mark.parametrize("counts", [(70, 0, 130, 1), (300, 20), (90,)])
def test_wide_tiles(sim: Any, counts: tuple[int, ...], gradient: bool) -> None:
    p = Routed(counts, 70, N=40, K=72, explicit=True)
    check(multiply(sim, sim.Device(multiprocessors=1), p, gradient, poison_idle(inputs(p), p)), p, gradient)


@BOTH
def test_ranks_in_chunks_and_a_split_reduction(sim: Any, gradient: bool) -> None:
    p = routed("0, 1 and 17", N=20 if not gradient else 1031, K=1031 if not gradient else 20, r=40)
    device = sim.Device(multiprocessors=1000)
    check(multiply(sim, device, p, gradient, poison_idle(inputs(p), p)), p, gradient)
    assert SUM in device.stats()
    p = routed("0, 1 and 17", N=40, r=300, dtypes=(BF16, BF16, FP32, FP32))
    device = sim.Device(shared_bytes=99 * 1024)
    check(multiply(sim, device, p, gradient, poison_idle(inputs(p), p)), p, gradient)


@ROUTING
@pytest.mark.parametrize("architecture", [80, 90])
def test_gradients(sim: Any, architecture: int, routing: str) -> None:
    for seed, dtypes in enumerate([(BF16,) * 4, (FP32, BF16, FP32, BF16), ("float16", BF16, BF16, FP32)]):
        if architecture == 90 and seed:  # clusters are of bfloat16
            continue
        r = (16, 130 if routing == "equal ends" else 33, 5)[seed]
        p = routed(routing, N=40, K=72, dtypes=dtypes, r=r, tokens=(7, None, 7)[seed], seed=seed)
        device = sim.Device(seed=seed, architecture=architecture, multiprocessors=(1, 4, 60)[seed])
        check_grads(adapter_grads(sim, device, p, poison_idle(inputs(p), p)), p)


def test_gradients_of_many_tokens(sim: Any) -> None:
    p = Routed((200, 0, 129), 5, N=136, K=72, r=64, dtypes=(BF16,) * 4)
    for architecture in (80, 90):
        check_grads(adapter_grads(sim, sim.Device(architecture=architecture), p, poison_idle(inputs(p), p)), p)


def test_no_rows(sim: Any) -> None:
    p = Routed((0, 0), 0)
    device = sim.Device()
    sim.fused_linear(device, **fields(device, p, inputs(p)), activation=None)
    assert not device.launches()
    check_grads(adapter_grads(sim, device, p), p)


@BOTH
@pytest.mark.parametrize("multiprocessors", [1, 1000])
def test_in_parts(sim: Any, multiprocessors: int, gradient: bool) -> None:
    """Calls for some of the experts each, by every way of writing the result: they leave each other's rows alone."""
    for fields_of in ({"dtypes": (BF16, BF16, BF16, BF16)}, {"N": 520, "K": 520, "dtypes": (FP32,) * 4}):
        p = routed("0, 1 and 17", bias=True, **fields_of)
        device = sim.Device(multiprocessors=multiprocessors)
        check(multiply(sim, device, p, gradient, poison_idle(inputs(p), p), parts=2), p, gradient)
    assert (SUM in device.stats()) == (multiprocessors == 1000)


@BOTH
@pytest.mark.parametrize("layout", ["dense", "2:4", "bitmap"])
def test_no_adapter_and_compressed_layouts(sim: Any, layout: str, gradient: bool) -> None:
    """The fast path, with more rows of an expert than it takes at a time."""
    p = routed("0, 1 and 17", N=70 if layout == "2:4" else 300, K=136, layout=layout, dtypes=(BF16,) * 4, tokens=5)
    for seed, multiprocessors in enumerate((1, 40)):
        device = sim.Device(seed=seed, multiprocessors=multiprocessors, race=seed == 1, preempt=0.02 * seed)
        check(multiply(sim, device, p, gradient, poison_idle(inputs(p), p)), p, gradient)
        assert launched(device, FAST_THREADS)
    if layout == "dense":
        bare = replace(p, r=0, N=40, K=72)
        check(multiply(sim, sim.Device(), bare, gradient, poison_idle(inputs(bare), bare)), bare, gradient)


@BOTH
@pytest.mark.parametrize(
    ("layout", "counts"), [("dense", (0, 16, 0, 3)), ("2:4", (0, 16, 0, 3)), ("dense", (0, 150, 0, 250))]
)
def test_traffic_is_that_of_experts_with_rows(sim: Any, layout: str, counts: tuple[int, ...], gradient: bool) -> None:
    size = 256
    p = Routed(counts, 0, N=size, K=size, layout=layout, dtypes=(BF16,) * 4, bias=False)
    device = sim.Device(multiprocessors=2)
    check(multiply(sim, device, p, gradient, poison_idle(inputs(p), p)), p, gradient)
    values = size * size * (1 if layout == "2:4" else 2)
    kernel = device.stats()["fused_linear"]["buffers"]
    active = sum(count > 0 for count in counts)
    assert kernel["weight"]["unique_sectors_read"] == active * values // 32
    assert kernel["weight"]["sectors_read"] <= 1.02 * active * values // 32
    if layout == "2:4":
        assert kernel["metadata"]["unique_sectors_read"] == active * size * size // 8 // 32
    adapters = sum(kernel[name]["unique_sectors_read"] for name in ("lora_A", "lora_B"))
    assert adapters == active * 2 * 2 * 16 * size // 32


def test_traffic_of_the_gradients(sim: Any) -> None:
    """dY and X are read once by each launch, the factors of experts with rows alone."""
    size = 256
    p = Routed((0, 250, 4, 0, 100), 60, N=size, K=size, dtypes=(BF16,) * 4)
    device = sim.Device(multiprocessors=2)
    check_grads(adapter_grads(sim, device, p, poison_idle(inputs(p), p)), p)
    rows = sum(p.counts)
    for kernel in (PROJECTIONS, GRADIENTS):
        buffers = device.stats()[kernel]["buffers"]
        for name in ("grad_output", "input"):
            assert buffers[name]["unique_sectors_read"] == rows * 2 * size // 32
            assert buffers[name]["sectors_read"] <= 1.02 * rows * 2 * size // 32
    buffers = device.stats()[PROJECTIONS]["buffers"]
    for name in ("lora_A", "lora_B"):
        assert buffers[name]["unique_sectors_read"] == 3 * 2 * 16 * size // 32
    buffers = device.stats()[GRADIENTS]["buffers"]
    for name in ("lora_A_grad", "lora_B_grad"):
        assert buffers[name]["sectors_written"] == p.E * 2 * 16 * size // 32


def test_no_races(sim: Any) -> None:
    for seed, (name, gather) in enumerate([("0, 1 and 17", 9), ("more experts than lanes", None)]):
        p = routed(name, N=40, K=72, tokens=gather, seed=seed)
        options = {"race": True, "preempt": 0.02, "architecture": 80 + 10 * seed, "seed": seed}
        for gradient in (False, True):
            check(multiply(sim, sim.Device(**options), p, gradient), p, gradient)
        check_grads(adapter_grads(sim, sim.Device(**options), p), p)


def test_refusals_are_sentences(sim: Any) -> None:
    p = routed("one expert")
    for function in (lambda p: multiply(sim, sim.Device(), p, False), lambda p: adapter_grads(sim, sim.Device(), p)):
        with pytest.raises(
            sim.StatusError, match=r"takes up to \d+ rows of one weight, or of several experts with their offsets"
        ):
            function(replace(p, counts=()))
