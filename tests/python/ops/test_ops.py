# SPDX-License-Identifier: Apache-2.0
"""The contract of each op: schema, fake and autograd halves agree; wrong arguments get a sentence, never a crash."""

from __future__ import annotations

import itertools
import subprocess
import sys
import textwrap

import pytest
import torch
from test_formats import FORMATS

from cases import Case, floats, lors, make_case
from lors_cuda import _library

N, K, R, T = 6, 33, 3, 5


def good(
    op: str, case: Case, gradient: str = "lors", needs: tuple[bool, ...] = (True, True, True)
) -> dict[str, object]:
    """Arguments by name that `op` accepts."""
    adapted = dict(zip(("weight", "mask", "index", "lora_A", "lora_B"), case.adapted, strict=True))
    s = {"scaling": case.scaling}
    wanted = dict(zip(("needs_input_grad", "needs_lora_A_grad", "needs_lora_B_grad"), needs, strict=True))
    g = {"gradient": gradient}
    match op:
        case "merge":
            return {**adapted, **s}
        case "merge_backward":
            return {"grad_merged": torch.full_like(case.weight, 0.5), **adapted, **s}
        case "merged_operand":
            return {**adapted, **s, "dtype": case.input.dtype, "tokens": case.input.shape[0]}
        case "linear":
            return {"input": case.input, **adapted, "bias": case.bias, **s, **g}
        case "linear_backward":
            activations = {"grad_output": case.grad_output, "input": case.input}
            return {**activations, **adapted, "bias": case.bias, **s, **g, **wanted}
    raise AssertionError(op)


ADAPTED = ("merge", "merged_operand", "merge_backward", "linear", "linear_backward")
GROUPED = ("grouped_linear", "grouped_linear_backward")  # tests/python/experts


def test_every_op_is_here():
    known = {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("lors::")}
    expected = {f"lors::{op}" for op in (*ADAPTED, *GROUPED, *FORMATS)} | {"lors::build_info", "lors::release_scratch"}
    if _library._CUDA_MISSING is None:  # the CUDA backend brings some of its own, with or without a GPU
        expected.add("lors::cuda_device_problem")
    assert known == expected


@pytest.mark.parametrize("gradient", ["lors", "exact"])
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("op", ADAPTED)
def test_opcheck(device, seed, op, explicit, gradient):
    if gradient == "exact" and op in ("merge", "merge_backward"):
        pytest.skip("this op has no gradient argument")
    several = ((T, torch.float32, True), (1, torch.float64, False)) if explicit else ((0, torch.bfloat16, True),)
    for tokens, dtype, bias in several:
        if dtype not in floats(device):
            continue
        case = make_case(seed, tokens, N, K, R, dtype, device=device, explicit_mask=explicit, bias=bias)
        args = good(op, case, gradient)
        if op in ("merge", "linear"):  # the differentiable ones
            for name in ("input", "lora_A", "lora_B", "bias"):
                if isinstance(args.get(name), torch.Tensor):
                    args[name] = args[name].requires_grad_()
        torch.library.opcheck(getattr(lors, op).default, tuple(args.values()))


