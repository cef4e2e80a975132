# SPDX-License-Identifier: Apache-2.0
"""A wheel installed into an environment of its own: try_wheel.py runs this there and names the file in LORS_WHEEL."""

from __future__ import annotations

import os
import sys
from importlib import metadata
from pathlib import Path

import torch
from packaging.utils import parse_wheel_filename

import lors_cuda
from lors_cuda import _library

WHEEL = Path(os.environ["LORS_WHEEL"])
VERSION = parse_wheel_filename(WHEEL.name)[1]


def test_the_wheel_is_what_is_imported() -> None:
    """Not a checkout, nor an editable install that the environment borrows torch from."""
    assert Path(lors_cuda.__file__).is_relative_to(sys.prefix)
    for library in torch.ops.loaded_libraries:
        if "lors_cuda" in library:
            assert Path(library).is_relative_to(sys.prefix)


def test_the_version_is_the_files() -> None:
    assert lors_cuda.__version__ == metadata.version("lors-cuda") == str(VERSION)


def test_the_label_is_the_builds() -> None:
    built = _library.BUILD
    if built["cuda_version"]:
        label = _library._wheel_label(built["cuda_version"], built["cuda_archs"].split(","))
    else:
        label = "+cpu"
    assert f"+{VERSION.local}" == label if VERSION.local else lors_cuda.__version__ == VERSION.public


def test_the_cuda_half_is_loaded_exactly_where_it_fits() -> None:
    built, running = _library.BUILD["cuda_version"], torch.version.cuda
    fits = bool(built) and running is not None and built.split(".")[0] == running.split(".")[0]
    assert (_library._CUDA_MISSING is None) == fits
    assert torch._C._dispatch_has_kernel_for_dispatch_key("lors::merge", "CUDA") == fits
