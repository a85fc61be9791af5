# SPDX-License-Identifier: Apache-2.0
"""When a gated MLP is computed layer by layer after all: where somebody could see a difference."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

import gated_helpers
from gated_helpers import CLOSE, MLP, Imported, Reversed, Taken, X, adapter, check, filled, pair, takes
from zipserv import merged
from zipserv.merged import MergedLinear

pytestmark = pytest.mark.usefixtures("taken")


class Hooked(MergedLinear):
    pass


class Doubled(nn.Module):
    def forward(self, bias: torch.Tensor) -> torch.Tensor:
        return 2 * bias


def replica(mlp: Any) -> None:
    """As nn.DataParallel makes them."""
    layer = copy.copy(mlp.up_proj)
    layer._parameters = {"bias": nn.Parameter(torch.zeros(192).bfloat16(), requires_grad=False)}
    mlp.up_proj = layer


def pruned(mlp: Any) -> None:
    """A bias that is no parameter, as torch.nn.utils.prune and weight_norm leave one."""
    bias = mlp.up_proj._parameters.pop("bias")
    mlp.up_proj.bias = 3 * bias.data


def instead(mlp: Any, name: str, call: Callable[..., Any]) -> None:
    getattr(mlp, name).forward = call


#: Changes that either model gets: the numbers stay those of the model that is not merged.
CHANGES: dict[str, Callable[[Any], object]] = {
    "act GELU": lambda mlp: setattr(mlp, "act_fn", nn.GELU()),
    "act of a class made from SiLU": lambda mlp: setattr(mlp, "act_fn", type("SiLU", (nn.SiLU,), {"forward": lambda self, x: x})()),
    "act replaced by accelerate": lambda mlp: instead(mlp, "act_fn", F.gelu),
    "up replaced by accelerate": lambda mlp: instead(mlp, "up_proj", lambda x, old=mlp.up_proj.forward: old(x) + 1),
    "gate's forward": lambda mlp: instead(mlp, "gate_proj", lambda x, old=mlp.gate_proj.forward: old(x) + 1),
    "module's forward": lambda mlp: setattr(mlp, "forward", lambda x, old=mlp.up_proj: old(x)[..., :128]),
    "adapter": adapter,
    "another layer": lambda mlp: setattr(mlp, "up_proj", filled(nn.Linear(128, 192, bias=False))),
    "no up": lambda mlp: setattr(mlp, "up_proj", mlp.gate_proj),
    "exchanged": lambda mlp: [setattr(mlp, *each) for each in (("up_proj", mlp.gate_proj), ("gate_proj", mlp.up_proj))],
    "up of another": lambda mlp: setattr(mlp, "up_proj", (torch.manual_seed(3), pair()[isinstance(mlp.up_proj, MergedLinear)])[1].up_proj),
    "pruned": pruned,
    "parametrized": lambda mlp: parametrize.register_parametrization(mlp.up_proj, "bias", Doubled()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes(name: str, taken: Taken) -> None:
    single, made = pair()
    check(made, single, taken, 1)
    before = single(X)
    for model in (single, made):
        torch.manual_seed(0)
        CHANGES[name](model)
    assert not torch.allclose(before.float(), single(X).float(), **CLOSE), "a change that shows"
    check(made, single, taken, 0)


def test_a_replica_other_bytes_and_a_layer_of_another_class(taken: Taken) -> None:
    classes = [lambda mlp, name=name: setattr(getattr(mlp, name), "__class__", Hooked) for name in ("gate_proj", "up_proj")]
    other = pair()[1].up_proj.merged_zipserv
    for change in (replica, lambda mlp: mlp.up_proj._buffers.update(merged_zipserv=other), *classes):
        _, made = pair()
        assert takes(made, taken) == 1
        change(made)
        expected = made.down_proj(F.silu(made.gate_proj(X)) * made.up_proj(X))
        taken.clear()
        torch.testing.assert_close(made(X), expected, **CLOSE)
        assert not taken


def test_the_class_gets_another_forward(taken: Taken, monkeypatch: pytest.MonkeyPatch) -> None:
    _, made = pair()
    assert takes(made, taken) == 1
    monkeypatch.setattr(MLP, "forward", lambda self, x: x + 1)
    assert torch.equal(made(X), X + 1) and len(taken) == 1
    assert type(copy.deepcopy(made)) is MLP, "not of that form any more"
    monkeypatch.undo()


def test_the_function_is_another_one(taken: Taken, monkeypatch: pytest.MonkeyPatch) -> None:
    _, made = pair(Imported)
    assert takes(made, taken) == 1
    monkeypatch.setattr(gated_helpers, "silu", F.gelu)
    assert takes(made, taken) == 0


HOOKS: dict[str, Callable[[Any, list[int]], Any]] = {
    "forward": lambda layer, seen: layer.register_forward_hook(lambda *arguments: seen.append(1)),
    "always": lambda layer, seen: layer.register_forward_hook(lambda *arguments: seen.append(1), always_call=True),
    "pre": lambda layer, seen: layer.register_forward_pre_hook(lambda *arguments: seen.append(1)),
    "keywords": lambda layer, seen: layer.register_forward_pre_hook(lambda *arguments: seen.append(1), with_kwargs=True),
    "backward": lambda layer, seen: layer.register_full_backward_hook(lambda *arguments: None) and seen.append(1),
    "backward pre": lambda layer, seen: layer.register_full_backward_pre_hook(lambda *arguments: None) and seen.append(1),
}


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "act_fn"])
@pytest.mark.parametrize("sort", HOOKS)
def test_hooks(sort: str, name: str, taken: Taken) -> None:
    _, made = pair()
    seen: list[int] = []
    assert takes(made, taken) == 1 and not seen
    HOOKS[sort](getattr(made, name), seen)
    assert takes(made, taken) == 0 and seen == [1]


@pytest.mark.parametrize("sort", HOOKS)
def test_hooks_around_are_called_as_ever(sort: str, taken: Taken) -> None:
    single, made = pair()
    seen: list[int] = []
    for layer in (made, made.down_proj):
        HOOKS[sort](layer, seen)
    check(made, single, taken, 1)
    assert seen == [1, 1]


@pytest.mark.parametrize("sort", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_hooks_on_all_modules(sort: str, taken: Taken) -> None:
    _, made = pair()
    assert takes(made, taken) == 1
    seen: list[nn.Module] = []
    handle = getattr(nn.modules.module, f"register_module_{sort}")(lambda module, *arguments: seen.append(module))
    try:
        assert takes(made, taken) == 0
        assert "backward" in sort or made.gate_proj in seen
    finally:
        handle.remove()
    assert takes(made, taken) == 1


def test_hooks_of_accelerate(taken: Taken) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    for name in ("gate_proj", "up_proj", "act_fn"):
        single, made = pair()
        hooks.add_hook_to_module(made, hooks.ModelHook())
        check(made, single, taken, 1)
        hooks.add_hook_to_module(getattr(made, name), hooks.ModelHook())
        check(made, single, taken, 0)
        hooks.remove_hook_from_module(made, recurse=True)
        check(made, single, taken, 0 if "forward" in getattr(made, name).__dict__ else 1)


def test_few_tokens(taken: Taken) -> None:
    single, made = pair()
    rows = X.reshape(-1, 128)
    for tokens, times in ((129, 1), (128, 1), (1, 1), (0, 0)):
        check(made, single, taken, times, rows[:tokens])


def test_inputs_that_do_not_fit(taken: Taken) -> None:
    _, made = pair()
    assert takes(made, taken) == 1
    with pytest.raises(TypeError, match="float32"):
        made(X.float())
    with pytest.raises(ValueError, match="128"):
        made(torch.cat([X, X[..., :64]], -1))
    with pytest.raises(TypeError, match=r"forward\(\)"):
        made(X, X)
    with pytest.raises((TypeError, AttributeError), match="list"):
        made([1, 2])
    with pytest.raises(ValueError, match="meta"):
        made(X.to("meta"))
    assert len(taken) == 1


class Sub(torch.Tensor):
    pass


def test_subclasses_of_tensors(taken: Taken) -> None:
    single, made = pair()
    check(made, single, taken, 1)
    assert takes(made, taken, X.as_subclass(Sub)) == 0
    assert takes(made, taken, nn.Parameter(X, requires_grad=False)) == 0


def test_gradients(taken: Taken) -> None:
    single, made = pair()
    with torch.enable_grad():
        check(made, single, taken, 1)
        x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
        made(x).float().sum().backward()
        single(y).float().sum().backward()
        torch.testing.assert_close(x.grad, y.grad, **CLOSE)
        assert len(taken) == 1
        made.up_proj.bias.requires_grad_()
        assert takes(made, taken) == 0
        made.up_proj.bias.requires_grad_(False)
        made.down_proj.bias.requires_grad_()
        y = made(X)
        assert y.requires_grad and len(taken) == 2, "what is trained behind it gets its gradient"
        y.float().sum().backward()
        assert made.down_proj.bias.grad is not None
    made.requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert takes(made, taken) == takes(made, taken, X.clone().requires_grad_(mode is torch.no_grad)) == 1
    assert takes(made, taken) == 0


@contextlib.contextmanager
def global_state(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        if name == "batch invariant":
            patch.setattr(merged, "_batch_invariant", lambda blob: True)
            yield
        elif name == "sharded":
            patch.setattr(merged._Group, "is_sharded", lambda self: True)
            yield
        elif name == "another device":
            patch.setattr(merged, "_SHARED_ON", frozenset())
            yield
        elif name == "no kernel":
            patch.setattr(merged, "linear_gated", lambda *arguments: None)
            yield
        elif name == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                yield
        else:
            raise KeyError(name)


@pytest.mark.parametrize("name", ["batch invariant", "sharded", "another device", "no kernel", "autocast"])
def test_states(name: str, taken: Taken, monkeypatch: pytest.MonkeyPatch) -> None:
    single, made = pair()
    check(made, single, taken, 1)
    with global_state(name, monkeypatch):
        check(made, single, taken, 0)
    check(made, single, taken, 1)


def test_function_modes(taken: Taken) -> None:
    """One that looks for an activation finds it; the one of torch.set_default_device looks for none."""
    seen: list[Any] = []

    class Looks(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    single, made = pair(Reversed)
    check(made, single, taken, 1)
    with Looks():
        assert takes(made, taken) == 0
    assert F.silu in seen
    with torch.device("cpu"):
        assert takes(made, taken) == 1
