# SPDX-License-Identifier: Apache-2.0
"""Every way this processor can compute, chosen by environment variables in processes of their own, meets the oracle."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from lors_cuda._library import build_info

HERE = pathlib.Path(__file__).parent

ORACLE = """
import json, sys
from cases import make_case
from expectations import check_linear, check_linear_backward, check_merge
from lors_cuda._library import build_info
from test_linear_op import combinations

largest, native = int(sys.argv[1]), build_info()["cpu_product"]["bfloat16"] == "bfloat16"
done = 0
for i, parameters in enumerate(combinations()):
    shape, dtype, explicit, gradient, bias, adapter_dtypes = parameters.values
    if shape[0] * shape[1] * shape[2] > largest:
        continue
    case = make_case(i, *shape, dtype, explicit_mask=explicit, bias=bias, adapter_dtypes=adapter_dtypes)
    if native and bias:  # a 16-bit product takes its bias in 16 bits
        case.bias = case.bias.to(dtype)
    check_merge(case.merge(), case)
    check_linear(case.linear(gradient), case)
    check_linear_backward(case.linear_backward(gradient), case, gradient)
    done += 1
print(json.dumps({"done": done, **build_info()}))
"""


def python(program: str, *arguments: object, **environment: str) -> str:
    """What a program beside the tests prints, with these LORS_ variables and no others."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("LORS_")}
    clean["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(HERE.parent), clean.get("PYTHONPATH")))
    )  # lors_cuda may be on it
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, cwd=HERE, env=clean | environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


CAPABILITIES = ("baseline", "avx2", "avx512", "avx512_bf16")


def processor_has(capability: str) -> bool:
    if capability == "avx512_bf16":
        flags = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
        return processor_has("avx512") and {"avx512_bf16", "avx512vbmi", "avx512_vbmi2"} <= set(flags)
    best = torch.backends.cpu.get_cpu_capability()
    return capability in {"AVX512": ("baseline", "avx2", "avx512"), "AVX2": ("baseline", "avx2")}.get(
        best, ("baseline",)
    )


def test_the_best_instruction_set_is_the_default():
    if "LORS_CPU_CAPABILITY" in os.environ:
        pytest.skip("LORS_CPU_CAPABILITY is set")
    best = [c for c in CAPABILITIES if processor_has(c)][-1]
    assert build_info()["cpu_capability"] == best


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_each_instruction_set(capability):
    if not processor_has(capability):
        pytest.skip(f"this processor has no {capability}")
    if capability == build_info()["cpu_capability"]:
        pytest.skip(f"{capability} is what all other tests run with here")
    report = json.loads(python(ORACLE, 10**9, LORS_CPU_CAPABILITY=capability))
    assert report["cpu_capability"] == capability
    assert report["done"] == 96


@pytest.mark.parametrize("fused", ["always", "never"])
def test_merging_inside_the_product_and_before_it(fused):
    assert json.loads(python(ORACLE, 200_000, LORS_CPU_FUSED=fused))["done"] > 50


@pytest.mark.parametrize("product", ["native", "float32"])
def test_each_type_of_product(product):
    default = build_info()["cpu_product"]
    wanted = default.keys() if product == "native" else ("float32",)
    if set(default.values()) == set(wanted):
        pytest.skip(f"{product} is what all other tests run with here")
    # Small: without matrix units for it, torch's own 16-bit product is slower by orders of magnitude.
    report = json.loads(python(ORACLE, 20_000, LORS_CPU_PRODUCT=product))
    for dtype, used in report["cpu_product"].items():
        assert used == (dtype if product == "native" else "float32")
    assert report["done"] > 30


REFUSED = """
import json, os, sys
import torch

def message(variable, value):
    os.environ[variable] = value
    try:
        import lors_cuda  # chooses the kernels
        lors_cuda.lors_linear(*(torch.rand(2, 2) for _ in range(4)), 0.5)
    except RuntimeError as error:
        return str(error)

for variable, value in json.loads(sys.argv[1]):  # each in a process of its own: a variable is read once
    if os.fork() == 0:
        print(json.dumps(message(variable, value)), flush=True)
        os._exit(0)
    os.wait()
"""


def test_unknown_values_are_refused_and_empty_ones_mean_unset():
    cases = [
        ("LORS_CPU_CAPABILITY", "avx3", "is 'avx3'; set it to baseline, avx2, avx512 or avx512_bf16"),
        ("LORS_CPU_CAPABILITY", "AVX2", "LORS_CPU_CAPABILITY is 'AVX2'; set it to baseline"),
        ("LORS_CPU_PRODUCT", "bf16", "LORS_CPU_PRODUCT is 'bf16'; set it to float32 or native"),
        ("LORS_CPU_FUSED", "yes", "LORS_CPU_FUSED is 'yes'; set it to always or never"),
        ("LORS_CPU_CAPABILITY", "", None),
        ("LORS_CPU_PRODUCT", "", None),
        ("LORS_CPU_FUSED", "", None),
    ]
    if not processor_has("avx512"):
        missing = "LORS_CPU_CAPABILITY asks for avx512, which this processor does not have"
        cases.insert(0, ("LORS_CPU_CAPABILITY", "avx512", missing))
    given = [json.loads(line) for line in python(REFUSED, json.dumps([c[:2] for c in cases])).splitlines()]
    for (variable, value, expected), message in zip(cases, given, strict=True):
        if expected is None:
            assert message is None, f"{variable}={value!r}: {message}"
        else:
            assert message is not None, f"{variable}={value!r} was accepted"
            assert expected in message


DIGEST = """
import hashlib, torch
from cases import make_case

case = make_case(11, 129, 96, 257, 16, torch.bfloat16, explicit_mask=True, bias=True)
digest = hashlib.sha256()
for result in (case.linear(), *case.linear_backward("exact"), case.merge()):
    digest.update(result.view(torch.int16).numpy().tobytes())
print(digest.hexdigest())
"""


def test_results_repeat_bit_for_bit_in_another_process():
    same = {k: v for k, v in os.environ.items() if k.startswith("LORS_")}
    here = io.StringIO()
    with contextlib.redirect_stdout(here):
        exec(DIGEST, {})
    assert python(DIGEST, **same) == here.getvalue()
