# SPDX-License-Identifier: Apache-2.0
"""Which MLPs have their gate and up in one product for what `down` reads: those whose forward is a gate's, whatever it is called."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zipserv
from gated_helpers import FORMS, MLP, Taken, X, check, filled, pair
from zipserv import gated
from zipserv.merged import MergedLinear, merge_layers

pytestmark = pytest.mark.usefixtures("taken")


@pytest.mark.parametrize("kind", FORMS)
def test_forms(kind: type[MLP], taken: Taken) -> None:
    single, made = pair(kind)
    check(made, single, taken, 1)
    assert taken == [X.shape]
    assert isinstance(made, kind) and isinstance(made.gate_proj, MergedLinear)
    assert repr(made).splitlines()[0] == f"{kind.__name__}(" == repr(single).splitlines()[0]
    assert {f"{type(m).__module__}.{type(m).__qualname__}" for m in (single, made)} == {f"{kind.__module__}.{kind.__qualname__}"}
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
