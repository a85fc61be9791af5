# SPDX-License-Identifier: Apache-2.0
"""Merged layers whose holder writes into their input between them: nobody may get the product of the input before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zipserv
from zipserv import merged
from zipserv.siblings import proven


@pytest.fixture(autouse=True)
def shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    monkeypatch.setattr(merged, "_SHARED_ON", frozenset({"cpu"}))


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.act = nn.Linear(128, 128), nn.Linear(128, 128), nn.ReLU(inplace=True)
        self.extra = nn.Parameter(torch.ones(128))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gate_proj(x) * self.up_proj(x)

    def helper(self, x: torch.Tensor) -> torch.Tensor:
        x.mul_(3)
        return self.up_proj(x)


class Function(Holder):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        g = self.gate_proj(x)
        F.relu(x, inplace=True)
        return g * self.up_proj(x)


class Module(Holder):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        g = self.gate_proj(x)
        self.act(x)
        return g * self.up_proj(x)


class Alias(Holder):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.view(-1)
        g = self.gate_proj(x)
        h.mul_(3)
        return g * self.up_proj(x)


class Helper(Holder):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gate_proj(x) * self.helper(x)


class Out(Holder):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        g = self.gate_proj(x)
        torch.mul(x, 3, out=x)
        return g * self.up_proj(x)


class Bias(Holder):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        g = self.gate_proj(x)
        with torch.no_grad():
            self.up_proj.bias.add_(5)
        return g * self.up_proj(x)


class Result(Holder):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            g = self.gate_proj(x)
        g += self.extra
        u = self.up_proj(x)
        a = g * self.extra
        u = u.mul_(2)
        return a * u


def made(kind: type[Holder], merge: bool) -> Holder:
    torch.manual_seed(0)
    holder = kind().to(torch.bfloat16).eval()
    box = nn.Sequential(holder)
    zipserv.compress_model(box, merge=merge)
    return holder


def eager(holder: Holder, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return holder(x)


def inference(holder: Holder, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return holder(x.clone()).clone()


def compiled(holder: Holder, x: torch.Tensor) -> torch.Tensor:
    torch._dynamo.reset()
    with torch.no_grad():
        result: torch.Tensor = torch.compile(holder, backend="aot_eager")(x)
    return result


@pytest.mark.parametrize("run", [eager, inference, compiled])
@pytest.mark.parametrize("kind", [Holder, Function, Module, Alias, Helper, Out, Bias])
def test_writes_between_the_layers_count(kind: type[Holder], run: Callable[[Holder, torch.Tensor], torch.Tensor]) -> None:
    if kind is Bias and run is inference:
        pytest.skip("parameters can't be written to there")
    x = torch.randn(4, 128).to(torch.bfloat16)
    assert torch.equal(run(made(kind, True), x.clone()), run(made(kind, False), x.clone()))


def test_a_result_is_a_tensor_of_its_own() -> None:
    x, gradients = torch.randn(4, 128).to(torch.bfloat16), []
    for merge in (True, False):
        holder = made(Result, merge)
        holder(x.clone()).float().sum().backward()
        assert holder.extra.grad is not None
        gradients.append(holder.extra.grad)
    assert torch.equal(*gradients)


def test_hooks_and_transforms() -> None:
    x = torch.randn(4, 128).to(torch.bfloat16)
    results = []
    for merge in (True, False):
        holder = made(Holder, merge)
        with torch.no_grad():
            results.append(torch.vmap(holder)(x))
        holder.gate_proj.register_forward_hook(lambda module, args, output: (args[0].mul_(3), None)[1])
        results.append(inference(holder, x))
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])


def test_what_is_proven() -> None:
    assert proven(Holder(), ("gate_proj", "up_proj"))
    for kind in (Function, Module, Alias, Helper, Out):
        assert not proven(kind(), ("gate_proj", "up_proj")), kind
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    config: Any = modeling.LlamaConfig(hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2)
    assert proven(modeling.LlamaAttention(config, 0), ("q_proj", "k_proj", "v_proj"))
    assert proven(modeling.LlamaMLP(config), ("gate_proj", "up_proj"))
