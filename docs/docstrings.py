# SPDX-License-Identifier: Apache-2.0
# A griffe extension: docstrings are written for help() too, and name things as :func:`x`; the site needs them as links.
"""What mkdocstrings does to a docstring before it renders it."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|meth|class|attr):`(?P<name>[\w.]+)`")


class Roles(griffe.Extension):
    """Turns :func:`name` into a link to `name`, which is resolved in the scope of the docstring."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(lambda role: _link(role["name"], obj), obj.docstring.value)


def _link(name: str, obj: griffe.Object) -> str:
    return f"[`{name}`][{_full_name(name, obj)}]"


def _full_name(name: str, obj: griffe.Object) -> str:
    """The object that `name` refers to in `obj`'s docstring, under the name of the module that defines it."""
    first, dot, rest = name.partition(".")
    scope: griffe.Object | None = obj
    while scope is not None:
        if first in scope.members:
            member = scope.members[first]
            return (member.target_path if isinstance(member, griffe.Alias) else member.path) + dot + rest
        scope = scope.parent
    return name
