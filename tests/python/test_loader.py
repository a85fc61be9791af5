# SPDX-License-Identifier: Apache-2.0
"""Loading through the ring of buffers: on the CPU its threads, pieces and errors, on GPUs its streams too."""

from __future__ import annotations

import json
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import zipserv
from helpers import weights
from zipserv import ZipTensor, checkpoint, loader
from zipserv.checkpoint import SUFFIX
from zipserv.loader import Loader, Part


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every tensor is many pieces, more than the ring holds."""
    monkeypatch.setattr(loader, "CHUNK", 4099)
    yield


@pytest.fixture
def staged(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU as if it were a GPU."""
    monkeypatch.setattr(checkpoint, "_is_staged", lambda device: True)


def tensors() -> dict[str, torch.Tensor | ZipTensor]:
    return {
        "a.weight": zipserv.compress(weights(190, 250)),
        "b.weight": zipserv.compress(weights(64, 64, 3)),
        "noise": zipserv.compress(torch.randint(-(2**15), 2**15, (3, 5), dtype=torch.int16).view(torch.bfloat16)),
        "bias": torch.randn(9000),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False, True]),
        "complex": torch.randn(2, 3, dtype=torch.complex64),
        "fp8": torch.zeros(3).to(torch.float8_e4m3fn),
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any], device: str = "cpu") -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        other = found[name]
        assert type(other) is type(value) and other.shape == value.shape and other.dtype == value.dtype, name
        assert other.device == torch.device(device), name
        a, b = (t.blob if isinstance(t, ZipTensor) else t.reshape(-1).view(torch.uint8) for t in (other, value))
        assert torch.equal(a.cpu(), b), name


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("shard", [None, 30_000])
def test_the_same_as_from_mapped_pages(tmp_path: Path, staged: None, verify: bool, shard: int | None) -> None:
    expected = tensors()
    expected["tied"] = expected["a.weight"]
    zipserv.save_file(expected, tmp_path / "m.safetensors", max_shard_size=shard)
    with zipserv.open_file(tmp_path, verify=verify) as file:
        loaded = file.load()
        assert_same(loaded, expected)
        assert loaded["tied"] is loaded["a.weight"]
        assert_same({name: file.get(name) for name in expected}, expected)
    for file_ in tmp_path.glob("*.safetensors"):
        file_.write_bytes(bytes(file_.stat().st_size))
    assert_same(loaded, expected)  # memory of their own, not pages of the file


def test_no_thread_and_no_file_stays_open(tmp_path: Path, staged: None) -> None:
    zipserv.save_file(tensors(), tmp_path / "m.safetensors")
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    zipserv.load_file(tmp_path)
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before
    (tmp_path / "m.safetensors").write_bytes(b"nonsense")
    with pytest.raises(zipserv.Error):
        zipserv.load_file(tmp_path)
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before


def places(path: Path) -> dict[str, tuple[int, int]]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    return {name: tuple(8 + length + at for at in entry["data_offsets"]) for name, entry in header.items() if name != "__metadata__"}


@pytest.mark.parametrize("key", ["a.weight" + SUFFIX, "noise" + SUFFIX, "bias", "flags"])
def test_a_damaged_tensor_is_named_and_nothing_is_returned(tmp_path: Path, staged: None, key: str) -> None:
    path = tmp_path / "m.safetensors"
    zipserv.save_file(tensors(), path)
    begin, end = places(path)[key]
    data = bytearray(path.read_bytes())
    data[end - 1] ^= 0x40
    path.write_bytes(data)
    with pytest.raises(zipserv.Error, match=f"m.safetensors: '{key.removesuffix(SUFFIX)}': "):
        zipserv.load_file(path)
    with zipserv.open_file(path) as file:  # the others are well
        assert file["scalar"] == 3
        with pytest.raises(zipserv.Error, match=key.removesuffix(SUFFIX)):
            file.get(key.removesuffix(SUFFIX))


def test_a_file_cut_short_while_it_is_read(tmp_path: Path, staged: None) -> None:
    path = tmp_path / "m.safetensors"
    zipserv.save_file({"w": zipserv.compress(weights(256, 256)), "bias": torch.randn(9000)}, path)
    with zipserv.open_file(path) as file:
        os.truncate(path, places(path)["w" + SUFFIX][0] + 5000)
        with pytest.raises(zipserv.Error, match="'w': the file was cut short"):
            file.load()


