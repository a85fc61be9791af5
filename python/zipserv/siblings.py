# SPDX-License-Identifier: Apache-2.0
"""Whether a module's code changes an input in place between the layers that read it: then they do not read the same."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

from torch import nn

__all__ = ["forward_tree", "proven", "same_input"]


def same_input(parent: nn.Module, names: tuple[str, ...]) -> bool:
    """False where the source of ``parent.forward`` writes into what it gives to these layers, between two of them.

    Training would refuse such code (a linear layer keeps its input for the gradient), so it is hardly ever met, and code
    without a source is taken to be sound. The counter of writes that every tensor has does not exist in inference mode.
    """
    tree = forward_tree(type(parent))
    if tree is None:
        return True
    uses: dict[str, list[int]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _is_layer(node, names) and node.args and isinstance(node.args[0], ast.Name):
            uses.setdefault(node.args[0].id, []).append(node.lineno)
    return not any(_writes(tree, name, min(lines), max(lines)) for name, lines in uses.items())


# What can be asked of a tensor without getting hold of its memory.
_HARMLESS = {"device", "dtype", "ndim", "shape"}


def proven(parent: nn.Module, names: tuple[str, ...]) -> bool:
    """True where the source of ``parent.forward`` shows that nothing can write into the layers' input between them.

    Needed where tensors count no writes: in inference mode, and while torch.compile traces. All calls of the layers stand in ``forward``
    itself, and from the first of them to the last neither their inputs nor anything made from these goes anywhere else, nothing is
    changed in place, and no ``out=``, ``inplace=`` or ``.data`` stands there.
    """
    tree = forward_tree(type(parent))
    if tree is None:
        return False
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _is_layer(node, names)]
    given = [call.args[0] for call in calls if len(call.args) == 1 and not call.keywords]
    inputs = {value.id for value in given if isinstance(value, ast.Name)}
    if len(given) < len(calls) or not all(isinstance(value, ast.Name) for value in given):
        return False
    if {call.func.attr for call in calls if isinstance(call.func, ast.Attribute)} != set(names):
        return False
    while True:  # and whatever is made from them, anywhere in the function
        made = {
            name.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr | ast.For) and _reaches(_source(node), inputs, names)
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            for name in ast.walk(target)
            if isinstance(name, ast.Name)
        }
        if made <= inputs:
            break
        inputs |= made
    first, last = min(call.lineno for call in calls), max(call.end_lineno or call.lineno for call in calls)
    return not any(_harms(node, inputs, names) for node in ast.walk(tree) if first <= getattr(node, "lineno", -1) <= last)


def forward_tree(kind: Any) -> ast.Module | None:
    """The source of the ``forward`` of a class of modules, where there is one."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))
    except (OSError, TypeError, SyntaxError):
        return None


def _is_layer(node: ast.AST, names: tuple[str, ...]) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in names
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "self"
    )


def _source(node: ast.AST) -> ast.AST | None:
    return node.iter if isinstance(node, ast.For) else getattr(node, "value", None)


def _reaches(node: ast.AST | None, inputs: set[str], names: tuple[str, ...]) -> bool:
    """Whether one of the inputs, or a view of it, can be what an expression gives or passes on."""
    if node is None or _is_layer(node, names):
        return False
    if isinstance(node, ast.Attribute) and node.attr in _HARMLESS:
        return False
    if isinstance(node, ast.Name):
        return node.id in inputs
    return any(_reaches(child, inputs, names) for child in ast.iter_child_nodes(node))


def _harms(node: ast.AST, inputs: set[str], names: tuple[str, ...]) -> bool:
    if isinstance(node, ast.AugAssign | ast.Delete | ast.With | ast.Try):
        return True
    if isinstance(node, ast.Assign) and any(isinstance(target, ast.Subscript | ast.Attribute) for target in node.targets):
        return True
    if isinstance(node, ast.Attribute) and node.attr == "data":
        return True
    if not isinstance(node, ast.Call) or _is_layer(node, names):
        return False
    called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
    if called.endswith("_") and not called.endswith("__"):
        return True
    if any(keyword.arg in ("inplace", "out", None) for keyword in node.keywords):
        return True
    given = [*node.args, *(keyword.value for keyword in node.keywords)]
    return any(_reaches(value, inputs, names) for value in given)


def _writes(tree: ast.AST, name: str, first: int, last: int) -> bool:
    def is_it(node: ast.AST) -> bool:
        while isinstance(node, ast.Subscript):
            node = node.value
        return isinstance(node, ast.Name) and node.id == name

    for node in ast.walk(tree):
        if not first <= getattr(node, "lineno", -1) <= last:
            continue
        if isinstance(node, ast.AugAssign) and is_it(node.target):
            return True
        if isinstance(node, ast.Assign) and any(isinstance(target, ast.Subscript) and is_it(target) for target in node.targets):
            return True
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and is_it(node.func.value):
            if node.func.attr.endswith("_") and not node.func.attr.endswith("__"):
                return True
    return False
