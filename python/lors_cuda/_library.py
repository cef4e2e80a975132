# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled operators and gives each its fake kernel, which tells shapes.

The schemas are in csrc/torch/library.cpp, the kernels are C++, the derivatives in _autograd.py. Nothing here reads a
tensor's value.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import pathlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def _load(name: str) -> bool:
    """Load the compiled library ``name`` of this package; False if this build has none."""
    # Through the import machinery, not this file's folder: an editable install keeps the binaries elsewhere.
    spec = importlib.util.find_spec(f"{__package__}.{name}")
    if spec is None or spec.origin is None:
        return False
    torch.ops.load_library(str(pathlib.Path(spec.origin)))
    return True


if not _load("_ops"):
    raise ImportError(
        "lors_cuda's compiled operators (_ops.so) were not found beside the package. Install the package with "
        "`pip install .` from its sources, or from a wheel; a source folder alone cannot run."
    )

lors = torch.ops.lors
FEW_TOKENS = 8  # kFewTokens of csrc/core/include/lors/cpu.h
BUILD: dict[str, str] = json.loads(lors.build_info())


def _wheel_label(cuda_version: str, archs: Iterable[str]) -> str:
    """What a wheel for this CUDA and these architectures is labelled (cmake/LorsVersion.cmake), as pip wants it."""
    return "+" + ".".join([f"cu{cuda_version.split('.')[0]}", *(f"sm{arch}" for arch in archs)])


def _load_cuda() -> str | None:
    """Register the CUDA kernels, which touches no device; why there are none, as a sentence without its full stop."""
    built, running = BUILD["cuda_version"], torch.version.cuda
    if not built:
        none = "this build of lors_cuda has no CUDA backend (it was built without nvcc)"
        if running is None:
            return none
        return (
            f"{none}; beside torch {torch.__version__} install the wheel labelled {_wheel_label(running, [])} and your "
            f"GPU's architecture, e.g. {_wheel_label(running, ['90a'])} for compute capability 9.0"
        )
    if running is None:
        return f"the installed torch {torch.__version__} was built without CUDA"
    # NOTE: a library of another CUDA major may well load (its runtime is linked statically); that proves nothing.
    if built.split(".")[0] != running.split(".")[0]:
        archs = BUILD["cuda_archs"].split(",")
        return (
            f"this build of lors_cuda is for CUDA {built} ({_wheel_label(built, archs)}) and the installed torch "
            f"{torch.__version__} for CUDA {running}: install the wheel labelled {_wheel_label(running, archs)}, or "
            f"build it beside that toolkit (make wheel), or install a torch for CUDA {built.split('.')[0]}"
        )
    try:
        if not _load("_ops_cuda"):
            return "the CUDA backend of lors_cuda (_ops_cuda.so) is missing from the package; install it again"
    except OSError as error:  # the loader's: the CPU must go on working
        return f"the CUDA backend of lors_cuda did not load with torch {torch.__version__}: {error.__cause__ or error}"
    return None


_CUDA_MISSING = _load_cuda()


@functools.cache
def _cuda_device_problem(index: int) -> str | None:
    """Why this build cannot use CUDA device ``index``, or None. By device: one machine may hold several kinds."""
    with torch.cuda.device(index):  # so that asking about one device does not wake another
        problem: str = lors.cuda_device_problem(index)
    return problem.removesuffix(".") or None


def _cuda_reason(index: int | None = None) -> str | None:
    """Why tensors on CUDA device ``index`` (None: torch's current one) cannot be used here; None if they can."""
    if _CUDA_MISSING is not None:
        return _CUDA_MISSING
    if torch.compiler.is_compiling():
        return None  # asking is no part of a graph; a kernel that cannot run on its device says so itself
    if index is None:
        if not torch.cuda.is_available():
            return "torch finds no CUDA device (torch.cuda.is_available() is False)"
        index = torch.cuda.current_device()
    return _cuda_device_problem(index)


