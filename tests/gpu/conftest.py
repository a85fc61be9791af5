# SPDX-License-Identifier: Apache-2.0
"""Tests of this folder need an NVIDIA GPU. Elsewhere they are skipped, unless ZIPSERV_REQUIRE_GPU is set: then its absence is a failure."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


def _missing() -> str | None:
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU that torch can use"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"needs compute capability 8.0 or newer, this GPU has {major}.{minor}"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    items = [item for item in items if here in item.path.parents]  # the hook sees those of other folders too
    reason = _missing()
    if reason is None or not items:
        return
    if os.environ.get("ZIPSERV_REQUIRE_GPU"):
        pytest.exit(f"ZIPSERV_REQUIRE_GPU is set: {reason}", returncode=1)
    for item in items:
        item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1234)
