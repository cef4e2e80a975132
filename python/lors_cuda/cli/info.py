# SPDX-License-Identifier: Apache-2.0
"""``lors-cuda info``: what is installed, what this machine has, and which kernels support it."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from typing import Any

import torch

from .. import __version__
from .._checks import sparse_product
from .._library import build_info
from ._common import say

_OPS = (
    "merge", "merge_backward", "merged_operand", "linear", "linear_backward", "grouped_linear",
    "grouped_linear_backward", "sparse24_merge",
)  # fmt: skip
_EXTRAS = ("transformers", "safetensors", "tqdm", "matplotlib")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options of its own."""


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Collect and print; needs nothing but torch, and succeeds on every machine."""
    build = build_info()
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    extras = {name: _version(name) for name in _EXTRAS}
    kernels = {
        op: {
            "cpu": _has_kernel(op, "CPU"),
            # The dispatcher knows what was loaded, not whether a device of this machine can run it.
            "cuda": _has_kernel(op, "CUDA") and build["cuda_available"],
        }
        for op in _OPS
    }
    reason = build["cuda_reason"]
    result = {
        "lors_cuda": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "extras": extras,
        "cpu": {
            "capability": build["cpu_capability"],
            "product": build["cpu_product"],
            "threads": torch.get_num_threads(),
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
        },
        "cuda": {
            "torch_version": torch.version.cuda,
            "built_with": build["cuda_version"],
            "built_architectures": build["cuda_archs"],
            "gpus": gpus,
            "available": reason is None,
            "reason": reason,
            "sparse_product": sparse_product(),
        },
        "compiler": build["compiler"],
        "kernels": kernels,
    }
    words = {True: "yes", False: "no"}
    missing = [name for name, version in extras.items() if version is None]
    product = ", ".join(f"{dtype} in {how}" for dtype, how in build["cpu_product"].items())
    lines = [
        f"lors_cuda {__version__}, torch {torch.__version__}, Python {result['python']}, {result['platform']}",
        f"CPU       kernels use {build['cpu_capability']}, {torch.get_num_threads()} thread(s); matmuls of {product}",
        f"CUDA      {'available: ' + ', '.join(gpus) if reason is None else 'not available: ' + reason}",
        f"          built for {', '.join(build['cuda_archs']) or 'no architecture'}"
        + (f" with CUDA {build['cuda_version']}" if build["cuda_version"] else "")
        + f"; torch was built with {'CUDA ' + torch.version.cuda if torch.version.cuda else 'no CUDA'}",
        f"          2:4 forward: {result['cuda']['sparse_product']}",
        "packages  " + ", ".join(f"{name} {version or '(missing)'}" for name, version in extras.items()),
        "",
        f"{'kernel':<23}  CPU  CUDA",
        *(f"{op:<23}  {words[where['cpu']]:<3}  {words[where['cuda']]}" for op, where in kernels.items()),
    ]
    if missing:
        lines += ["", f"For {', '.join(missing)}: pip install 'lors-cuda[cli]'"]
    say(args, "\n".join(lines))
    return result


def _has_kernel(op: str, key: str) -> bool:
    """Whether torch's dispatcher has a kernel of this package for a device: asked of it, not assumed."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"lors::{op}", key))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
