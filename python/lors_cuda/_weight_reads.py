# SPDX-License-Identifier: Apache-2.0
# Code that multiplies by `layer.weight` instead of calling the layer (WavLM's attention, Mamba's fused kernels,
# nn.MultiheadAttention) goes past an adapter. It is found twice: by the source of the forwards, before a model is
# converted (`weight_readers`), and while a forward runs, by who reads the property (`reads_past`). A look at the
# dtype or the shape of a weight, as T5 takes, is no use of it.
"""Who reads a layer's weight without calling the layer."""

from __future__ import annotations

import ast
import functools
import inspect
import os
import sys
import textwrap
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .dense_view import LOOKS

_ASKS_ONLY = LOOKS | {"new_empty", "new_full", "new_ones", "new_tensor", "new_zeros"}  # of a weight, not its values
_INSPECTORS = frozenset({"callable", "hasattr", "id", "isinstance", "type"})
_MODES = frozenset({"training", "gradient_checkpointing"})  # they change after conversion


@dataclass(frozen=True)
class _Read:
    """One place that reads a `weight`: the lines, the name of its owner ("mlp.up" of self.mlp.up) and whether that
    begins at `self`, whether the values are used, and the conditions under which the place is reached, each with what
    it must be."""

    lines: range
    owner: str
    of_self: bool
    used: bool
    conditions: tuple[tuple[ast.expr, bool], ...]

    def owners(self, module: nn.Module) -> Iterator[nn.Module]:
        """The modules that a reader in `module` means; where the name does not begin at `self`, all that end so."""
        for name, owner in module.named_modules(remove_duplicate=False):
            if name and self.owner and (name == self.owner or (not self.of_self and name.endswith(f".{self.owner}"))):
                yield owner

    def happens(self, known: dict[str, Any]) -> bool:
        """False if a condition excludes it, as far as that asks for nothing but what is known: `self` and arguments."""
        return all(_value(test, known) in (None, wanted) for test, wanted in self.conditions)


def weight_readers(model: nn.Module) -> dict[nn.Module, str]:
    """{layer: "Class.method"} of the modules whose weight another module's forward uses itself, by the source code.

    A read under a condition that the module's own attributes exclude (Bloom's slow_but_exact), or that arguments at
    their defaults exclude, does not count. Code without source, and code that has the layer itself in a
    variable, is not seen here.
    """
    readers: dict[nn.Module, str] = {}
    for module in model.modules():
        kind: Any = type(module)
        for where, read, defaults in _reads_of_class(kind):
            if read.happens({**defaults, "self": module}):
                for owner in read.owners(module):
                    readers.setdefault(owner, where)
    return readers


def reads_past(layer: Any) -> bool:
    """For the property `weight` of a layer with adapters, which calls this: whether a forward multiplies by it.

    It is then given the merged weight: the model computes what it will after a merge, and the adapters get their
    gradients. The first such read of a layer is warned of. torch.compile traces forwards only, and drops what is merely
    looked at.
    """
    if torch.compiler.is_compiling():
        return True
    reader: Any = sys._getframe(2)
    here = [read.used for read in _reads(reader.f_code) if reader.f_lineno in read.lines]
    if (here and not any(here)) or next(_forwards(reader), None) is None:
        return False
    if not layer.past_reader:
        layer.past_reader = _description(reader, layer)
        warnings.warn(
            f"{layer.past_reader} instead of calling the layer. It is given the merged weight, made again at each such "
            "read, with the exact gradient. Leave the layer out by exclude_modules if that is too slow.",
            UserWarning,
            stacklevel=3,
        )
    return True


def _description(reader: types.FrameType, layer: nn.Module) -> str:
    """Which code uses the weight of which layer, by its name in the outermost module whose forward runs."""
    modules = [frame.f_locals.get("self") for frame in _forwards(reader)]
    names = [_name_in(module, layer) for module in modules if isinstance(module, nn.Module)]
    name = next((name for name in reversed(names) if name is not None), type(layer).__name__)
    code = reader.f_code
    where = getattr(code, "co_qualname", code.co_name)
    return f"{where} ({os.path.basename(code.co_filename)}, line {reader.f_lineno}) uses the weight of '{name}'"


def _forwards(frame: types.FrameType | None) -> Iterator[types.FrameType]:
    """The frames of modules' forwards around a place, the innermost first."""
    while frame is not None:
        if frame.f_code.co_name in ("forward", "_call_impl"):
            yield frame
        frame = frame.f_back


def _name_in(model: nn.Module, layer: nn.Module) -> str | None:
    return next((name for name, module in model.named_modules() if module is layer and name), None)