def build_info() -> dict[str, Any]:
    """What this build is and what it found: version, compiler, cpu_capability, cpu_product, cpu_problem (what is wrong
    with a LORS_CPU_ environment variable, or None), cuda_version, cuda_archs, and of torch's current device
    cuda_available and cuda_reason (a sentence, or None)."""
    reason = _cuda_reason()
    return {
        "version": BUILD["version"],
        "compiler": BUILD["compiler"],
        "cpu_capability": BUILD["cpu_capability"],
        "cpu_product": {"bfloat16": BUILD["cpu_product_bfloat16"], "float16": BUILD["cpu_product_float16"]},
        "cpu_problem": BUILD["cpu_problem"] or None,
        "cuda_version": BUILD["cuda_version"] or None,
        "cuda_archs": [arch for arch in BUILD["cuda_archs"].split(",") if arch],
        "cuda_available": reason is None,
        "cuda_reason": reason,
    }


def release_scratch() -> int:
    """Free the scratch memory that the CPU operators keep between calls; returns its size in bytes.

    Merged weights that live for one call, packed operands and partial sums are written there, because fresh memory
    costs more time than writing into it. It is at most what one call (each of several threads) has needed at once, the
    largest layer's merged weight in most cases; the next call that needs it allocates again. Blocks with huge pages are
    given up by themselves when the system is short of memory. On CUDA scratch is part of torch's cache
    (``torch.cuda.empty_cache``).
    """
    return int(lors.release_scratch())


def check_device(device: torch.device) -> None:
    """Refuse a device that no kernel of this build supports."""
    if device.type in ("cpu", "meta"):
        return
    reason = _cuda_reason(device.index) if device.type == "cuda" else f"there are no kernels for {device.type} devices"
    if reason is not None:
        raise RuntimeError(
            f"lors_cuda was given tensors on {device}, but {reason}. Move the model to the CPU, or install a build "
            "with kernels for this device (`lors-cuda info` shows what this one has)."
        )


# ---- fake kernels: shapes and dtypes, for torch.compile and torch.export --------------------------------------------


def _fake_merged_shape(lora_A: Tensor, lora_B: Tensor) -> tuple[int, int]:
    """[N, K], or [E N, K] of a stack of experts."""
    return lora_B.shape[:-1].numel(), lora_A.shape[-1]


@torch.library.register_fake("lors::merge")
def _(
    weight: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    rounding_seed: int | None = None,
    noise: Tensor | None = None,
    noise_seed: int = 0,
    scales: Tensor | None = None,
    zero_points: Tensor | None = None,
    grid: str = "",
    requantize_steps: int = 0,
    dither_seed: int = -1,
) -> Tensor:
    return (weight if scales is None else scales).new_empty(_fake_merged_shape(lora_A, lora_B))


@torch.library.register_fake("lors::merge_backward")
def _(
    grad_merged: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    scales: Tensor | None = None,
    zero_points: Tensor | None = None,
    grid: str = "",
    requantize_steps: int = 0,
    dither_seed: int = -1,
) -> tuple[Tensor, Tensor]:
    return lora_A.new_empty(lora_A.shape), lora_B.new_empty(lora_B.shape)


@torch.library.register_fake("lors::merged_operand")
def _(
    weight: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dtype: torch.dtype,
    tokens: int,
    rounding_seed: int | None = None,
    noise: Tensor | None = None,
    noise_seed: int = 0,
    scales: Tensor | None = None,
    zero_points: Tensor | None = None,
    grid: str = "",
    requantize_steps: int = 0,
    dither_seed: int = -1,
) -> Tensor:
    computed = dtype
    if weight.device.type == "cpu":
        if dtype in (torch.bfloat16, torch.float16) and BUILD[f"cpu_product_{str(dtype)[6:]}"] == "float32":
            computed = torch.float32
        is_few = computed == torch.float32 or tokens <= FEW_TOKENS
        has_draws = rounding_seed is not None or noise is not None
        is_kept = index is not None and dtype == weight.dtype and is_few and not has_draws
        if is_kept and dtype != torch.float64:
            return weight.new_empty(weight.shape)  # values in the same layout
    return weight.new_empty(_fake_merged_shape(lora_A, lora_B), dtype=computed)


