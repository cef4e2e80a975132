# SPDX-License-Identifier: Apache-2.0
"""Which versions of PEFT this package works with: its layers build on internals of PEFT that change between versions."""

from __future__ import annotations

import re

FIRST, BEFORE = (0, 21), (0, 22)


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
    match = re.match(r"(\d+)\.(\d+)", peft.__version__)
    version = (int(match[1]), int(match[2])) if match else None
    if version is None or not FIRST <= version < BEFORE:
        first, before = (".".join(map(str, bound)) for bound in (FIRST, BEFORE))
        raise ImportError(
            f"lors_cuda.peft works with peft >= {first} and < {before}, and {peft.__version__} is installed: "
            "pip install 'lors-cuda[peft]', or install a newer lors-cuda."
        )
