# SPDX-License-Identifier: Apache-2.0
"""Whether a module's code changes an input in place between the layers that read it: then they do not read the same."""

from __future__ import annotations

import ast
import inspect
import textwrap

from torch import nn

__all__ = ["same_input"]


def same_input(parent: nn.Module, names: tuple[str, ...]) -> bool:
    """False where the source of ``parent.forward`` writes into what it gives to these layers, between two of them.

    Training would refuse such code (a linear layer keeps its input for the gradient), so it is hardly ever met, and code
    without a source is taken to be sound. The counter of writes that every tensor has does not exist in inference mode.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(type(parent).forward)))
    except (OSError, TypeError, SyntaxError):
        return True
    uses: dict[str, list[int]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in names and node.args:
            if isinstance(node.func.value, ast.Name) and node.func.value.id == "self" and isinstance(node.args[0], ast.Name):
                uses.setdefault(node.args[0].id, []).append(node.lineno)
    return not any(_writes(tree, name, min(lines), max(lines)) for name, lines in uses.items())


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
