# SPDX-License-Identifier: Apache-2.0
"""The CUDA fused_linear, run on the simulator, against float64; and the bytes it moves, against the floor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from formats import compress, pack_bitmap, sparse_weight
from numerics import DTYPES, download, empty, pack, random, upload
from tolerance import assert_close, truncations

SCALING = 0.75
BF16, FP32 = "bfloat16", "float32"
SUM = "the sum of partial results"  # of a reduction that is split
FAST_THREADS = 512  # the general kernel has at most 256


@dataclass(frozen=True)
class Problem:
    """One call. dtypes: of activation, weight, lora_A and lora_B; misalign: elements past an aligned address."""

    tokens: int
    out_features: int
    in_features: int
    r: int
    input_gradient: bool
    dtypes: tuple[str, str, str, str] = (BF16, BF16, BF16, BF16)
    explicit: bool = False
    bias: str | None = None
    seed: int = 0
    misalign: int = 0
    layout: str = "dense"

    def columns(self) -> int:
        return self.in_features if self.input_gradient else self.out_features

    def depth(self) -> int:
        return self.out_features if self.input_gradient else self.in_features


def inputs(p: Problem) -> dict[str, Tensor]:
    activation, weight, lora_A, lora_B = p.dtypes
    given = {
        "activation": random(p.seed, p.tokens, p.depth(), dtype=activation),
        "weight": random(p.seed + 1, p.out_features, p.in_features, dtype=weight, density=0.5),
        "lora_A": random(p.seed + 2, p.r, p.in_features, dtype=lora_A),
        "lora_B": random(p.seed + 3, p.out_features, p.r, dtype=lora_B),
    }
    explicit = random(p.seed + 4, p.out_features, p.in_features) > 0
    given["kept"] = explicit if p.explicit else given["weight"] != 0
    if p.layout != "dense":
        given["weight"], given["kept"] = sparse_weight(
            p.seed + 1, p.out_features, p.in_features, weight, explicit=p.explicit, sparse24=p.layout == "2:4"
        )
    if p.bias:
        given["bias"] = random(p.seed + 5, p.out_features, dtype=p.bias)
    return given


def run(sim: Any, device: Any, p: Problem, given: dict[str, Tensor] | None = None, **changes: Any) -> Tensor:
    given = given or inputs(p)
    names = ("activation", "weight", "lora_A", "lora_B")
    shift = {name: p.misalign * DTYPES[dtype].itemsize for name, dtype in zip(names, p.dtypes, strict=True)}
    stored: dict[str, Any] = {}
    held = {name: given[name] for name in names}
    if p.layout == "bitmap":
        held["weight"], bits, offsets = pack_bitmap(given["weight"], given["kept"])
        stored = {"mask": device.upload("mask", bits), "row_offsets": device.upload("row_offsets", offsets)}
    elif p.layout == "2:4":
        held["weight"], metadata = compress(given["weight"], given["kept"])
        stored = {"metadata": device.upload("metadata", metadata)}
    elif p.explicit:
        stored = {"mask": device.upload("mask", pack(given["kept"]))}
    args: dict[str, Any] = stored | {name: upload(device, name, held[name], shift[name]) for name in names}
    args |= {f"{name}_dtype": dtype for name, dtype in zip(names, p.dtypes, strict=True)}
    if p.bias:
        args |= {"bias": upload(device, "bias", given["bias"]), "bias_dtype": p.bias}
    shape = (p.tokens, p.columns())
    args["output"] = empty(device, "output", shape, p.dtypes[0], shift["activation"])
    args |= {
        "tokens": p.tokens,
        "out_features": p.out_features,
        "in_features": p.in_features,
        "r": p.r,
        "input_gradient": p.input_gradient,
        "scaling": SCALING,
        "round_to": p.dtypes[0],
        "output_dtype": p.dtypes[0],
    }
    sim.fused_linear(device, **(args | changes))
    return download(device, args["output"], shape, p.dtypes[0])


def check(output: Tensor, p: Problem) -> None:
    given = inputs(p)
    x, weight, lora_A, lora_B = (given[name].double() for name in ("activation", "weight", "lora_A", "lora_B"))
    merged = torch.where(given["kept"], weight + SCALING * (lora_B @ lora_A), 0.0)
    terms = (weight.square() + SCALING**2 * lora_B.square() @ lora_A.square()) * given["kept"]
    squares = merged.square()
    if not p.input_gradient:
        merged, terms, squares = merged.T, terms.T, squares.T
    bias = given["bias"].double() if p.bias and not p.input_gradient else torch.zeros(())
    assert_close(
        output,
        x @ merged + bias,
        rms=(x.square() @ terms + bias.square()).sqrt(),
        length=p.depth() + p.r + 1,
        dtype=output.dtype,
        mid_dtype=output.dtype,
        mid_rms=(x.square() @ squares).sqrt(),
        truncated=truncations(p.depth() + p.r, *(DTYPES[p.dtypes[i]] for i in (0, 2, 3))),
        what=f"{'dX' if p.input_gradient else 'Y'} of {p}",
    )


def run_and_check(sim: Any, device: Any, p: Problem) -> None:
    check(run(sim, device, p), p)


ADAPTERS = [(BF16, FP32), (FP32, "float16"), ("float16", BF16), (FP32, FP32)]
BOTH = pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])


@BOTH
@pytest.mark.parametrize("weight", DTYPES)
@pytest.mark.parametrize("activation", DTYPES)
def test_every_dtype(sim: Any, activation: str, weight: str, gradient: bool) -> None:
    for index, (lora_A, lora_B) in enumerate(ADAPTERS):
        device = sim.Device(seed=index, multiprocessors=1)
        dtypes = (activation, weight, lora_A, lora_B)
        bias = (FP32, BF16, "float16", None)[index % 4]
        p = Problem(3 + index, 72, 136, 9 + index, gradient, dtypes, index % 2 == 1, bias, 10 * index)
        run_and_check(sim, device, p)


@BOTH
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("tokens", [1, 16, 17, 64, 129, 260])
def test_tokens(sim: Any, tokens: int, dtype: str, gradient: bool) -> None:
    """Every token tile, with tiles half and wholly empty, and more tokens than the largest."""
    dtypes = (dtype, BF16, FP32, FP32)
    run_and_check(sim, sim.Device(seed=tokens), Problem(tokens, 33, 40, 16, gradient, dtypes, False, BF16, tokens))


@BOTH
@pytest.mark.parametrize("r", [1, 3, 16, 17, 64])
@pytest.mark.parametrize("shape", [(1, 1), (1, 130), (129, 17), (17, 257)])
def test_awkward_shapes(sim: Any, shape: tuple[int, int], r: int, gradient: bool) -> None:
    for seed, explicit in enumerate((False, True)):
        device = sim.Device(seed=seed, cp="early" if explicit else "late")
        dtypes = ((BF16, FP32)[seed], BF16, FP32, BF16)
        run_and_check(sim, device, Problem(5, *shape, r, gradient, dtypes, explicit, FP32, seed))


@BOTH
@pytest.mark.parametrize("tokens", [3, 20, 100])
@pytest.mark.parametrize(("r", "shared_kib", "dtype"), [(256, 227, BF16), (256, 160, FP32), (300, 99, FP32)])
def test_ranks_in_chunks(sim: Any, r: int, shared_kib: int, dtype: str, tokens: int, gradient: bool) -> None:
    """Between chunks the low-rank sums are in shared memory; the smaller device stages both adapters in every step."""
    device = sim.Device(seed=r, shared_bytes=shared_kib * 1024)
    run_and_check(sim, device, Problem(tokens, 40, 72, r, gradient, (BF16, FP32, dtype, dtype), True, None, r))
    assert device.launches()[0]["shared_bytes"] <= shared_kib * 1024


@BOTH
@pytest.mark.parametrize("misalign", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_pointers_take_the_slow_path(sim: Any, dtype: str, misalign: int, gradient: bool) -> None:
    p = Problem(18, 64, 72, 16, gradient, (dtype,) * 4, seed=misalign, misalign=misalign)
    run_and_check(sim, sim.Device(), p)


@BOTH
@pytest.mark.parametrize("tokens", [5, 40, 70])
def test_split_reductions(sim: Any, tokens: int, gradient: bool) -> None:
    """Many multiprocessors and few columns: the parts of the reduction are added by a second kernel."""
    shape = (1031, 20) if gradient else (20, 1031)
    device = sim.Device(multiprocessors=1000)
    run_and_check(sim, device, Problem(tokens, *shape, 8, gradient, bias=BF16))
    assert SUM in device.stats()


@BOTH
@pytest.mark.parametrize("tokens", [4, 65])
@pytest.mark.parametrize("seed", range(2))
def test_scheduling_changes_nothing(sim: Any, seed: int, tokens: int, gradient: bool) -> None:
    p = Problem(tokens, 200, 200, 16, gradient, (BF16, FP32, FP32, BF16), True)
    first = run(sim, sim.Device(seed=1, multiprocessors=16), p)
    again = run(sim, sim.Device(seed=seed + 2, preempt=0.05, cp=("early", "late")[seed], multiprocessors=16), p)
    assert torch.equal(first.view(torch.int16), again.view(torch.int16))


@BOTH
@pytest.mark.parametrize(
    ("tokens", "r", "shared_kib", "dtype"),
    [
        (5, 8, 227, BF16),
        (20, 20, 227, BF16),
        (66, 8, 227, BF16),
        (5, 8, 227, FP32),
        (5, 300, 99, BF16),
        (66, 200, 140, BF16),
    ],
)
def test_no_races(sim: Any, tokens: int, r: int, shared_kib: int, dtype: str, gradient: bool) -> None:
    for seed in range(2):
        device = sim.Device(seed=seed, race=True, preempt=0.02, shared_bytes=shared_kib * 1024)
        p = Problem(tokens, 72, 136, r, gradient, (dtype, FP32, BF16, FP32), seed % 2 == 1, None, seed)
        run_and_check(sim, device, p)


LAYOUTS = pytest.mark.parametrize(
    ("layout", "explicit"), [("dense", False), ("dense", True), ("2:4", False), ("bitmap", False), ("bitmap", True)]
)


def fast_launches(device: Any) -> list[dict[str, Any]]:
    return [launch for launch in device.launches() if launch["block"][0] == FAST_THREADS]


@BOTH
@LAYOUTS
@pytest.mark.parametrize(
    ("dtype", "lora_A", "lora_B", "r"),
    [
        (BF16, BF16, BF16, 16),
        (BF16, BF16, BF16, 5),
        (BF16, BF16, BF16, 33),
        ("float16", "float16", "float16", 16),
        ("float16", BF16, FP32, 64),
        (BF16, FP32, "float16", 17),
    ],
)
def test_the_fast_path(
    sim: Any, layout: str, explicit: bool, dtype: str, lora_A: str, lora_B: str, r: int, gradient: bool
) -> None:
    """Every layout and every number of split terms; shapes that end inside a warp's rows, columns and a sector."""
    shapes = [(1, 37, 72), (16, 70, 520), (9, 300, 264), (8, 1, 8), (13, 33, 1032)]
    for seed, (tokens, N, K) in enumerate(shapes):
        device = sim.Device(seed=seed, multiprocessors=(1, 4)[seed % 2], cp=("early", "late")[seed % 2])
        bias = (None, dtype, FP32)[seed % 3]
        p = Problem(tokens, N, K, r, gradient, (dtype, dtype, lora_A, lora_B), explicit, bias, seed, 0, layout)
        run_and_check(sim, device, p)
        assert fast_launches(device)


