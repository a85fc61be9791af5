# SPDX-License-Identifier: Apache-2.0
"""Pinned memory: exact sizes, and given back in the right order."""

from __future__ import annotations

import contextlib
import gc
from typing import Any

import pytest
import torch

import zipserv
from zipserv.pinned import pinned_empty


class Runtime:
    """Stands for the CUDA runtime: keeps book of what is pinned."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.pinned: dict[int, int] = {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        if not self.code:
            self.pinned[address] = nbytes
        return self.code

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return 0

    def cudaGetErrorString(self, code: int) -> str:
        return "out of memory"


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    made = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return made


def test_pinned_as_long_as_a_tensor_uses_it(runtime: Runtime) -> None:
    tensor: Any = pinned_empty(100_000, torch.device("cuda:0"))
    assert tensor.shape == (100_000,) and tensor.dtype == torch.uint8
    (size,) = runtime.pinned.values()
    assert 100_000 <= size < 105_000 and tensor.data_ptr() in runtime.pinned and tensor.data_ptr() % 4096 == 0
    view = tensor[5000:9000].view(torch.bfloat16)
    del tensor
    gc.collect()
    assert runtime.pinned
    view.fill_(3)
    assert view.sum() == 6000
    del view
    gc.collect()
    assert not runtime.pinned
    assert pinned_empty(0, torch.device("cuda:0")).numel() == 0


def test_what_cannot_be_pinned(runtime: Runtime) -> None:
    runtime.code = 2
    with pytest.raises(zipserv.Error, match="1000 bytes of host memory could not be pinned: out of memory"):
        pinned_empty(1000, torch.device("cuda:0"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_copies_do_not_wait() -> None:
    tensor = pinned_empty(64 << 20, torch.device("cuda", 0))
    assert tensor.is_pinned()
    tensor.random_()
    target = torch.empty_like(tensor, device="cuda")
    torch.cuda._sleep(1_000_000_000)
    target.copy_(tensor, non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    assert not done.query(), "the copy waited on the host"
    assert torch.equal(target.cpu(), tensor)