@torch.library.register_fake("lors::linear")
def _(
    input: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    gradient: str,
    merged: Tensor | None = None,
    rounding_seed: int | None = None,
    noise: Tensor | None = None,
    noise_seed: int = 0,
    scales: Tensor | None = None,
    zero_points: Tensor | None = None,
    grid: str = "",
    requantize_steps: int = 0,
    dither_seed: int = -1,
) -> Tensor:
    return input.new_empty((input.shape[0], lora_B.shape[0]))


def _fake_adapter_grads(
    lora_A: Tensor, lora_B: Tensor, needs_lora_A_grad: bool, needs_lora_B_grad: bool
) -> tuple[Tensor, Tensor]:
    factors = ((lora_A, needs_lora_A_grad), (lora_B, needs_lora_B_grad))
    of_A, of_B = (f.new_empty((f.shape[0] if is_needed else 0, *f.shape[1:])) for f, is_needed in factors)
    return of_A, of_B


@torch.library.register_fake("lors::linear_backward")
def _(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    gradient: str,
    needs_input_grad: bool,
    needs_lora_A_grad: bool,
    needs_lora_B_grad: bool,
    merged: Tensor | None = None,
    rounding_seed: int | None = None,
    noise: Tensor | None = None,
    noise_seed: int = 0,
    scales: Tensor | None = None,
    zero_points: Tensor | None = None,
    grid: str = "",
    requantize_steps: int = 0,
    dither_seed: int = -1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N, K = lora_B.shape[0], lora_A.shape[1]
    grad_input = grad_output.new_empty((grad_output.shape[0] if needs_input_grad else 0, K))
    grad_lora_A, grad_lora_B = _fake_adapter_grads(lora_A, lora_B, needs_lora_A_grad, needs_lora_B_grad)
    grad_bias = grad_output.new_empty((0,)) if bias is None else bias.new_empty((N,))
    return grad_input, grad_lora_A, grad_lora_B, grad_bias


@torch.library.register_fake("lors::grouped_linear")
def _(
    input: Tensor,
    offsets: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    gradient: str,
    merged: Tensor | None = None,
    rows: Tensor | None = None,
    scales: Tensor | None = None,
    zero_points: Tensor | None = None,
    grid: str = "",
    requantize_steps: int = 0,
    dither_seed: int = -1,
) -> Tensor:
    return input.new_empty((input.shape[0] if rows is None else rows.shape[0], lora_B.shape[1]))


@torch.library.register_fake("lors::grouped_linear_backward")
def _(
    grad_output: Tensor,
    input: Tensor | None,
    offsets: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    gradient: str,
    needs_input_grad: bool,
    needs_lora_A_grad: bool,
    needs_lora_B_grad: bool,
    merged: Tensor | None = None,
    rows: Tensor | None = None,
    scales: Tensor | None = None,
    zero_points: Tensor | None = None,
    grid: str = "",
    requantize_steps: int = 0,
    dither_seed: int = -1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_input = grad_output.new_empty((grad_output.shape[0] if needs_input_grad else 0, lora_A.shape[2]))
    grads = _fake_adapter_grads(lora_A, lora_B, needs_lora_A_grad, needs_lora_B_grad)
    grad_bias = grad_output.new_empty((0, lora_B.shape[1])) if bias is None else bias.new_empty(bias.shape)
    return grad_input, *grads, grad_bias


@torch.library.register_fake("lors::sparse24_merge")
def _(values: Tensor, metadata: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    return values.new_empty(values.shape)


@torch.library.register_fake("lors::compress")
def _(weight: Tensor, mask: Tensor) -> Tensor:
    return weight.new_empty((torch.library.get_ctx().new_dynamic_size(),))
