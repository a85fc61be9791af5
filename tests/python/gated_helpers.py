# SPDX-License-Identifier: Apache-2.0
"""Gated MLPs in all forms that are recognised, and how many of their products are one (`taken`, conftest.py)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import silu

import zipserv

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


def takes(mlp: nn.Module, taken: Taken, x: Any = X) -> int:
    """How many such products a call computes."""
    before = len(taken)
    mlp(x)
    return len(taken) - before


def check(mlp: nn.Module, single: nn.Module, taken: Taken, times: int, x: torch.Tensor = X) -> None:
    before = len(taken)
    torch.testing.assert_close(mlp(x), single(x), **CLOSE)
    assert len(taken) - before == times


def adapter(mlp: Any) -> None:
    """As PEFT wraps a layer."""

    class Lora(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base_layer = base

        def forward(self, x: torch.Tensor) -> Any:
            return self.base_layer(x) + 1

    mlp.gate_proj = Lora(mlp.gate_proj)
