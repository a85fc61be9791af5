# SPDX-License-Identifier: Apache-2.0
"""Gated MLPs whose gate and up are merged: one product for what `down` reads, where nobody can see a difference, and nowhere else."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import silu
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

import zipserv
from zipserv import ZipLinear, gated, merged
from zipserv.merged import MergedLinear, merge_layers, split_layers

X = torch.randn(2, 100, 128, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
CLOSE = {"rtol": 2e-2, "atol": 2e-2}


class MLP(nn.Module):
    def __init__(self, rows: int = 192) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(128, rows), nn.Linear(128, rows), nn.Linear(rows, 128)
        self.act_fn, self.dropout = nn.SiLU(), nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Comments and a docstring change nothing."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # nor does this


class Named(MLP):
    def forward(self, hidden):
        hidden = self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))
        return hidden


class Reversed(MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.up_proj(x) * F.silu(self.gate_proj(x)))


class Function(MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        down = self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return down


class Imported(MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


FORMS = [MLP, Named, Reversed, Function, Imported]


def filled(made: nn.Module) -> nn.Module:
    made = made.to(torch.bfloat16).eval()
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return made.requires_grad_(False)


def pair(kind: Callable[..., nn.Module] = MLP, *arguments: Any) -> tuple[nn.Module, nn.Module]:
    """The same module, not merged and merged."""
    single = filled(kind(*arguments))
    made = copy.deepcopy(single)
    zipserv.compress_model(single, merge=False)
    zipserv.compress_model(made)
    return single, made


Taken = list[torch.Size]


@pytest.fixture(autouse=True)
def taken(monkeypatch: pytest.MonkeyPatch) -> Taken:
    """As on a GPU that has such a kernel. Gives the inputs' shapes of all products that it was to compute."""
    calls: Taken = []

    def product(x: torch.Tensor, blob: torch.Tensor, m: int, k: int, dtype: torch.dtype, bias: torch.Tensor | None) -> torch.Tensor:
        calls.append(x.shape)
        gate, other = zipserv.tensor.linear_blob(x, blob, m, k, dtype, bias).chunk(2, -1)
        return F.silu(gate) * other

    monkeypatch.setattr(merged, "_SHARED_ON", frozenset({"cpu"}))
    monkeypatch.setattr(merged, "linear_gated", product)
    return calls


def takes(mlp: nn.Module, taken: Taken, x: Any = X) -> int:
    """How many such products a call computes."""
    before = len(taken)
    mlp(x)
    return len(taken) - before


def check(mlp: nn.Module, single: nn.Module, taken: Taken, times: int, x: torch.Tensor = X) -> None:
    before = len(taken)
    torch.testing.assert_close(mlp(x), single(x), **CLOSE)
    assert len(taken) - before == times


# --- what is recognised ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMS)
def test_forms(kind: type[MLP], taken: Taken) -> None:
    single, made = pair(kind)
    check(made, single, taken, 1)
    assert taken == [X.shape]
    assert isinstance(made, kind) and isinstance(made.gate_proj, MergedLinear)
    assert repr(made).splitlines()[0] == f"{kind.__name__}(" == repr(single).splitlines()[0]
    assert {f"{type(m).__module__}.{type(m).__qualname__}" for m in (single, made)} == {f"{__name__}.{kind.__qualname__}"}
    check(made, single, taken, 1, X[:1].expand(2, 100, 128))
    check(made, single, taken, 1, X.reshape(-1, 128)[:129])


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Mistral"])
@pytest.mark.parametrize("act", ["silu", "gelu"])
def test_models_of_transformers(name: str, act: str, taken: Taken) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    config = getattr(transformers, f"{name}Config")(hidden_size=128, intermediate_size=256, hidden_act=act)
    module = __import__(f"transformers.models.{name.lower()}.modeling_{name.lower()}", fromlist=[""])
    single, made = pair(getattr(module, f"{name}MLP"), config)
    check(made, single, taken, 1 if act == "silu" else 0)
    assert type(made) is type(single) if act == "gelu" else type(made).__bases__ == (type(single),)
    if act == "silu":
        made(x=X)
        assert len(taken) == 1, "a call by keyword is right, in the usual way"


def test_without_biases_and_with_one(taken: Taken) -> None:
    for names in (("gate_proj", "up_proj"), ("up_proj",)):
        plain = filled(MLP())
        for name in names:
            getattr(plain, name).bias = None
        single, made = copy.deepcopy(plain), plain
        zipserv.compress_model(single, merge=False)
        zipserv.compress_model(made)
        check(made, single, taken, 1)


def test_a_bias_of_another_dtype(taken: Taken) -> None:
    single, made = pair()
    check(made, single, taken, 1)
    for model in (single, made):
        model.gate_proj.float(), model.up_proj.float()  # the bias alone: the weights stay as they are
    check(made, single, taken, 1)