@BOTH
@LAYOUTS
def test_the_fast_path_has_no_races(sim: Any, layout: str, explicit: bool, gradient: bool) -> None:
    """One block that walks down several panels of rows, and many blocks."""
    for seed, (shape, r, multiprocessors) in enumerate([((530, 520), 16, 1), ((72, 136), 20, 9)]):
        device = sim.Device(seed=seed, race=True, preempt=0.02, multiprocessors=multiprocessors)
        p = Problem(11, *shape, r, gradient, (BF16,) * 4, explicit, BF16, seed, 0, layout)
        run_and_check(sim, device, p)
        assert fast_launches(device)


@BOTH
@pytest.mark.parametrize("layout", ["dense", "2:4", "bitmap"])
def test_what_lies_behind_the_weight_stays_out(sim: Any, layout: str, gradient: bool) -> None:
    """Infinities in the last rows, which a step of the block reads along with rows that are not there."""
    p = Problem(16, 50, 72, 16, gradient, layout=layout)
    given = inputs(p)
    kept = given["kept"][-1].nonzero().flatten()[0].item()
    weight = given["weight"].clone()
    weight[-1, kept] = torch.inf
    device = sim.Device(multiprocessors=1)
    output = run(sim, device, p, given=given | {"weight": weight})
    infinite = torch.zeros(p.tokens, p.columns(), dtype=torch.bool)
    infinite[:, kept if gradient else -1] = True
    assert fast_launches(device)
    assert torch.equal(output.isfinite(), ~infinite)
    assert not output.isnan().any()