@functools.cache
def _reads_of_class(kind: type) -> tuple[tuple[str, _Read, dict[str, Any]], ...]:
    """("Class.method", read, {argument: default}) of every use of another module's weight in `forward` and the methods
    that it names."""
    found: list[tuple[str, _Read, dict[str, Any]]] = []
    pending, seen = [(kind, "forward")], set()
    while pending:
        start, name = pending.pop()
        order = kind.__mro__[kind.__mro__.index(start) :]
        owner = next((base for base in order if name in vars(base)), nn.Module)
        if owner is nn.Module or owner is object or (owner, name) in seen:
            continue
        seen.add((owner, name))
        function = _function(vars(owner)[name])
        if function is None:
            continue
        where, defaults = f"{owner.__name__}.{name}", _defaults(function)
        found += [(where, read, defaults) for read in _reads(function.__code__) if read.used and read.owner]
        after = kind.__mro__[kind.__mro__.index(owner) + 1 :]
        for base, method in _methods(function.__code__):
            if base == "self":
                pending.append((kind, method))
            elif after:
                pending.append((after[0], method))
    return tuple(found)


def _function(member: Any) -> types.FunctionType | None:
    """The function behind a member of a class, without its decorators; None if it is none."""
    if isinstance(member, (staticmethod, classmethod)):
        member = member.__func__
    if isinstance(member, property):
        member = member.fget
    function = inspect.unwrap(member) if callable(member) else None
    return function if isinstance(function, types.FunctionType) else None


def _defaults(function: types.FunctionType) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}


@functools.cache
def _tree(code: types.CodeType) -> ast.AST | None:
    """The source of a function; None where there is none."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError):
        return None
    return ast.increment_lineno(tree, code.co_firstlineno - 1)


def _methods(code: types.CodeType) -> Iterator[tuple[str, str]]:
    """("self" or "super", name) of the attributes that a method takes from its object."""
    tree = _tree(code)
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                yield "self", node.attr
            elif isinstance(node.value, ast.Call) and getattr(node.value.func, "id", None) == "super":
                yield "super", node.attr


@functools.cache
def _reads(code: types.CodeType) -> tuple[_Read, ...]:
    """Every place in a function that reads an attribute called `weight`."""
    tree = _tree(code)
    if tree is None:
        return ()
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    reads = []
    for node in ast.walk(tree):
        owner = _weight_owner(node)
        if owner is not None:
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)  # type: ignore[attr-defined]
            used = not _only_looked_at(node, parents, tree)
            reads.append(_Read(lines, *_chain(owner), used, tuple(_conditions(node, parents))))
    return tuple(reads)


def _weight_owner(node: ast.AST) -> ast.expr | None:
    """The expression before `.weight`, also as getattr(it, "weight") and hasattr(it, "weight")."""
    if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load):
        return node.value
    if isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("getattr", "hasattr") and len(node.args) > 1:
        return node.args[0] if getattr(node.args[1], "value", None) == "weight" else None
    return None


def _chain(node: ast.expr) -> tuple[str, bool]:
    """("mlp.up", True) of self.mlp.up; ("up", False) of layers[0].up."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join(reversed(names)), isinstance(node, ast.Name) and node.id == "self"


def _only_looked_at(
    node: ast.AST, parents: dict[ast.AST, ast.AST], tree: ast.AST, via: frozenset[str] = frozenset()
) -> bool:
    """Whether the value of this expression is asked for its dtype, shape and the like, and for nothing else."""
    parent = parents.get(node)
    if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "hasattr":
        return True
    if isinstance(parent, ast.Attribute):
        return parent.attr in _ASKS_ONLY or (parent.attr == "data" and _only_looked_at(parent, parents, tree, via))
    if isinstance(parent, ast.Call):
        function = getattr(parent.func, "id", None)
        asked = getattr(parent.args[1], "value", None) if function == "getattr" and len(parent.args) > 1 else None
        return function in _INSPECTORS or asked in _ASKS_ONLY
    if isinstance(parent, ast.Compare):
        return all(isinstance(operator, (ast.Is, ast.IsNot)) for operator in parent.ops)
    if isinstance(parent, ast.Assign) and [type(target) for target in parent.targets] == [ast.Name]:
        name = parent.targets[0].id  # type: ignore[attr-defined]
        loads = [
            other
            for other in ast.walk(tree)
            if isinstance(other, ast.Name) and other.id == name and isinstance(other.ctx, ast.Load)
        ]
        return name not in via and all(_only_looked_at(other, parents, tree, via | {name}) for other in loads)
    return False


def _conditions(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> Iterator[tuple[ast.expr, bool]]:
    """The tests of the `if`s around a place, each with the value that leads there."""
    while (parent := parents.get(node)) is not None:
        if isinstance(parent, ast.If) and node is not parent.test:
            yield parent.test, node in parent.body
        if isinstance(parent, ast.IfExp) and node is not parent.test:
            yield parent.test, node is parent.body
        node = parent


def _value(test: ast.expr, known: dict[str, Any]) -> bool | None:
    """Whether a test holds; None if it asks for anything but known names and their attributes."""
    for node in ast.walk(test):
        if isinstance(node, ast.Call) or (isinstance(node, ast.Attribute) and node.attr in _MODES):
            return None
    try:
        code = compile(ast.Expression(test), "<condition>", "eval")
        return bool(eval(code, {"__builtins__": {}}, known))
    except Exception:
        return None