@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=3)))
def test_opcheck_of_unwanted_gradients(device, seed, needs):
    case = make_case(seed, T, N, K, R, device=device, bias=True)
    args = good("linear_backward", case, needs=needs)
    if not needs[1] and not needs[2]:
        args["input"] = None
    torch.library.opcheck(
        lors.linear_backward.default, tuple(args.values()), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("op", ADAPTED)
def test_no_op_writes_to_its_arguments(device, seed, op):
    case = make_case(seed, T, N, K, R, device=device, explicit_mask=True, bias=True)
    args = good(op, case)
    before = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    out = getattr(lors, op)(**args)
    for name, value in args.items():
        assert torch.equal(value, before[name]) if isinstance(value, torch.Tensor) else value == before[name]
    pointers = {v.untyped_storage().data_ptr() for v in args.values() if isinstance(v, torch.Tensor)}
    for result in (out,) if isinstance(out, torch.Tensor) else out:
        assert result.untyped_storage().data_ptr() not in pointers
        assert result.is_contiguous()


@pytest.mark.parametrize("op", ADAPTED)
def test_results_repeat_bit_for_bit(device, seed, op):
    case = make_case(seed, 129, 48, 70, 16, torch.bfloat16, device=device, bias=True)
    args = good(op, case)
    first, second = getattr(lors, op)(**args), getattr(lors, op)(**args)
    pairs = [(first, second)] if isinstance(first, torch.Tensor) else zip(first, second, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def refusals() -> list:
    """(op, changed argument, its wrong value, what the message must say)."""
    f = torch.zeros
    adapted = [
        ("weight", f(N, K, 1), "weight has shape [6, 33, 1]; it must be [out_features, in_features]"),
        ("weight", f(N * K), "weight has shape [198]"),
        ("weight", f(()), "weight has shape []"),
        ("weight", f(0, K), "both sides must be at least 1"),
        ("weight", f(N, 0), "both sides must be at least 1"),
        ("weight", f(N, K, dtype=torch.int32), "weight has a dtype that is not supported"),
        ("weight", f(N, K, dtype=torch.bool), "weight has a dtype that is not supported"),
        ("weight", f(N, K, dtype=torch.complex64), "weight has a dtype that is not supported"),
        ("weight", f(N, K, dtype=torch.float8_e4m3fn), "weight has a dtype that is not supported"),
        ("lora_A", f(R, K + 1), "lora_A has shape [3, 34]; it must be [r, 33]"),
        ("lora_A", f(K), "lora_A has shape [33]"),
        ("lora_A", f(R, K, 1), "lora_A has shape [3, 33, 1]"),
        ("lora_A", f(R, K, dtype=torch.int8), "lora_A has a dtype that is not supported"),
        ("lora_A", f(R + 1, K), "lora_B has shape [6, 3]; it must be [6, 4]"),
        ("lora_B", f(N, R - 1), "lora_B has shape [6, 2]; it must be [6, 3]"),
        ("lora_B", f(R, N), "lora_B has shape [3, 6]; it must be [6, 3]"),
        ("lora_B", f(N, R, dtype=torch.int64), "lora_B has a dtype that is not supported"),
        ("mask", f(N, 2), "it must be int32 [6, 2]"),
        ("mask", f(N, K, dtype=torch.bool), "it must be int32 [6, 2]"),
        ("mask", f(N, 1, dtype=torch.int32), "mask has shape [6, 1]; it must be int32 [6, 2]"),
        ("mask", f(N - 1, 2, dtype=torch.int32), "mask has shape [5, 2]"),
        ("mask", f(12, dtype=torch.int32), "mask has shape [12]"),
    ]
    tokens = [
        ("input", f(T, K - 1), "input has shape [5, 32]; it must be [tokens, 33]"),
        ("input", f(2, T, K), "input has shape [2, 5, 33]; it must be [tokens, 33]"),
        ("input", f(K), "input has shape [33]; it must be [tokens, 33]"),
        ("input", f(()), "input has shape []"),
        ("input", f(T, K, dtype=torch.int32), "input has a dtype that is not supported"),
        ("input", f(T, K, dtype=torch.float64), "must both be float64, or neither"),
        ("gradient", "Exact", "gradient is 'Exact'; it must be 'lors' or 'exact'"),
        ("gradient", "", "gradient is ''"),
    ]
    grad_output = [
        ("grad_output", f(T, N + 1), "grad_output has shape [5, 7]; it must be [tokens, 6]"),
        ("grad_output", f(T + 1, N), "grad_output has 6 tokens and input 5"),
        ("grad_output", f(N), "grad_output has shape [6]"),
        ("grad_output", f(T, N, dtype=torch.bool), "grad_output has a dtype that is not supported"),
        ("grad_output", f(T, N, dtype=torch.float64), "must both be float64, or neither"),
    ]
    bias = [
        ("bias", f(N + 1), "bias has shape [7]; it must be [6]"),
        ("bias", f(1), "bias has shape [1]; it must be [6]"),
        ("bias", f(N, 1), "bias has shape [6, 1]; it must be [6]"),
        ("bias", f(()), "bias has shape []"),
        ("bias", f(N, dtype=torch.int8), "bias has a dtype that is not supported"),
        ("bias", f(N, dtype=torch.float8_e4m3fn), "bias has a dtype that is not supported"),
    ]
    merged = [
        ("grad_merged", f(N, K + 1), "grad_merged has shape [6, 34]; it must be [6, 33]"),
        ("grad_merged", f(N * K), "grad_merged has shape [198]"),
        ("grad_merged", f(N, K, dtype=torch.bfloat16), "grad_merged must have the weight's dtype"),
    ]
    wrong = {
        "merge": adapted,
        "merge_backward": [*adapted, *merged, ("lora_A", f(0, K), "the rank r must be at least 1")],
        "linear": adapted + tokens + bias,
        "linear_backward": [*adapted, *tokens, *grad_output, *bias, ("input", None, "input is None; it is needed")],
    }
    return [
        pytest.param(op, name, value, message, id=f"{op}-{name}-{i}")
        for op, changes in wrong.items()
        for i, (name, value, message) in enumerate(changes)
    ]


@pytest.mark.parametrize("explicit_mask", [False, True])
def test_the_merge_without_an_adapter_is_the_masked_weight(device, explicit_mask):
    case = make_case(7, T, N, K, R, device=device, explicit_mask=explicit_mask)
    args = good("merge", case) | {"lora_A": case.lora_A[:0], "lora_B": case.lora_B[:, :0]}
    assert torch.equal(lors.merge(**args), torch.where(case.kept, case.weight, 0.0))


@pytest.mark.parametrize(("op", "name", "value", "message"), refusals())
def test_wrong_arguments_are_refused_with_a_sentence(device, op, name, value, message):
    args = good(op, make_case(7, T, N, K, R, device=device, explicit_mask=True, bias=True))
    args[name] = value.to(device) if isinstance(value, torch.Tensor) else value
    if name == "weight" and args[name].dtype == torch.float32 and "grad_merged" in args:
        args["grad_merged"] = torch.full_like(args[name], 0.5)
    with pytest.raises(RuntimeError) as caught:
        getattr(lors, op)(**args)
    text = str(caught.value)
    assert text.startswith(f"lors::{op}: "), text
    assert message in text, text
    assert text.rstrip().endswith("."), text


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("op", ADAPTED)
@pytest.mark.parametrize("layout", ["sparse", "csr"])
def test_torch_sparse_tensors_are_refused(device, op, layout):
    args = good(op, make_case(7, T, N, K, R, device=device, bias=True))
    args["weight"] = args["weight"].to_sparse() if layout == "sparse" else args["weight"].to_sparse_csr()
    with pytest.raises(RuntimeError, match=f"lors::{op}"):
        getattr(lors, op)(**args)


def test_views_with_the_negative_bit_are_resolved(device, seed):
    case = make_case(seed, T, N, K, R, device=device)
    lazily, plainly = case.replace(weight=torch._neg_view(case.weight)), case.replace(weight=-case.weight)
    assert torch.equal(lazily.linear(), plainly.linear())
    assert torch.equal(lazily.merge(), plainly.merge())


def test_a_failure_inside_torch_is_explained():
    """Out of memory, say: the stable ABI itself reports the name of a C function and a line of a header."""
    args = good("linear", make_case(7, T, N, K, R))
    args["input"] = args["input"][:1].expand(1 << 45, K)
    with pytest.raises(RuntimeError, match=r"torch failed inside an operator of lors_cuda") as caught:
        lors.linear(**args)
    known = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
    assert ("allocate memory" if known else "is on stderr") in str(caught.value)


CRASH = """
    import faulthandler, itertools, random
    import torch, lors_cuda
    faulthandler.enable()
    lors, chance = torch.ops.lors, random.Random({seed})
    sides = (0, 1, 2, 3, 33, 64, 4096)
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.int32, torch.bool,
              torch.complex64, torch.float8_e4m3fn, torch.uint8)

    def tensor(*wanted, dtype=torch.float32):
        '''Mostly what is wanted; else of another shape, dtype or stride, None, or without memory.'''
        size = [chance.choice(sides) if chance.random() < 0.04 else n for n in wanted]
        if chance.random() < 0.03:
            size.append(chance.choice((0, 1, 3)))
        if chance.random() < 0.03:
            size.pop()
        dtype = chance.choice(dtypes) if chance.random() < 0.07 else dtype
        how = chance.random()
        if how < 0.03:
            return None
        if how < 0.10:
            return torch.full([], 2, dtype=torch.float32).to(dtype).expand(size)
        if how < 0.15 and len(size) == 2:
            return torch.ones(size[::-1]).to(dtype).T
        made = torch.ones(size).to(dtype)
        if how < 0.18 and made.numel():
            made.untyped_storage().resize_(0)  # what sharded training does to parameters that are not in use
        return made

    accepted = refused = 0
    for _ in range({count}):
        N, K, r, T = (chance.choice((1, 6, 33, 70)) for _ in range(4))
        N = chance.choice((N, 4096))
        dtype = chance.choice(dtypes[:4])
        weight, A, B = tensor(N, K, dtype=dtype), tensor(r, K), tensor(N, r)
        mask = chance.choice((None, tensor(N, (K + 31) // 32, dtype=torch.int32)))
        X, dY, bias = tensor(T, K, dtype=dtype), tensor(T, N, dtype=dtype), chance.choice((None, tensor(N)))
        s, g = chance.choice((0.5, float("nan"), float("inf"))), chance.choice(("lors", "exact", "exact", "other"))
        needs = [chance.random() < 0.7 for _ in range(3)]
        index = chance.choice((
            None,
            tensor(N, (K + 7) // 8, dtype=torch.uint8),
            tensor(N + 1, dtype=torch.int64),
            torch.arange(N + 1) * 2,
        ))
        adapted = (weight, mask, index, A, B)
        calls = (
            lambda: lors.merge(*adapted, s),
            lambda: lors.merge_backward(tensor(N, K, dtype=dtype), *adapted, s),
            lambda: lors.linear(X, *adapted, bias, s, g),
            lambda: lors.linear_backward(dY, X, *adapted, bias, s, g, *needs),
            lambda: lors.sparse24_merge(tensor(N, K // 2), tensor(N, (K + 7) // 8, dtype=torch.uint8), A, B, s),
            lambda: lors.compress(weight, tensor(N, (K + 31) // 32, dtype=torch.int32)),
        )
        for call in calls:
            try:
                call()
                accepted += 1
            except RuntimeError as error:
                assert str(error).strip()
                refused += 1
    print("accepted", accepted, "refused", refused)
"""


@pytest.mark.parametrize("seed", range(2))
def test_no_call_crashes(seed):
    """Random calls, most of them wrong in one or two ways, in a process of their own."""
    program = textwrap.dedent(CRASH.format(seed=seed, count=500))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"exit status {done.returncode}:\n{done.stderr[-3000:]}"
    words = done.stdout.split()
    assert int(words[1]) > 300, done.stdout
    assert int(words[3]) > 300, done.stdout


def test_every_float_dtype_is_accepted_as_adapter(device, seed):
    for weight, A, B in itertools.product(floats(device), repeat=3):
        case = make_case(seed, 2, N, K, R, weight, device=device, adapter_dtypes=(A, B))
        _, grad_lora_A, grad_lora_B, _ = case.linear_backward("lors")
        assert (case.merge().dtype, grad_lora_A.dtype, grad_lora_B.dtype) == (weight, A, B)