@BOTH
def test_what_the_fast_path_does_not_take_falls_back(sim: Any, gradient: bool) -> None:
    good = Problem(16, 48, 72, 16, gradient)
    for change in (
        {"tokens": 17},
        {"in_features": 76},
        {"r": 65},
        {"misalign": 1},
        {"dtypes": (BF16, "float16", BF16, BF16)},
        {"dtypes": (FP32,) * 4},
        {},
    ):
        device = sim.Device(multiprocessors=1)
        run_and_check(sim, device, replace(good, **change))
        assert bool(fast_launches(device)) == (not change), change


@BOTH
@pytest.mark.parametrize(("layout", "limit"), [("dense", 1.06), ("mask", 1.06), ("2:4", 1.10), ("bitmap", 1.25)])
def test_traffic_of_the_fast_path(sim: Any, layout: str, limit: float, gradient: bool) -> None:
    """Operands and result against the floor; a bitmap's bits are read twice. Parts of the sum move once each way."""
    N = K = 1024
    device = sim.Device(multiprocessors=2)
    p = Problem(16, N, K, 16, gradient, explicit=layout == "mask", layout="dense" if layout == "mask" else layout)
    run(sim, device, p)
    assert len(device.launches()) == (3 if layout == "bitmap" else 2)
    moved: dict[str, int] = {}
    for kernel in device.stats().values():
        for name, of in kernel["buffers"].items():
            moved[name] = moved.get(name, 0) + 32 * (of["sectors_read"] + of["sectors_written"])
    parts = moved.pop("scratch 0")
    index = {"dense": 0, "mask": 1 / 8, "2:4": 1 / 8, "bitmap": 1 / 8}[layout]
    values = {"dense": 2, "mask": 2, "2:4": 1}.get(layout, 2 * inputs(p)["kept"].double().mean().item())
    floor = (values + index) * N * K + 2 * 16 * (2 * N + 2 * K)
    if layout != "bitmap":
        assert moved["weight"] == values * N * K
    assert sum(moved.values()) <= limit * floor, (sum(moved.values()) / floor, moved)
    assert parts in {2 * 4 * 16 * N * splits for splits in (1, 2, 4)}


