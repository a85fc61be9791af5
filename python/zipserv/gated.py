# SPDX-License-Identifier: Apache-2.0
"""Gated MLPs, ``down(silu(gate(x)) * up(x))``, whose gate and up were merged: one product gives what ``down`` reads.

A module whose ``forward`` is exactly that, by its source, gets a class made from its own one, with another ``forward``. Nothing else about the
module changes, and whatever it is called with that needs its layers one by one (hooks, adapters, gradients, a tracer) runs the code of its own class.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable
from types import FunctionType
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as _hooks  # hooks on all modules are its globals
from torch.utils._device import DeviceContext

from .siblings import forward_tree

__all__ = ["adapt", "restore"]

_silu = F.silu
_function_modes: Any = torch.overrides._get_current_function_mode_stack  # untyped in torch
_tracing_state: Any = torch._C._get_tracing_state
#: What in a class would take notice of a class that is made from it, or would copy and pickle its modules in ways of its own.
_OWN_WAYS = frozenset(
    {"__init_subclass__", "__reduce__", "__reduce_ex__", "__getnewargs__", "__getnewargs_ex__", "__copy__", "__deepcopy__"}
)


class _Form(NamedTuple):
    """What the source of a ``forward`` says: the names of its layers and of its activation, as ``self.act_fn`` or ``F.silu``."""

    forward: Any  # that function
    gate: str
    up: str
    down: str
    act: tuple[str, ...]


#: The class made from another. While a module is of it: nothing here keeps either.
_made: WeakValueDictionary[type, type] = WeakValueDictionary()


def adapt(parent: nn.Module, names: tuple[str, ...]) -> None:
    """Let a module take the one product, where it is of that form and these are its gate and up, in this order: merged, and of as many rows each."""
    kind = _class_of(type(parent))
    if kind is None:
        return
    form = vars(kind)["_zipserv_form"]
    if names == (form.gate, form.up) and _is_silu(parent, form):
        parent.__class__ = kind


def restore(parent: nn.Module) -> None:
    """The inverse. A class that others made from ours (FSDP2) stays: its ``forward`` is that of the module's own class without merged layers."""
    if "_zipserv_form" in vars(type(parent)):
        parent.__class__ = type(parent).__bases__[0]


def _class_of(base: type) -> type | None:
    """The class to take for modules of this one; None where its ``forward`` has another form."""
    kind = _made.get(base)
    if kind is None or vars(kind)["_zipserv_form"].forward is not vars(base).get("forward"):
        form = _form(base)
        if form is None:
            return None
        kind = _made[base] = _make(base, form)
    return kind


def _make(base: Any, form: _Form) -> type:
    @functools.wraps(form.forward)  # who asks for its signature or its source gets that of the module's own
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and base.forward is form.forward:
            y = _traced(self, form, args[0]) if torch.compiler.is_dynamo_compiling() else _product(self, form, args[0])
            if y is not None:
                return getattr(self, form.down)(y)
        return base.forward(self, *args, **kwargs)

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        how: Any = object.__reduce_ex__(self, max(2, protocol))
        return (_new, (base,), *how[2:]) if type(self) is kind else how

    called = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    kind = type(base.__name__, (base,), {**called, "forward": forward, "__reduce_ex__": reduce, "_zipserv_form": form})
    return kind


def _new(base: type) -> Any:
    """For copies and pickles, which know our classes by those that they were made from."""
    kind: Any = _class_of(base) or base
    return kind.__new__(kind)


def _product(parent: nn.Module, form: _Form, x: torch.Tensor) -> torch.Tensor | None:
    """``silu(gate(x)) * up(x)``; None where the layers are to be called."""
    modules = parent._modules
    if form.gate in parent.__dict__ or form.up in parent.__dict__:
        return None  # these come before modules of the same name
    gate: Any = modules.get(form.gate)
    up = modules.get(form.up)
    if _tracing_state() is not None or not hasattr(type(gate), "can_gate") or not gate.can_gate(up, x) or not _is_silu(parent, form):
        return None
    if _are_hooked((gate, up, modules[form.act[1]]) if form.act[0] == "self" else (gate, up)):
        return None
    if any(type(mode) is not DeviceContext for mode in _function_modes()):
        return None
    y: torch.Tensor | None = gate.gated(x)
    return y


