# SPDX-License-Identifier: Apache-2.0
"""The real vLLM on the CPU: its layers, models and loaders run there; its engine and attention kernels do not."""

from __future__ import annotations

import os

os.environ["VLLM_TARGET_DEVICE"] = "cpu"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ["ZIPSERV_CPU_LINEAR"] = "exact"  # the bits of the uncompressed layer, which nearly all tests compare with

from collections.abc import Iterator
from pathlib import Path

import pytest
import support
import torch


@pytest.fixture(scope="session", autouse=True)
def group() -> Iterator[None]:
    """A gloo group of this process alone, and the plugin registered."""
    support.join_group(0, 1, support.free_port())
    torch.set_num_threads(2)
    yield


@pytest.fixture
def dtype() -> Iterator[torch.dtype]:
    """Layers built in the test are BF16."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with support.current_config():
        yield torch.bfloat16
    torch.set_default_dtype(before)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> support.Folders:
    """Tiny checkpoints with random weights, plain and made by `zipserv compress`."""
    return support.Folders(Path(tmp_path_factory.mktemp("models")))