def test_nothing_to_do_launches_nothing(sim: Any) -> None:
    device = sim.Device()
    for tokens, out_features in ((0, 8), (4, 0)):
        sim.fused_linear(device, tokens=tokens, out_features=out_features, in_features=8, r=1, activation=None)
    assert not device.launches()


@BOTH
def test_an_empty_reduction_is_the_bias(sim: Any, gradient: bool) -> None:
    device = sim.Device()
    output = empty(device, "output", (3, 8), FP32)
    bias = random(1, 8)
    adapter = upload(device, "adapter", random(2, 4, 8))  # the other one is empty
    sim.fused_linear(
        device,
        tokens=3,
        out_features=0 if gradient else 8,
        in_features=8 if gradient else 0,
        r=4,
        input_gradient=gradient,
        lora_A=adapter,
        lora_B=adapter,
        bias=upload(device, "bias", bias),
        output=output,
    )
    expected = torch.zeros(3, 8) if gradient else bias.expand(3, 8)
    assert torch.equal(download(device, output, (3, 8), FP32), expected)


def test_refusals_are_sentences(sim: Any) -> None:
    p = Problem(4, 8, 8, 2, False)
    with pytest.raises(sim.StatusError, match="given quantised codes; merge, then multiply"):
        sim.fused_linear(sim.Device(), tokens=1, out_features=8, in_features=8, r=1, grid="int4")
    with pytest.raises(sim.StatusError, match="takes float32, bfloat16 and float16, and was given float64"):
        run(sim, sim.Device(), p, weight_dtype="float64")
    with pytest.raises(sim.StatusError, match="activation's dtype, bfloat16, and was asked for float32 and bfloat16"):
        run(sim, sim.Device(), p, round_to="float32")
    with pytest.raises(sim.StatusError, match="asked for bfloat16 and float32"):
        run(sim, sim.Device(), p, output_dtype="float32")
    with pytest.raises(sim.StatusError, match=r"\[8, 8\].*1024 bytes of shared memory"):
        run(sim, sim.Device(shared_bytes=1024), p)