def _traced(parent: nn.Module, form: _Form, x: torch.Tensor) -> torch.Tensor | None:
    """The same for torch.compile, whose tracer follows it: what it asks of the modules holds in the graph, which others are compiled beside."""
    gate: Any = getattr(parent, form.gate)
    up: Any = getattr(parent, form.up)
    if not hasattr(type(gate), "trace_gated") or not _is_silu(parent, form):
        return None
    for each in (gate, up, getattr(parent, form.act[1])) if form.act[0] == "self" else (gate, up):
        if each._forward_hooks or each._forward_pre_hooks:
            return None
    y: torch.Tensor | None = gate.trace_gated(up, x)
    return y


def _are_hooked(modules: Iterable[Any]) -> bool:
    """Whether somebody would notice that these modules are not called."""
    if _hooks._global_forward_hooks or _hooks._global_forward_pre_hooks or _hooks._global_backward_hooks or _hooks._global_backward_pre_hooks:
        return True
    for each in modules:
        if each._forward_hooks or each._forward_pre_hooks or each._backward_hooks or each._backward_pre_hooks or "forward" in each.__dict__:
            return True
    return False


def _is_silu(parent: nn.Module, form: _Form) -> bool:
    first, *rest = form.act
    if first == "self":
        kind = type(parent._modules.get(rest[0]))
        return kind is nn.SiLU or (kind.__name__ == "SiLUActivation" and kind.__module__ == "transformers.activations")
    found: object = form.forward.__globals__.get(first)
    for name in rest:
        found = getattr(found, name, None)
    return found is _silu


# --- what the source says -------------------------------------------------------------------------------------------


def _form(kind: type) -> _Form | None:
    """Of a class whose own ``forward`` is ``return self.down(act(self.gate(x)) * self.up(x))``, or the same by way of a name."""
    function = vars(kind).get("forward")
    if type(kind) is not type or not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
        return None
    if any(_OWN_WAYS & vars(each).keys() for each in kind.__mro__[:-1]):
        return None
    match forward_tree(kind):
        case ast.Module(
            body=[
                ast.FunctionDef(
                    args=ast.arguments(
                        posonlyargs=[], args=[ast.arg(arg="self"), ast.arg(arg=x)], vararg=None, kwonlyargs=[], kwarg=None, defaults=[]
                    ),
                    body=body,
                    decorator_list=[],
                )
            ]
        ):
            pass
        case _:
            return None
    match body:
        case [ast.Expr(value=ast.Constant(value=str())), *body]:
            pass
    match body:
        case [ast.Return(value=value)]:
            pass
        case [ast.Assign(targets=[ast.Name(id=name)], value=value), ast.Return(value=ast.Name(id=given))] if name == given:
            pass
        case _:
            return None
    match value:
        case ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr=down), args=[ast.BinOp(left=left, op=ast.Mult(), right=right)], keywords=[]):
            pass
        case _:
            return None
    for activated, other in ((left, right), (right, left)):
        match activated:
            case ast.Call(func=function_called, args=[inner], keywords=[]):
                gate, up, act = _layer(inner, x), _layer(other, x), _dotted(function_called)
                if gate is not None and up is not None and act is not None:
                    return _checked(kind, _Form(function, gate, up, down, act))
    return None


def _layer(node: ast.expr, x: str) -> str | None:
    """The name in ``self.NAME(x)``."""
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr=str(name)), args=[ast.Name(id=given)], keywords=[]) if given == x:
            return name
    return None


def _dotted(node: ast.expr) -> tuple[str, ...] | None:
    """``("F", "silu")`` of ``F.silu``."""
    match node:
        case ast.Name(id=name):
            return (name,)
        case ast.Attribute(value=value, attr=name):
            before = _dotted(value)
            return None if before is None else (*before, name)
    return None


def _checked(kind: type, form: _Form) -> _Form | None:
    """None where a name of the source may mean something else than it says: an attribute of the class, or one that it finds in ways of its
    own, a local variable, one of a function around."""
    code, (first, *rest) = form.forward.__code__, form.act
    given: Any = kind
    if given.__getattr__ is not nn.Module.__getattr__ or given.__getattribute__ is not object.__getattribute__:
        return None
    if any(hasattr(kind, name) for name in (form.gate, form.up, form.down, *(rest if first == "self" else ()))):
        return None
    if first == "self":
        return form if len(rest) == 1 else None
    return None if first in (*code.co_varnames, *code.co_cellvars, *code.co_freevars) else form
