# SPDX-License-Identifier: Apache-2.0
"""Loading to GPUs. Without one: over a driver that only pretends and has its memory on the host; files, threads, pieces and errors are real."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import zipserv
from helpers import weights
from zipserv import ZipTensor, proof

TESTS = Path(__file__).parent

PRELUDE = """
import json, os, struct, sys, threading, pathlib
sys.path.insert(0, TESTS)
import torch, zipserv
from zipserv import ZipTensor, _zipserv, checkpoint, loader
from zipserv.loader import Part, load
from test_loader import assert_same, tensors
folder = pathlib.Path(FOLDER)
path = folder / "model.safetensors"
cpu = torch.device("cpu")
checkpoint._is_staged = lambda device: True  # host memory is the memory of the device that pretends
def raises(kind, words, call, *args):
    try: call(*args)
    except kind as error: assert all(w in str(error) for w in words), str(error)
    else: raise AssertionError(f"no {kind}")
def places(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    return {name: tuple(8 + length + at for at in entry["data_offsets"]) for name, entry in header.items() if name != "__metadata__"}
def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(data)
"""


def tensors() -> dict[str, torch.Tensor | ZipTensor]:
    torch.manual_seed(0)
    return {
        "a.weight": zipserv.compress(weights(190, 250)),
        "b.weight": zipserv.compress(weights(64, 64, 3)),
        "half.weight": zipserv.compress(weights(64, 64, dtype=torch.float16)),
        "noise": zipserv.compress(torch.randint(-(2**15), 2**15, (3, 5), dtype=torch.int16).view(torch.bfloat16)),
        "large": zipserv.compress(weights(2048, 2560)),  # more than a piece
        "bias": torch.randn(9000),
        "wide": torch.randn(2_500_000),  # pieces of its own too
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


@pytest.fixture
def run(fake_driver: Path, tmp_path: Path) -> Callable[..., str]:
    def run(code: str, **env: str) -> str:
        places = f"TESTS, FOLDER = {str(TESTS)!r}, {str(tmp_path)!r}\n"
        full = {**os.environ, "ZIPSERV_LIBCUDA": str(fake_driver), **env}
        done = subprocess.run([sys.executable, "-c", places + PRELUDE + code], env=full, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_same_as_from_mapped_pages(run: Callable[..., str]) -> None:
    run("""
expected = tensors()
expected["tied"] = expected["a.weight"]
for shard in (None, 30_000):
    for old in folder.glob("*.safetensors*"): old.unlink()
    zipserv.save_file(expected, path, max_shard_size=shard)
    for verify in (True, False):
        with zipserv.open_file(folder, verify=verify) as file:
            loaded = file.load()
            assert_same(loaded, expected)
            assert loaded["tied"] is loaded["a.weight"]
            assert_same({name: file.get(name) for name in expected}, expected)
    with torch.inference_mode():
        assert_same(zipserv.load_file(folder), expected)
    for one in folder.glob("*.safetensors"):
        one.write_bytes(bytes(one.stat().st_size))
    assert_same(loaded, expected)  # memory of their own, not pages of the file
""")


def test_a_damaged_tensor_is_named_and_nothing_is_returned(run: Callable[..., str]) -> None:
    run("""
expected = tensors()
zipserv.save_file(expected, path)
good = path.read_bytes()
for key in ("a.weight_zipserv", "noise_zipserv", "half.weight_zipserv", "large_zipserv", "bias", "wide", "flags"):
    name = key.removesuffix("_zipserv")
    path.write_bytes(good)
    flip(path, places(path)[key][1] - 1)
    raises(zipserv.Error, [f"model.safetensors: '{name}': "], zipserv.load_file, path)
    with zipserv.open_file(path) as file:  # the others are well
        assert file["scalar"] == 3
        raises(zipserv.Error, [repr(name)], file.get, name)
path.write_bytes(good)
flip(path, places(path)["large_zipserv"][0] + 4_000_000)
raises(zipserv.Error, ["'large': invalid ZipServ blob: the weights' checksum"], zipserv.load_file, path)
path.write_bytes(good)
assert_same(zipserv.load_file(path), expected)  # the device is as good as before
""")


KERNELS = """
import random
from types import SimpleNamespace
from zipserv import ops, proof
unsafe = []
def decompress(blob, m, k, code, row0, out):
    try: _zipserv.check_lists(blob.data_ptr(), blob.numel())
    except zipserv.Error: unsafe.append(blob)  # a GPU would read and write anywhere
    torch.ops.zipserv.decompress_out(blob, m, k, code, row0, out)
def compress_into(weight, m, k, shape, blob):
    made = zipserv.compress(weight.view(shape))
    if not made.is_raw and made.nbytes <= blob.numel(): blob[: made.nbytes] = made.blob
    return 0 if made.is_raw else made.nbytes
kernels = SimpleNamespace(decompress=decompress, compress_into=compress_into)
ops.cuda_module = lambda: kernels
proof.LEAST_BYTES = 5000
proof.Proofs.takes = lambda self, blob, header: self._able and blob.numel() >= 5000 and not header.raw and header.dtype is torch.bfloat16
proved, begin = [], proof.Proofs.begin
def counted(self, name, *args):
    done = begin(self, name, *args)
    if done: proved.append(name)
    return done
proof.Proofs.begin = counted
expected = tensors()
zipserv.save_file(expected, path)
good = path.read_bytes()
"""


def test_the_device_checks_what_it_got(run: Callable[..., str]) -> None:
    """The CPU does the work of the two kernels."""
    run(
        KERNELS
        + """
for verify in (True, False):
    assert_same(zipserv.load_file(path, verify=verify), expected)
assert sorted(proved) == sorted(2 * ["a.weight", "b.weight", "large"])
random.seed(1)
for key in ("a.weight_zipserv", "large_zipserv"):
    first, end = places(path)[key]
    ranges = 5 * [(first, first + 128)] + 5 * [(first + 128, first + 4000)] + 10 * [(first, end)] + [(end - 1, end)]
    for at in (random.randrange(*bounds) for bounds in ranges):
        path.write_bytes(good)
        flip(path, at)
        raises(zipserv.Error, [f"model.safetensors: '{key.removesuffix('_zipserv')}': "], zipserv.load_file, path)
assert not unsafe
path.write_bytes(good)
flip(path, places(path)["large_zipserv"][0] + 4_000_000)  # a weight's bits, which only the checksum covers
assert not torch.equal(zipserv.load_file(path, verify=False)["large"].blob, expected["large"].blob)
"""
    )


def test_the_cpu_checks_where_the_device_has_no_kernels(run: Callable[..., str]) -> None:
    run(
        KERNELS
        + """
def fails(*args):
    raise zipserv.Error("no compiler")
kernels.decompress = fails
assert_same(zipserv.load_file(path), expected)
assert proved == []
flip(path, places(path)["large_zipserv"][0] + 4_000_000)
raises(zipserv.Error, ["'large': invalid ZipServ blob: the weights' checksum"], zipserv.load_file, path)
"""
    )


def test_a_file_cut_short_while_it_is_read(run: Callable[..., str]) -> None:
    run("""
zipserv.save_file({"large": tensors()["large"], "bias": torch.randn(9000)}, path)
for at in (5000, 5_000_000):
    zipserv.save_file({"large": tensors()["large"], "bias": torch.randn(9000)}, path)
    with zipserv.open_file(path) as file:
        os.truncate(path, places(path)["large_zipserv"][0] + at)
        raises(zipserv.Error, ["model.safetensors: 'large': the file was cut short"], file.load)
""")


def test_no_file_and_no_memory_is_left(run: Callable[..., str]) -> None:
    run("""
zipserv.save_file(tensors(), path)
zipserv.load_file(path)
before = os.listdir("/proc/self/fd")
for _ in range(5):
    zipserv.load_file(path)
path.write_bytes(b"nonsense")
raises(zipserv.Error, [], zipserv.load_file, path)
assert len(os.listdir("/proc/self/fd")) == len(before)
""")


def test_parts_are_checked_in_order_once_they_are_read(run: Callable[..., str]) -> None:
    run("""
data = torch.randint(0, 256, (30_000_000,), dtype=torch.uint8)
path.write_bytes(data.numpy().tobytes())
file = os.open(path, os.O_RDONLY)
sizes = [0, 1, 4 << 20, (4 << 20) + 1, 9_000_000, 0, 3_000_000]
starts = [sum(sizes[:i]) for i in range(len(sizes))]
for lanes in (1, 2, 7, None):
    targets = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
    seen = []
    def check(number):
        seen.append(number)
        assert torch.equal(targets[number], data[starts[number] : starts[number] + sizes[number]])
    load([Part("f", file, start, target) for start, target in zip(starts, targets)], cpu, check, lanes)
    assert seen == list(range(len(sizes)))
load([], cpu, check)

# What a check raises stops the readers.
target = torch.full((29_000_000,), 7, dtype=torch.uint8)
def stop(number): raise KeyboardInterrupt
raises(KeyboardInterrupt, [], load, [Part("first", file, 0, target[:1]), Part("rest", file, 1, target[1:])], cpu, stop)
before = target.clone()
assert torch.equal(target, before)

parts = [Part("f", file, 0, target[:9]), Part("beyond", file, 29_999_999, target[:2])]
raises(zipserv.Error, ["beyond: the file was cut short"], load, parts, cpu, id)
os.close(file)
raises(zipserv.Error, ["closed: reading: bad file descriptor"], load, [Part("closed", file, 0, target[:2])], cpu, id)
raises(ValueError, ["1 to 16 lanes"], load, [], cpu, id, 17)
raises(ValueError, ["load 999 is not known"], _zipserv.cuda_load_wait, 999, 0, 0)

# Two loads at once: one after the other.
file = os.open(path, os.O_RDONLY)
def work(target): load([Part("f", file, 0, target)], cpu, lambda number: None)
targets = [torch.zeros(20_000_000, dtype=torch.uint8) for _ in range(4)]
threads = [threading.Thread(target=work, args=(target,)) for target in targets]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert all(torch.equal(target, data[:20_000_000]) for target in targets)
""")


@pytest.mark.parametrize("call", ["cuMemHostAlloc", "cuEventCreate", "cuMemcpyHtoDAsync_v2", "cuEventRecord", "cuEventSynchronize"])
def test_a_device_that_fails(run: Callable[..., str], call: str) -> None:
    run("""
zipserv.save_file({"large": tensors()["large"]}, path)
assert loader.serves(cpu)
import ctypes
fake = ctypes.CDLL(os.environ["ZIPSERV_LIBCUDA"])
call = os.environ["CALL"]
fake.fake_fail(call.encode(), 700, 1)
raises(zipserv.Error, [call, "700"], zipserv.load_file, path)
fake.fake_reset()
assert_same(zipserv.load_file(path), {"large": tensors()["large"]})
""", CALL=call)


def test_a_file_replaced_while_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zipserv import checkpoint

    path = tmp_path / "m.safetensors"
    zipserv.save_file({"w": torch.zeros(4)}, path)
    real = checkpoint.safe_open

    def replaced(*args: Any, **kwargs: Any) -> Any:
        zipserv.save_file({"w": torch.ones(4)}, path)
        return real(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "safe_open", replaced)
    with pytest.raises(zipserv.Error, match="replaced while it was opened"):
        zipserv.load_file(path)


# --- GPUs -------------------------------------------------------------------------------------------------------------

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(params=["cpu", "gpu"])
def checked_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        monkeypatch.setattr(proof, "LEAST_BYTES", 1 << 60)
    return str(request.param)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("index", [0, 1])
def test_to_a_gpu(tmp_path: Path, index: int, checked_by: str) -> None:
    if index >= torch.cuda.device_count():
        pytest.skip("needs two GPUs")
    device = f"cuda:{index}"
    expected = tensors()
    zipserv.save_file(expected, tmp_path / "m.safetensors")
    for verify in (True, False):
        assert_same(zipserv.load_file(tmp_path, device=device, verify=verify), expected, device)
    side = torch.cuda.Stream(device)
    with torch.cuda.stream(side), torch.inference_mode():
        assert_same(zipserv.load_file(tmp_path, device=device), expected, device)
    with zipserv.open_file(tmp_path, device=device) as file:
        assert_same({name: file.get(name) for name in expected}, expected, device)
    x = weights(3, 2560).to(device)
    large = expected["large"]
    assert isinstance(large, ZipTensor)
    y = zipserv.linear(x, zipserv.load_file(tmp_path, device=device)["large"])
    torch.testing.assert_close(y, torch.nn.functional.linear(x, large.decompress().to(device)), rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize(("place", "structure"), [(200, True), (3_000_000, False), (7_000_000, False), (-3, True)])
def test_damage_is_found(tmp_path: Path, place: int, structure: bool, checked_by: str) -> None:
    """In a header of a tile or behind a list, and in the weights' own bits, which only their checksum covers."""
    path = tmp_path / "m.safetensors"
    large = tensors()["large"]
    assert isinstance(large, ZipTensor)
    zipserv.save_file({"large": large, "bias": torch.zeros(3)}, path)
    with zipserv.open_file(path) as file:
        begin = file._place("large")[1]
    data = bytearray(path.read_bytes())
    data[begin + place if place > 0 else begin + large.nbytes + place] ^= 1
    path.write_bytes(data)
    with pytest.raises(zipserv.Error, match="'large'"):
        zipserv.load_file(path, device="cuda")
    if structure:  # a decoder relies on it, so it is looked at whatever is asked for
        with pytest.raises(zipserv.Error, match="'large'"):
            zipserv.load_file(path, verify=False)
    else:
        assert zipserv.load_file(path, verify=False)["bias"].shape == (3,)


@pytest.mark.gpu
@GPU
def test_a_blob_that_another_program_made_is_the_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Valid, but not as the compressor here writes it."""
    from zipserv.proof import Proofs

    expected = tensors()
    zipserv.save_file(expected, tmp_path / "m.safetensors")
    monkeypatch.setattr(Proofs, "open_questions", lambda self: [*self._others, *self._names])
    assert_same(zipserv.load_file(tmp_path, device="cuda"), expected, "cuda:0")


@pytest.mark.gpu
@GPU
def test_loading_waits_for_no_other_work_and_leaves_nothing(tmp_path: Path) -> None:
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