@pytest.mark.parametrize("fast", [False, True])
def test_beyond_31_bits_of_elements(sim: Any, fast: bool) -> None:
    """The last column of a forward matmul whose weight has more than 2^32 elements, mostly never touched."""
    N, K = 8_388_609, 512
    activation_dtype = BF16 if fast else FP32
    device = sim.Device(sample_blocks=1, multiprocessors=4)
    weight = device.empty("weight", 2 * N * K, sparse=True)
    row = random(5, 1, K, dtype=BF16, density=0.5)
    device.write(weight, 2 * (N - 1) * K, row.view(torch.int16).numpy())
    lora_B = device.empty("lora_B", 2 * N, sparse=True)
    last = random(6, 1, 1, dtype=BF16)
    device.write(lora_B, 2 * (N - 1), last.view(torch.int16).numpy())
    activation, lora_A = random(7, 1, K, dtype=activation_dtype), random(8, 1, K, dtype=BF16)
    size = DTYPES[activation_dtype].itemsize
    output = device.empty("output", size * N, sparse=True)
    sim.fused_linear(
        device,
        tokens=1,
        out_features=N,
        in_features=K,
        r=1,
        activation=upload(device, "activation", activation),
        weight=weight,
        lora_A=upload(device, "lora_A", lora_A),
        lora_B=lora_B,
        scaling=SCALING,
        output=output,
        **{f"{name}_dtype": BF16 for name in ("weight", "lora_A", "lora_B")},
        **dict.fromkeys(("activation_dtype", "round_to", "output_dtype"), activation_dtype),
    )
    assert (device.launches()[0]["block"][0] == FAST_THREADS) == fast
    merged = torch.where(row != 0, row.double() + SCALING * last.double() * lora_A.double(), 0.0)
    dtype = DTYPES[activation_dtype]
    value = torch.from_numpy(device.read(output, size * (N - 1), size).copy()).view(dtype).reshape(1, 1)
    rms = (activation.double() * merged).norm().reshape(1, 1)
    assert_close(
        value,
        activation.double() @ merged.T,
        rms=rms,
        length=K + 2,
        dtype=dtype,
        mid_dtype=dtype,
        truncated=truncations(K + 1, dtype, torch.bfloat16),
    )


