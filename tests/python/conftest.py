# SPDX-License-Identifier: Apache-2.0
"""What the Python tests share."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import zipserv
from gated_helpers import Taken
from zipserv import merged

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def fake_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A libcuda that only pretends (core/cuda/driver/testdata/fakecuda.c); ZIPSERV_LIBCUDA names it to a process."""
    out = tmp_path_factory.mktemp("fakecuda") / "libfakecuda.so"
    compiler = next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    command = [compiler] if compiler else [sys.executable, "-m", "ziglang", "cc"]
    source = ROOT / "core" / "cuda" / "driver" / "testdata" / "fakecuda.c"
    subprocess.run([*command, "-shared", "-fPIC", "-fvisibility=hidden", "-o", str(out), str(source), "-lpthread"], check=True)
    return out


@pytest.fixture(autouse=True)
def _products(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests compare with the bits of an uncompressed model, which the CPU gives in its exact mode; `default_products` leaves the default."""
    before = zipserv.cpu_linear()
    if request.node.get_closest_marker("default_products") is None:
        zipserv.set_cpu_linear("exact")
    yield
    zipserv.set_cpu_linear(before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Random weights are the same in every run."""
    torch.manual_seed(20260)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Taken:
    """As on a GPU that has a kernel for gated MLPs. Gives the inputs' shapes of all products that it was to compute."""
    calls: Taken = []

    def product(x: torch.Tensor, blob: torch.Tensor, m: int, k: int, dtype: torch.dtype, bias: torch.Tensor | None) -> torch.Tensor:
        calls.append(x.shape)
        gate, other = zipserv.tensor.linear_blob(x, blob, m, k, dtype, bias).chunk(2, -1)
        return F.silu(gate) * other

    monkeypatch.setattr(merged, "_SHARED_ON", frozenset({"cpu"}))
    monkeypatch.setattr(merged, "linear_gated", product)
    return calls