class Dropout(MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.dropout(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


class Between(MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class After(MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y + 1


class Sum(MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))


class Gelu(MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))


class Swapped(MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class Squared(MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.gate_proj(x))


class Keyword(MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x), inplace=True) * self.up_proj(x))


class Optional(MLP):
    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Default(MLP):
    def forward(self, x: Any = None) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Unused(MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # noqa: F841
        return x


class NoActivation(MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.gate_proj(x) * self.up_proj(x))


class Two(MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * 2)


def doubling(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def doubled(self: nn.Module, x: torch.Tensor) -> Any:
        return 2 * function(self, x)

    return doubled


class Decorated(MLP):
    @doubling
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def marking(function: Any) -> Any:
    function.marked = True
    return function


class Marked(MLP):
    """Who marks a function may look for it."""

    @marking
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Replaced(MLP):
    """Its source looks as that of the function inside of it."""

    forward = doubling(MLP.forward)


class Lambda(MLP):
    forward = lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # noqa: E731


class ClassAttribute(MLP):
    """Comes before what the instance holds under that name."""

    act_fn = staticmethod(F.gelu)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def closed() -> type[MLP]:
    silu = F.gelu

    class Closed(MLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))

    return Closed


class Reduces(MLP):
    """Would be pickled as of a class that nobody finds."""

    def __reduce__(self) -> Any:
        return type(self), (), self.__dict__

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Registers(MLP):
    """A class made from it would be one of its models."""

    known: list[type] = []

    def __init_subclass__(cls) -> None:
        Registers.known.append(cls)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


OTHERS = [
    Dropout, Between, After, Sum, Gelu, Swapped, Squared, Keyword, Optional, Default, Unused, NoActivation, Two, Decorated, Marked, Replaced, Lambda,
    ClassAttribute, closed(), Reduces, Registers,
]  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_other_forms(kind: type[MLP], taken: Taken) -> None:
    single, made = pair(kind)
    assert isinstance(made.gate_proj, MergedLinear) and type(made) is kind
    check(made, single, taken, 0)
    assert not Registers.known
    for model in (single, made):  # with the code of an MLP the same layers take it
        model.__class__ = MLP
    gated.adapt(made, ("gate_proj", "up_proj"))
    check(made, single, taken, 1)


@pytest.mark.parametrize("change", ["none", "half", "where", "uneven"])
def test_other_layers(change: str, taken: Taken) -> None:
    made = filled(MLP())
    x = X
    if change == "half":
        made, x = made.half(), X.half()
    if change == "uneven":
        made.up_proj = filled(nn.Linear(128, 190))
    zipserv.compress_model(made, merge=False)
    single = copy.deepcopy(made)
    merge_layers(made, where=(lambda layer: layer is not made.up_proj) if change == "where" else None)
    assert isinstance(made.gate_proj, MergedLinear) == (change != "where") and (type(made) is MLP) == (change != "none")
    if change != "uneven":  # results of 192 and of 190 columns can't be multiplied
        check(made, single, taken, 1 if change == "none" else 0, x)


def test_the_cpu_has_no_such_kernel() -> None:
    _, made = pair()
    assert made.gate_proj.can_gate(made.up_proj, X)
    assert zipserv.rows.linear_gated(X, made.gate_proj.merged_zipserv, 384, 128, torch.bfloat16, None) is None


# --- when it is not taken -------------------------------------------------------------------------------------------


def adapter(mlp: Any) -> None:
    """As PEFT wraps a layer."""

    class Lora(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base_layer = base

        def forward(self, x: torch.Tensor) -> Any:
            return self.base_layer(x) + 1

    mlp.gate_proj = Lora(mlp.gate_proj)


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
    monkeypatch.setitem(globals(), "silu", F.gelu)
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


# --- tracers --------------------------------------------------------------------------------------------------------


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


# --- copies, files, splitting ---------------------------------------------------------------------------------------


def saved(model: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "save": saved,
    **{f"pickle {p}": lambda model, p=p: pickle.loads(pickle.dumps(model, protocol=p)) for p in range(pickle.HIGHEST_PROTOCOL + 1)},
}


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("kind", [MLP, Function])
def test_copies(kind: type[MLP], name: str, taken: Taken) -> None:
    single, made = pair(kind)
    holder = nn.Sequential(made)
    other = COPIES[name](holder)
    assert type(other[0]) is type(made) is not kind and isinstance(other[0], kind)
    check(other, single, taken, 1)
    assert other[0].gate_proj._group is not made.gate_proj._group
    nn.init.ones_(other[0].up_proj.bias)
    check(made, single, taken, 1)
    single.up_proj.bias.data.fill_(1)
    check(other, single, taken, 1)
    shallow = copy.copy(made)
    assert type(shallow) is type(made) and shallow._modules is made._modules and takes(shallow, taken) == 1
    split_layers(holder)
    assert type(made) is kind and type(COPIES[name](holder)[0]) is kind


def test_state_dicts(taken: Taken) -> None:
    single, made = pair()
    states = single.state_dict(), made.state_dict()
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    other = filled(MLP())
    made.load_state_dict(other.state_dict())
    single.load_state_dict(other.state_dict())
    check(made, single, taken, 1)


def test_moves(taken: Taken) -> None:
    single, made = pair()
    made.float().to("cpu").bfloat16()
    check(made, single, taken, 1)
    assert copy.deepcopy(made).to("meta")(X.to("meta")).shape == X.shape


def test_splitting_and_merging_again(taken: Taken) -> None:
    single, made = pair()
    model = nn.ModuleList([made, pair(Reversed)[1]])
    kinds = [type(each) for each in model]
    assert split_layers(model, lambda layer: layer is made.up_proj) == ["0.gate_proj", "0.up_proj"]
    assert type(made) is MLP and type(made.up_proj) is ZipLinear and type(model[1]) is kinds[1]
    check(made, single, taken, 0)
    assert merge_layers(model) == [("0.gate_proj", "0.up_proj")] and type(made) is kinds[0]
    check(made, single, taken, 1)
    split_layers(model)
    assert [type(each) for each in model] == [MLP, Reversed]


def test_layers_within_adapters_are_split(taken: Taken) -> None:
    """Their group's holder is not what holds them."""
    single, made = pair()
    for model in (single, made):
        adapter(model)
        model.up_proj = nn.Sequential(model.up_proj)
    check(made, single, taken, 0)
    base = made.gate_proj.base_layer
    made.gate_proj, made.up_proj = base, made.up_proj[0]
    assert takes(made, taken) == 1, "and the product is back with the layers"
    adapter(made)
    made.up_proj = nn.Sequential(made.up_proj)
    split_layers(made)
    assert type(made) is MLP
    check(made, single, taken, 0)


def test_nothing_is_kept(taken: Taken) -> None:
    class Local(MLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    made = pair(Local)[1]
    assert takes(made, taken) == 1 and type(made) is type(pair(Local)[1])
    gc.collect()
    gc.disable()
    try:
        module = weakref.ref(made)
        del made
        assert module() is None, "at once"
    finally:
        gc.enable()
    gc.collect()
    assert Local.__subclasses__() == []
    kind = weakref.ref(Local)
    del Local
    gc.collect()
    assert kind() is None


def test_fsdp(tmp_path: Path, taken: Taken) -> None:
    """It makes classes from ours in the same way."""
    if not torch.distributed.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    from torch.distributed.fsdp import FSDPModule, fully_shard

    single, made = pair()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        holder = nn.Sequential(made)
        fully_shard(made, mesh=mesh)
        fully_shard(holder, mesh=mesh)
        assert isinstance(made, FSDPModule) and isinstance(made, MLP) and made.__reduce_ex__(4)[1] == (type(made),)
        check(holder, single, taken, 1)
        single, made = pair()
        for model in (single, made):
            model.gate_proj.bias = model.up_proj.bias = None  # FSDP2 would look for them in the layers as they were
        fully_shard(made, mesh=mesh)
        check(made, single, taken, 1)
        split_layers(made)
        assert isinstance(made, FSDPModule) and type(made.up_proj) is ZipLinear
        check(made, single, taken, 0)
        merge_layers(made)
        check(made, single, taken, 1)
        single, other = pair()
        check(other, single, taken, 1)
        fully_shard(other.up_proj, mesh=mesh)
        check(other, single, taken, 0)
    finally:
        torch.distributed.destroy_process_group()


def test_a_compiled_model_generates_the_same_tokens(taken: Taken) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=320
    )
    torch.manual_seed(0)
    model = filled(transformers.LlamaForCausalLM(config))
    ids, arguments = torch.arange(5)[None], {"max_new_tokens": 5, "do_sample": False, "cache_implementation": "static", "pad_token_id": 0}
    expected = model.generate(ids, **arguments)
    zipserv.compress_model(model)
    graphs: list[int] = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(sum("zipserv.linear_gated" in str(node.target) for node in graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, fullgraph=True, backend=counting)
    assert torch.equal(model.generate(ids, **arguments), expected)
    assert graphs and set(graphs) == {2} and not taken


def test_a_decode_step_of_the_benchmark(taken: Taken, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is compiled with that product, prompts take it without a compiler."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    from zipserv.bench import fused

    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=320, mlp_bias=True
    )
    model = filled(transformers.LlamaForCausalLM(config))
    zipserv.compress_model(model)
    kind, ids = type(model.model.layers[0].mlp), torch.arange(200)
    forward = kind.forward
    graphs: list[list[str]] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    prompt, step = ids.reshape(2, 100), ids.reshape(200, 1)
    wanted = [model(each).logits for each in (prompt, step)]
    assert len(taken) == 4
    taken.clear()
    with fused.fused(model):
        torch.testing.assert_close(model(prompt).logits, wanted[0], **CLOSE)
        assert len(taken) == 2
        torch.testing.assert_close(model(step).logits, wanted[1], **CLOSE)
        assert len(taken) == 2
    products = [[name for name in graph if "zipserv.linear" in name] for graph in graphs]
    assert sum(len(names) == 2 and "linear_gated" in names[0] for names in products) >= 1
    assert kind.forward is forward and len(graphs) >= 3