@BOTH
@pytest.mark.parametrize(("tokens", "weight"), [(16, FP32), (64, BF16), (64, FP32), (256, BF16), (256, FP32)])
def test_the_weight_is_read_once_and_merged_in_registers(sim: Any, weight: str, tokens: int, gradient: bool) -> None:
    N = K = 512
    device = sim.Device(multiprocessors=2 if tokens < 256 else 4)
    p = Problem(tokens, N, K, 16, gradient, (BF16, weight, BF16, BF16))
    run(sim, device, p)
    stats = device.stats()
    once = N * K * DTYPES[weight].itemsize // 32
    read = stats["fused_linear"]["buffers"]["weight"]
    assert read["sectors_read"] == read["unique_sectors_read"] == once
    assert list(stats) == ["fused_linear"]  # no split: all that is written is the output, once
    written = {name: of["sectors_written"] for name, of in stats["fused_linear"]["buffers"].items()}
    assert written.pop("output") == tokens * p.columns() * 2 // 32
    assert not any(written.values())
    # Each block of columns reads the activation and the adapter along the depth; its own adapter once.
    blocks = p.columns() // (256 if tokens < 256 else 128)
    moved = sum(of["sectors_read"] + of["sectors_written"] for of in stats["fused_linear"]["buffers"].values())
    expected = once + (blocks * (tokens + 16) * p.depth() + (16 + tokens) * p.columns()) * 2 // 32
    assert moved <= 1.05 * expected, f"{moved} sectors: {moved / expected:.3f} of the tiles', {moved / once:.3f} of W"


@BOTH
def test_a_split_moves_its_parts_and_no_more(sim: Any, gradient: bool) -> None:
    device = sim.Device(multiprocessors=64)
    p = Problem(16, 512, 1024, 16, gradient) if not gradient else Problem(16, 1024, 512, 16, gradient)
    run(sim, device, p)
    first, second = (device.stats()[name]["buffers"] for name in ("fused_linear", SUM))
    parts = first["scratch 0"]["sectors_written"]
    assert parts % (16 * 512 * 4 // 32) == 0
    assert second["scratch 0"]["sectors_read"] == parts
    assert first["weight"]["sectors_read"] == 512 * 1024 * 2 // 32
    assert second["output"]["sectors_written"] == 16 * 512 * 2 // 32


@BOTH
@pytest.mark.parametrize("explicit", [False, True], ids=["", "mask"])
@pytest.mark.parametrize("tokens", [16, 64, 256])
@pytest.mark.parametrize("dtypes", [(BF16,) * 4, (BF16, FP32, FP32, FP32), (FP32,) * 4], ids=["bf16", "mixed", "fp32"])
def test_accesses_are_wide_and_meet_no_bank_twice(
    sim: Any, dtypes: tuple[str, str, str, str], tokens: int, explicit: bool, gradient: bool
) -> None:
    device = sim.Device(multiprocessors=1)
    run(sim, device, Problem(tokens, 256, 256, 16, gradient, dtypes, explicit, BF16))
    for name, counted in device.stats().items():
        widths = {w: counted["loads_by_width"][w] + counted["stores_by_width"][w] for w in (1, 2, 4, 8, 16)}
        fast = name == "fused_linear" and tokens == 16 and dtypes[1] == BF16
        if not explicit and not fast and name != SUM:
            assert widths[16] == sum(widths.values()), (name, widths)
        assert not any(counted[kind] for kind in counted if kind.endswith("_conflicts")), (name, counted)