def test_a_file_replaced_while_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    zipserv.save_file({"w": torch.zeros(4)}, path)
    real = checkpoint.safe_open

    def replaced(*args: Any, **kwargs: Any) -> Any:
        zipserv.save_file({"w": torch.ones(4)}, path)
        return real(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "safe_open", replaced)
    with pytest.raises(zipserv.Error, match="replaced while it was opened"):
        zipserv.load_file(path)


# --- the loader itself ------------------------------------------------------------------------------------------------


def part(path: Path, target: torch.Tensor, offset: int = 0) -> tuple[Part, int]:
    file = os.open(path, os.O_RDONLY)
    return Part(path.name, file, offset, target), file


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_parts_are_checked_in_order_once_they_are_read(tmp_path: Path, threads: int) -> None:
    data = torch.randint(0, 256, (100_000,), dtype=torch.uint8)
    (tmp_path / "f").write_bytes(data.numpy().tobytes())
    sizes = [0, 1, 4099, 4100, 50_000, 0, 30_000]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    targets = [torch.empty(size, dtype=torch.uint8) for size in sizes]
    parts, files = zip(*(part(tmp_path / "f", target, start) for target, start in zip(targets, starts, strict=True)), strict=True)
    seen = []

    def check(number: int) -> None:
        seen.append(number)
        assert torch.equal(targets[number], data[starts[number] : starts[number] + sizes[number]])

    one = Loader(torch.device("cpu"), threads)
    for _ in range(3):
        for target in targets:
            target.zero_()
        one.load(parts, check)
    assert seen == 3 * list(range(len(sizes)))
    with torch.inference_mode():
        own = torch.empty(500, dtype=torch.uint8)
        one.load([Part("f", files[0], 0, own)], lambda number: None)
        assert torch.equal(own, data[:500])
    one.close()
    for file in files:
        os.close(file)


def test_what_a_check_raises_stops_the_readers(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(1_000_000))
    target = torch.full((1_000_000,), 7, dtype=torch.uint8)
    file = os.open(tmp_path / "f", os.O_RDONLY)
    one = Loader(torch.device("cpu"), 2)

    def check(number: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        one.load([Part("first", file, 0, target[:1]), Part("rest", file, 1, target[1:])], check)
    before = target.clone()
    one.close()
    assert torch.equal(target, before)  # nobody writes any more
    with pytest.raises(zipserv.Error, match="beyond: the file was cut short"):
        one.load([Part("beyond", file, 999_999, target[:2])], lambda number: None)
    os.close(file)
    with pytest.raises(OSError):
        one.load([Part("closed", file, 0, target[:2])], lambda number: None)
    one.close()


# --- GPUs -------------------------------------------------------------------------------------------------------------

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("index", [0, 1])
def test_to_a_gpu(tmp_path: Path, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if index >= torch.cuda.device_count():
        pytest.skip("needs two GPUs")
    device = f"cuda:{index}"
    expected = tensors()
    expected["large"] = zipserv.compress(weights(2048, 2048))
    zipserv.save_file(expected, tmp_path / "m.safetensors")
    for chunk in (4099, 1 << 20):
        monkeypatch.setattr(loader, "CHUNK", chunk)
        assert_same(zipserv.load_file(tmp_path, device=device), expected, device)
    side = torch.cuda.Stream(device)
    with torch.cuda.stream(side), torch.inference_mode():
        assert_same(zipserv.load_file(tmp_path, device=device), expected, device)
    with zipserv.open_file(tmp_path, device=device) as file:
        assert_same({name: file.get(name) for name in expected}, expected, device)
    x = weights(3, 2048).to(device)
    y = zipserv.linear(x, zipserv.load_file(tmp_path, device=device)["large"])
    torch.testing.assert_close(y, torch.nn.functional.linear(x, expected["large"].decompress().to(device)), rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@GPU
def test_loading_waits_for_no_other_work_and_takes_the_ring_only(tmp_path: Path) -> None:
    zipserv.save_file({"w": zipserv.compress(weights(2048, 2048))}, tmp_path / "m.safetensors")
    zipserv.load_file(tmp_path, device="cuda")
    before = torch.cuda.memory_allocated()
    other = torch.cuda.Stream()
    with torch.cuda.stream(other):
        torch.cuda._sleep(2_000_000_000)
        slept = torch.cuda.Event()
        slept.record()
    loaded = zipserv.load_file(tmp_path, device="cuda")["w"]
    assert not slept.query(), "loading waited for the whole device"
    assert isinstance(loaded, ZipTensor)
    assert torch.cuda.memory_allocated() - before <= loaded.nbytes + 512
    torch.cuda.synchronize()
