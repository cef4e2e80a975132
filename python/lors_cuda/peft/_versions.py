# SPDX-License-Identifier: Apache-2.0
# Which PEFT this package works with; importing this file checks it. The layers build on internals of PEFT, which change
# from one minor version to the next.
"""The supported versions of PEFT."""

from __future__ import annotations

import re

#: The first version that works, and the first that may not.
SUPPORTED_PEFT = ("0.21", "0.22")


def require_peft() -> None:
    """Refuse a PEFT that is missing or of another version.

    Raises:
        ImportError: the sentence says what is installed and what to install.
    """
    try:
        import peft
    except ImportError as error:
        if error.name != "peft":
            raise
        raise ImportError(
            "lors_cuda.peft needs the peft package, which is not installed: pip install 'lors-cuda[peft]'"
        ) from None
    first, before = SUPPORTED_PEFT
    if not _number(first) <= _number(peft.__version__) < _number(before):
        raise ImportError(
            f"lors_cuda.peft works with peft >= {first} and < {before}, and {peft.__version__} is installed: "
            "pip install 'lors-cuda[peft]', or install a newer lors-cuda."
        )


def _number(version: str) -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (-1, -1)


require_peft()
