# SPDX-License-Identifier: Apache-2.0
"""The check by decoding and compressing again; here the CPU does the work of the GPU's two kernels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import zipserv
from helpers import flipped, weights
from zipserv import ops, proof
from zipserv.proof import Proofs


class OnGpu(torch.Tensor):
    is_cuda = True


def on_gpu(blob: torch.Tensor) -> torch.Tensor:
    return blob.as_subclass(OnGpu)


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def decompress(blob: torch.Tensor, m: int, k: int, code: int, row0: int, out: torch.Tensor) -> None:
        torch.ops.zipserv.decompress_out(blob.as_subclass(torch.Tensor), m, k, code, row0, out)

    def compress_into(weight: torch.Tensor, m: int, k: int, shape: tuple[int, ...], blob: torch.Tensor) -> int:
        made = zipserv.compress(weight.view(shape))
        if made.is_raw:
            return 0
        if made.nbytes <= blob.numel():
            blob[: made.nbytes] = made.blob
        return made.nbytes

    monkeypatch.setattr(ops, "cuda_module", lambda: SimpleNamespace(decompress=decompress, compress_into=compress_into))
    monkeypatch.setattr(proof, "LEAST_BYTES", 5000)


def test_what_is_as_the_compressor_writes_it_is_right() -> None:
    proofs = Proofs()
    for name, shape in (("a", (190, 250)), ("b", (64, 64)), ("c", (3, 64, 128))):
        made = zipserv.compress(weights(*shape))
        assert proofs.begin(name, on_gpu(made.blob), made.header)
    assert proofs.open_questions() == []
    assert Proofs().open_questions() == []


def test_what_differs_is_named() -> None:
    made = zipserv.compress(weights(190, 250))
    sign = flipped(made.blob, 2000, 7)  # a weight is another, and the header's checksum is that of the old one
    other = zipserv.compress(weights(190, 250, sigma=3.0))
    proofs = Proofs()
    for name, blob in (("right", made.blob), ("sign", sign), ("right too", other.blob)):
        assert proofs.begin(name, on_gpu(blob), made.header)
    assert proofs.open_questions() == ["sign"]


def test_a_blob_of_another_length_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    made, proofs = zipserv.compress(weights(190, 250)), Proofs()
    kernels = ops.cuda_module()
    monkeypatch.setattr(ops, "cuda_module", lambda: kernels)
    for name, found in (("longer", made.nbytes + 16), ("shorter", made.nbytes - 16), ("raw", 0)):
        monkeypatch.setattr(kernels, "compress_into", lambda *args, found=found: found)
        assert proofs.begin(name, on_gpu(made.blob), made.header)
    assert proofs.open_questions() == ["longer", "shorter", "raw"]


def test_what_is_left_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    made, half = zipserv.compress(weights(190, 250)), zipserv.compress(weights(190, 250, dtype=torch.float16))
    small = zipserv.compress(weights(16, 16))
    noise = zipserv.compress(torch.randint(-(2**15), 2**15, (64, 64), dtype=torch.int16).view(torch.bfloat16))
    proofs = Proofs()
    assert not proofs.begin("on the CPU", made.blob, made.header)
    for one in (half, small, noise):
        assert not proofs.begin("", on_gpu(one.blob), one.header)
    monkeypatch.setattr(proof, "MOST_WEIGHT_BYTES", 2 * 190 * 250 - 1)
    assert not proofs.begin("too large", on_gpu(made.blob), made.header)
    monkeypatch.undo()
    monkeypatch.setattr(proof, "LEAST_BYTES", 5000)

    def fails(*args: Any) -> None:
        raise error

    monkeypatch.setattr(ops, "cuda_module", lambda: SimpleNamespace(decompress=fails))
    for error in (torch.OutOfMemoryError(), zipserv.Error("no NVRTC")):
        assert proofs.takes(on_gpu(made.blob), made.header)
        assert not proofs.begin(str(error), on_gpu(made.blob), made.header)
    assert not proofs.takes(on_gpu(made.blob), made.header), "without kernels none is tried again"
    assert proofs.open_questions() == []
