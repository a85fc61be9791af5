# SPDX-License-Identifier: Apache-2.0
"""Gated MLPs under torch.compile, torch.export and tracers."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import nn

from gated_helpers import CLOSE, MLP, Function, Taken, X, check, pair

pytestmark = pytest.mark.usefixtures("taken")


@pytest.mark.parametrize("kind", [MLP, Function])
def test_compile(kind: type[MLP], taken: Taken, monkeypatch: pytest.MonkeyPatch) -> None:
    single, made = pair(kind)
    check(made, single, taken, 1)
    torch._dynamo.reset()
    graphs: list[list[int]] = []

    def counting(graph: Any, inputs: Any) -> Any:
        called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        graphs.append([sum(name in each for each in called) for name in ("silu", "linear_gated")])
        return graph

    compiled = torch.compile(made, fullgraph=True, backend=counting)
    check(compiled, single, taken, 0)
    assert graphs == [[0, 1]]
    with torch.inference_mode():
        check(compiled, single, taken, 0)
    check(made, single, taken, 1)
    made.forward = torch.compile(made.forward, fullgraph=True, backend="eager")
    check(made, single, taken, 0)


UNUSUAL = ["gradient", "gradient of a bias", "hook", "pre-hook of the activation", "autocast", "adapter", "other activation"]


@pytest.mark.parametrize("unusual", UNUSUAL)
def test_compile_of_what_is_unusual(unusual: str, taken: Taken) -> None:
    """The module's own code is in the graph."""
    single, made = pair()
    graphs: list[int] = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(sum(node.op == "call_function" and "linear_gated" in str(node.target) for node in graph.graph.nodes))
        return graph

    def run() -> None:
        torch._dynamo.reset()
        graphs.clear()
        torch.testing.assert_close(torch.compile(made, backend=counting)(x), single(x), **CLOSE)

    x = X
    run()
    assert sum(graphs) == 1
    context: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if unusual == "gradient":
        x = X.clone().requires_grad_()
    elif unusual == "gradient of a bias":
        made.up_proj.bias.requires_grad_()
    elif unusual == "hook":
        made.up_proj.register_forward_hook(lambda *arguments: None)
    elif unusual == "pre-hook of the activation":
        made.act_fn.register_forward_pre_hook(lambda *arguments: None)
    elif unusual == "autocast":
        context = torch.autocast("cpu", torch.bfloat16)
    elif unusual == "adapter":
        made.gate_proj = nn.Sequential(made.gate_proj)
    else:
        made.act_fn, single.act_fn = nn.GELU(), nn.GELU()
    with context:
        run()
    assert sum(graphs) == 0


class OwnAttributes(MLP):
    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return (lambda x: 2 * found(x)) if name == "up_proj" else found


def test_attributes_that_are_no_modules(taken: Taken) -> None:
    """What the source names is what a module of that name gives."""
    single, made = pair(OwnAttributes)
    check(made, single, taken, 0)
    single, made = pair()
    check(made, single, taken, 1)
    for each in (single, made):
        each.__dict__["up_proj"] = lambda x, layer=each._modules["up_proj"]: 3 * layer(x)
    check(made, single, taken, 0)


def test_export(taken: Taken) -> None:
    single, made = pair()
    check(made, single, taken, 1)
    for strict in (False, True):
        program = torch.export.export(made, (X,), strict=strict)
        torch.testing.assert_close(program.module()(X), single(X), **CLOSE)
    assert len(taken) == 1


def test_traces(taken: Taken) -> None:
    single, made = pair()
    check(made, single, taken, 1)
    traced = torch.jit.trace(made, X, check_trace=False)
    check(traced, single, taken, 0)
    assert len(taken) == 1


def test_transforms(taken: Taken) -> None:
    single, made = pair()
    stacked = torch.stack([X.reshape(-1, 128), X.reshape(-1, 128) + 1])
    check(made, single, taken, 1, stacked)
    torch.testing.assert_close(torch.vmap(made)(stacked), single(stacked), **CLOSE)
    assert len(taken) == 1
    other = {"up_proj.bias": made.up_proj.bias + 1}
    wanted = torch.func.functional_call(single, other, (X,))
    torch.testing.assert_close(torch.func.functional_call(made, other, (X,)), wanted, **CLOSE)
