# SPDX-License-Identifier: Apache-2.0
"""What the Python tests share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Random weights are the same in every run."""
    torch.manual_seed(20260)
