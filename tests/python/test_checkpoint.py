# SPDX-License-Identifier: Apache-2.0
"""save_file, load_file, open_file, FileWriter: round trips, shards, ties, what other readers see."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

import zipserv
from helpers import assert_same_bits, bits, weights
from zipserv import FileWriter, ZipTensor
from zipserv.checkpoint import SUFFIX

Values = dict[str, "torch.Tensor | ZipTensor"]


def mixed() -> Values:
    """Tensors of every item size, empty ones, odd lengths; compressed ones tiled, raw, of other shapes."""
    return {
        "bytes": torch.arange(7, dtype=torch.uint8),
        "flags": torch.tensor([True, False, True]),
        "a.weight": zipserv.compress(weights(190, 250)),
        "b.weight": zipserv.compress(weights(3, 64, 64, dtype=torch.float16)),
        "noise": zipserv.compress(torch.randint(-(2**15), 2**15, (3, 5), dtype=torch.int16).view(torch.bfloat16)),
        "a.bias": weights(190),
        "half": torch.randn(5).half(),
        "float": torch.randn(3, 3),
        "double": torch.randn(2).double(),
        "long": torch.tensor(5),
        "empty": torch.zeros(0, 4),
        "fp8": torch.zeros(3).to(torch.float8_e4m3fn),
        "complex": torch.randn(2, dtype=torch.complex64),
        "strided": torch.randn(6, 4).t()[::2],
        'Zeichen ü " \\ 漢': torch.ones(1),
    }


def assert_same(found: Values, expected: Values) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        other = found[name]
        assert type(other) is (ZipTensor if isinstance(value, ZipTensor) else torch.Tensor), name
        assert other.shape == value.shape and other.dtype == value.dtype, name
        if isinstance(value, ZipTensor) and isinstance(other, ZipTensor):
            assert torch.equal(value.blob, other.blob), name
            assert_same_bits(other.decompress(), value.decompress())
        elif isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor):
            assert torch.equal(other.reshape(-1).view(torch.uint8), value.contiguous().reshape(-1).view(torch.uint8)), name


def leftovers(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(".tmp")]


def test_round_trip(tmp_path: Path) -> None:
    tensors, path = mixed(), tmp_path / "model.safetensors"
    assert zipserv.save_file(tensors, path) == [path]
    assert_same(zipserv.load_file(path), tensors)
    assert_same(zipserv.load_file(str(path), verify=False), tensors)
    assert_same(zipserv.load_file(tmp_path), tensors)
    assert leftovers(tmp_path) == []


def test_the_safetensors_library_reads_it(tmp_path: Path) -> None:
    tensors, path = mixed(), tmp_path / "model.safetensors"
    zipserv.save_file(tensors, path, {"author": "someone", "format": "pt"})
    plain = safetensors.torch.load_file(path)
    for name, value in tensors.items():
        if isinstance(value, ZipTensor):
            assert torch.equal(plain[name + SUFFIX], value.blob) and name not in plain
        else:
            assert plain[name].shape == value.shape and plain[name].dtype == value.dtype
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["author"] == "someone" and file.metadata()["format"] == "pt" and file.metadata()["zipserv"] == "1"
        assert torch.equal(file.get_slice("a.weight" + SUFFIX)[:8], torch.tensor(list(b"ZIPSERV\0"), dtype=torch.uint8))


def test_it_reads_files_of_the_safetensors_library(tmp_path: Path) -> None:
    z = zipserv.compress(weights(64, 64))
    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"w" + SUFFIX: z.blob, "b": torch.ones(3)}, path)
    loaded = zipserv.load_file(path)
    assert set(loaded) == {"w", "b"} and isinstance(loaded["w"], ZipTensor)
    assert_same_bits(loaded["w"].decompress(), z.decompress())


def test_state_dicts_of_compressed_models(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.ReLU(), torch.nn.Linear(64, 128)).bfloat16()
    zipserv.compress_model(model)
    zipserv.save_file(model.state_dict(), tmp_path / "m.safetensors")
    loaded = zipserv.load_file(tmp_path / "m.safetensors")
    assert set(loaded) == {"0.weight", "0.bias", "2.weight", "2.bias"} and isinstance(loaded["0.weight"], ZipTensor)
    other = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.ReLU(), torch.nn.Linear(64, 128)).bfloat16()
    zipserv.prepare_model(other)
    other.load_state_dict(loaded)
    x = weights(3, 128)
    assert torch.equal(other(x), model(x))


def test_lazy_reading(tmp_path: Path) -> None:
    tensors, path = mixed(), tmp_path / "m.safetensors"
    zipserv.save_file(tensors, path, {"author": "someone"})
    with zipserv.open_file(path) as file:
        assert sorted(file.keys()) == sorted(tensors) == sorted(file) and len(file) == len(tensors)
        assert "a.weight" in file and "a.weight" + SUFFIX not in file and 5 not in file
        assert file.metadata() == {"author": "someone", "format": "pt", "zipserv": "1"}
        for name, value in tensors.items():
            info = file.info(name)
            assert (info.name, info.shape, info.dtype) == (name, tuple(value.shape), value.dtype)
            assert info.compressed == isinstance(value, ZipTensor) and info.file == path
            assert info.nbytes == (value.nbytes if isinstance(value, ZipTensor) else value.numel() * value.element_size())
        one = file["a.weight"]
        assert isinstance(one, ZipTensor)
        with pytest.raises(KeyError):
            file.get("nothing")
        assert str(path) in repr(file)
    assert_same_bits(one.decompress(), tensors["a.weight"].decompress())  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="closed"):
        file.get("a.weight")


def test_reading_one_tensor_maps_and_copies_nothing(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    zipserv.save_file({"w": zipserv.compress(weights(512, 512))}, path)
    with zipserv.open_file(path, verify=False) as file:
        first, second = file["w"], file["w"]
    assert isinstance(first, ZipTensor) and isinstance(second, ZipTensor)
    with open("/proc/self/maps") as maps:
        assert str(path) in maps.read()
    assert first.blob.data_ptr() == second.blob.data_ptr()  # the same pages


def test_a_mapped_tensor_survives_a_new_file_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    weight = weights(190, 250)
    zipserv.save_file({"w": zipserv.compress(weight)}, path)
    old = zipserv.load_file(path)["w"]
    zipserv.save_file({"w": zipserv.compress(weights(64, 64))}, path)
    assert isinstance(old, ZipTensor)
    assert_same_bits(old.decompress(), weight)
    new = zipserv.load_file(path)
    zipserv.save_file(new, path)  # onto the file that is mapped
    assert_same(zipserv.load_file(path), new)


def test_tied_tensors_are_stored_once(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    z, plain = zipserv.compress(weights(190, 250)), torch.randn(1000)
    tensors: Values = {"a": z, "b": z, "c": ZipTensor(z.blob), "x": plain, "y": plain, "view": plain[:10]}
    zipserv.save_file(tensors, path)
    assert path.stat().st_size < z.nbytes + plain.nbytes + 10_000
    with zipserv.open_file(path) as file:
        assert sorted(file.keys()) == sorted(tensors) and file.tied() == {"b": "a", "c": "a", "y": "x"}
        assert file.info("b").compressed and file.info("y").shape == (1000,)
        assert file["b"].shape == (190, 250)
    loaded = zipserv.load_file(path)
    assert_same(loaded, tensors)
    assert loaded["a"] is loaded["b"] is loaded["c"] and loaded["x"] is loaded["y"]


@pytest.mark.parametrize("size", [40_000, "100KB", "0.1 MiB"])
def test_shards(size: int | str, tmp_path: Path) -> None:
    tensors: Values = {f"layers.{i}.weight": zipserv.compress(weights(128, 192)) for i in range(7)}
    tensors.update({f"layers.{i}.bias": weights(128) for i in range(7)})
    tensors["tied"] = tensors["layers.3.weight"]
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"an older single file")
    files = zipserv.save_file(tensors, path, {"author": "someone"}, max_shard_size=size)
    count = len(files) - 1
    assert count >= 2 and files[-1].name == "model.safetensors.index.json"
    assert [file.name for file in files[:-1]] == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    assert not path.exists() and leftovers(tmp_path) == []
    index = json.loads(files[-1].read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files[:-1]}
    assert "layers.0.weight" + SUFFIX in index["weight_map"]
    assert index["metadata"]["total_size"] == sum(
        t.numel() * t.element_size() for file in files[:-1] for t in safetensors.torch.load_file(file).values()
    )
    for place in (tmp_path, files[-1], path):
        assert_same(zipserv.load_file(place), tensors)
    with zipserv.open_file(tmp_path) as file:
        assert file.metadata()["author"] == "someone" and len(file.files) == count
        assert file.info("layers.6.weight").file.name == index["weight_map"]["layers.6.weight" + SUFFIX]


def test_one_shard_is_a_plain_file(tmp_path: Path) -> None:
    assert zipserv.save_file({"w": weights(4)}, tmp_path / "m.safetensors", max_shard_size="5GB") == [tmp_path / "m.safetensors"]


def test_a_folder_of_files_without_an_index(tmp_path: Path) -> None:
    zipserv.save_file({"a": weights(4)}, tmp_path / "one.safetensors")
    zipserv.save_file({"b": weights(4)}, tmp_path / "two.safetensors")
    assert set(zipserv.load_file(tmp_path)) == {"a", "b"}
    zipserv.save_file({"a": weights(4)}, tmp_path / "three.safetensors")
    with pytest.raises(zipserv.Error, match="stored twice"):
        zipserv.load_file(tmp_path)


def test_each_tensor_starts_where_its_dtype_can_be_mapped(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    zipserv.save_file(mixed(), path)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert (8 + length) % 64 == 0
    header = json.loads(data[8 : 8 + length])
    sizes = {"F64": 8, "I64": 8, "C64": 8, "F32": 4, "F16": 2, "BF16": 2}
    for name, entry in header.items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % sizes.get(entry["dtype"], 1) == 0, name


def test_the_same_input_gives_the_same_file(tmp_path: Path) -> None:
    tensors = mixed()
    zipserv.save_file(tensors, tmp_path / "a.safetensors", {"x": "y"})
    zipserv.save_file(tensors, tmp_path / "b.safetensors", {"x": "y"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_metadata_is_kept_when_a_file_is_written_anew(tmp_path: Path) -> None:
    zipserv.save_file({"w": weights(4)}, tmp_path / "a.safetensors", {"author": "ü", "format": "pt"})
    with zipserv.open_file(tmp_path / "a.safetensors") as file:
        zipserv.save_file({"v": weights(5)}, tmp_path / "b.safetensors", file.metadata())
    with zipserv.open_file(tmp_path / "b.safetensors") as file:
        assert file.metadata() == {"author": "ü", "format": "pt", "zipserv": "1"}
        assert file.keys() == ["v"]


# --- the streaming writer -------------------------------------------------------------------------------------------


def test_writer(tmp_path: Path) -> None:
    tensors, path = mixed(), tmp_path / "m.safetensors"
    order = sorted(tensors, key=lambda name: -(1 if isinstance(tensors[name], ZipTensor) else tensors[name].dtype.itemsize))
    with FileWriter(path, {"author": "someone"}, header_room=FileWriter.room_for(tensors)) as writer:
        for name in order:
            writer.add(name, tensors[name])
            assert not path.exists()
        assert len(writer.keys) == len(tensors) and writer.nbytes > 0
    assert_same(zipserv.load_file(path), tensors)


def test_room_for_is_always_enough(tmp_path: Path) -> None:
    names = ['"' * 50 + str(i) for i in range(20)] + ["漢字" * 30 + str(i) for i in range(20)] + ["a", "b"]
    shape = (1,) * 8
    with FileWriter(tmp_path / "m.safetensors", header_room=FileWriter.room_for([*names, *(n + "t" for n in names)])) as writer:
        for name in names:
            writer.add(name, weights(*shape))
            writer.tie(name + "t", name)
    assert len(zipserv.load_file(tmp_path / "m.safetensors")) == 2 * len(names)


def test_writer_refuses(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    z = zipserv.compress(weights(64, 64))
    with FileWriter(path) as writer:
        writer.add("w", z)
        for name, value in (("w", z), ("w", weights(2)), ("w" + SUFFIX, z.blob), ("__metadata__", weights(2))):
            with pytest.raises(ValueError, match="already"):
                writer.add(name, value)
        writer.add("odd", torch.zeros(3, dtype=torch.uint8))
        with pytest.raises(ValueError, match="larger items first"):
            writer.add("v", torch.zeros(2))
        with pytest.raises(zipserv.Error):
            writer.add("bad" + SUFFIX, torch.zeros(300, dtype=torch.uint8))
        for bad in ([1.0], torch.eye(2).to_sparse(), torch.zeros(2, dtype=torch.complex128)):
            with pytest.raises(TypeError):
                writer.add("bad", bad)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="meta"):
            writer.add("bad", torch.zeros(2, dtype=torch.uint8, device="meta"))
        with pytest.raises(ValueError, match="tie"):
            writer.tie("x", "nothing")
    assert set(zipserv.load_file(path)) == {"w", "odd"}


def test_a_header_larger_than_its_room(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="larger header_room"), FileWriter(path, header_room=10) as writer:
        writer.add("w", weights(4))
    assert path.read_bytes() == b"old" and leftovers(tmp_path) == []


def test_wrong_arguments(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    for tensors, metadata, size, error in (
        ([weights(2)], None, None, TypeError),
        ({1: weights(2)}, None, None, TypeError),
        ({"w": "text"}, None, None, TypeError),
        ({"w": weights(2)}, {"n": 1}, None, TypeError),
        ({"w": weights(2)}, None, "much", ValueError),
        ({"w": weights(2)}, None, 0, ValueError),
    ):
        with pytest.raises(error):
            zipserv.save_file(tensors, path, metadata, max_shard_size=size)  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []
    zipserv.save_file({}, path)
    assert zipserv.load_file(path) == {}


def test_bits_of_a_loaded_layer_equal_the_original(tmp_path: Path) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(256, 256)
    zipserv.save_file({"w": zipserv.compress(every)}, tmp_path / "m.safetensors")
    loaded = zipserv.load_file(tmp_path / "m.safetensors")["w"]
    assert torch.equal(bits(loaded.decompress()), bits(every))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("device", "kind", "said"),
    [
        ("x", ValueError, "'x' is no device; 'cpu', 'cuda' and 'cuda:1' are"),
        ("cuda:x", ValueError, "is no device"),
        ("mps", ValueError, "zipserv runs on 'cpu' and 'cuda'"),
        (None, TypeError, "not NoneType"),
        (1.5, TypeError, "not float"),
        (True, TypeError, "not bool"),
    ],
)
def test_devices_that_are_none(tmp_path: Path, device: Any, kind: type[Exception], said: str) -> None:
    zipserv.save_file({"w": torch.ones(3)}, tmp_path / "m.safetensors")
    for call in (zipserv.load_file, zipserv.open_file):
        with pytest.raises(kind, match=said):
            call(tmp_path / "m.safetensors", device=device)
    with pytest.raises(kind, match=said):
        zipserv.load_model(torch.nn.Linear(3, 3), tmp_path / "m.safetensors", device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", 0])
def test_no_gpu(tmp_path: Path, device: Any) -> None:
    zipserv.save_file({"w": torch.ones(3)}, tmp_path / "m.safetensors")
    with pytest.raises(zipserv.Error, match="torch sees no GPU here; `zipserv doctor`"):
        zipserv.load_file(tmp_path, device=device)


def test_the_gpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from zipserv import devices

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert devices.named("cuda") == torch.device("cuda:1") and devices.named(0) == torch.device("cuda:0") == devices.named("cuda:0")
    with pytest.raises(ValueError, match="'cuda:2': there are 2 GPUs here"):
        devices.named("cuda:2")
