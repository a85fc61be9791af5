# SPDX-License-Identifier: Apache-2.0
"""Damaged and hostile files, full disks, read-only targets: a clear error, and the old file as it was."""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import zipserv
from helpers import weights
from zipserv.checkpoint import SUFFIX
from zipserv.container import HEADER_KEY, header_digest


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "model.safetensors"
    zipserv.save_file({"w": zipserv.compress(weights(190, 250)), "bias": torch.randn(50)}, file)
    return file


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(path: Path, header: dict[str, Any], payload: bytes) -> None:
    """A file of these; a header that says it is sealed is sealed anew, so that what else is wrong with it comes up."""
    metadata = header.get("__metadata__", {})
    if HEADER_KEY in metadata:
        header = {**header, "__metadata__": {**metadata, HEADER_KEY: header_digest(header)}}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + payload)


def test_a_plain_tensor_without_its_checksum_is_noticed(path: Path) -> None:
    header, payload = split(path)
    renamed = dict(header)
    renamed["bjas"] = renamed.pop("bias")
    without = {**header, "__metadata__": {k: v for k, v in header["__metadata__"].items() if k != "zipserv.checksums"}}
    for damaged in (renamed, without):
        join(path, damaged, payload)
        with pytest.raises(zipserv.Error, match="no checksum"):
            zipserv.load_file(path)
        assert len(zipserv.load_file(path, verify=False)) == 2


def parsed(data: bytes) -> Any:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length])


def test_every_flipped_byte_of_the_header_is_noticed(tmp_path: Path) -> None:
    """Names, shapes, dtypes, offsets, metadata, their spelling, the length and the padding behind it all, one bit at a time."""
    path = tmp_path / "model.safetensors"
    w = zipserv.compress(weights(3, 64))
    zipserv.save_file({"w": w, "b\u00fc": torch.randn(2, 3), "tied": w}, path, {"author": "me"})
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    same = parsed(data)
    loaded = 0
    for place in range(8 + length):
        for bit in {5, place % 8}:  # the case of a letter, and another
            damaged = bytearray(data)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                zipserv.load_file(path)
            except zipserv.Error as error:
                assert "model.safetensors" in str(error)
            else:
                loaded += 1
                assert parsed(damaged) == same  # \u00fc and \u00FC are one letter
    assert loaded <= 4


@pytest.mark.parametrize("what", ["name of a blob", "name", "shape", "dtype", "offsets", "metadata", "tied", "key"])
def test_a_header_that_was_changed(path: Path, what: str) -> None:
    w = zipserv.compress(weights(64, 64))
    zipserv.save_file({"w": w, "a": torch.zeros(2, 3), "b": torch.zeros(6), "tied": w}, path, {"author": "me"})
    header, payload = split(path)
    metadata = header["__metadata__"]
    if what == "name of a blob":
        header["v" + SUFFIX] = header.pop("w" + SUFFIX)
    elif what == "name":
        metadata["zipserv.checksums"] = metadata["zipserv.checksums"].replace('"a"', '"c"')
        header["c"] = header.pop("a")
    elif what == "shape":
        header["a"]["shape"] = [3, 2]
    elif what == "dtype":
        header["a"]["dtype"] = "I32"
    elif what == "offsets":
        header["a"]["data_offsets"], header["b"]["data_offsets"] = header["b"]["data_offsets"], header["a"]["data_offsets"]
    elif what == "metadata":
        metadata["author"] = "you"
    elif what == "tied":
        metadata["zipserv.tied"] = metadata["zipserv.tied"].replace("tied", "died")
    else:
        metadata["zipserv.hooder"] = metadata.pop(HEADER_KEY)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + payload)
    with pytest.raises(zipserv.Error, match=r"the header .* is damaged"):
        zipserv.open_file(path)
    assert "a" in zipserv.load_file(path, verify=False) or what == "name"


def test_a_header_with_a_name_twice(path: Path) -> None:
    text, payload = json.dumps(split(path)[0]), split(path)[1]
    text = text[:-1] + ', "bias": ' + json.dumps(split(path)[0]["bias"]) + "}"
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + payload)
    with pytest.raises(zipserv.Error, match="not a valid safetensors file"):
        zipserv.load_file(path, verify=False)


def test_every_flipped_byte_of_the_data_is_noticed(path: Path) -> None:
    header, payload = split(path)
    chooser = random.Random(7)
    start, end = header["w" + SUFFIX]["data_offsets"]
    places = {0, start, end - 1, len(payload) - 1, *range(start, start + 128, 5), *(chooser.randrange(len(payload)) for _ in range(60))}
    for place in places:
        damaged = bytearray(payload)
        damaged[place] ^= 1 << chooser.randrange(8)
        join(path, header, bytes(damaged))
        with pytest.raises(zipserv.Error, match=r"model\.safetensors"):
            zipserv.load_file(path)


def test_without_verify_the_structure_is_still_checked(path: Path) -> None:
    header, payload = split(path)
    start, _ = header["w" + SUFFIX]["data_offsets"]
    for offset in (0, 40, 131):
        damaged = bytearray(payload)
        damaged[start + offset] ^= 1
        join(path, header, bytes(damaged))
        with pytest.raises(zipserv.Error):
            zipserv.load_file(path, verify=False)


def test_truncated_at_every_kind_of_place(path: Path) -> None:
    data = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(zipserv.Error, match=r"model\.safetensors"):
            zipserv.load_file(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(zipserv.Error):
        zipserv.load_file(path)


def test_headers_that_lie(path: Path) -> None:
    header, payload = split(path)
    key = "w" + SUFFIX
    start, end = header[key]["data_offsets"]
    lies: list[dict[str, Any]] = [
        {key: {"dtype": "U8", "shape": [end - start], "data_offsets": [start + 1, end + 1]}},
        {key: {"dtype": "U8", "shape": [2**62], "data_offsets": [start, end]}},
        {key: {"dtype": "U8", "shape": [end - start], "data_offsets": [end, start]}},
        {key: {"dtype": "U8", "shape": [2, (end - start) // 2], "data_offsets": [start, end]}},
        {key: {"dtype": "NONSENSE", "shape": [end - start], "data_offsets": [start, end]}},
        {"__metadata__": {"zipserv": "2"}},
        {"__metadata__": {"zipserv": "1", "zipserv.checksums": "[1"}},
        {"__metadata__": {"zipserv": "1", "zipserv.checksums": '{"bias": 5}'}},
        {"__metadata__": {"zipserv": "1", "zipserv.checksums": "[" * 100_000}},
        {"__metadata__": {"zipserv": "1", "zipserv.tied": '["a"]'}},
        {"__metadata__": {"zipserv": "1", "zipserv.checksums": '{"bias": "00000000"}'}},
    ]
    for lie in lies:
        join(path, {**header, **lie}, payload)
        with pytest.raises(zipserv.Error):
            zipserv.load_file(path)


def test_a_blob_swapped_for_another_is_just_that_blob_but_never_a_plain_tensor(path: Path) -> None:
    header, payload = split(path)
    header["w" + SUFFIX]["dtype"] = "I8"
    join(path, header, payload)
    assert "w" not in zipserv.load_file(path, verify=False)  # not bytes: an ordinary tensor under its own name
    with pytest.raises(zipserv.Error, match="no checksum"):
        zipserv.load_file(path)
    header["w" + SUFFIX]["dtype"] = "U8"
    join(path, header, bytes(len(payload)))
    with pytest.raises(zipserv.Error):
        zipserv.load_file(path)


def test_a_name_stored_plain_and_compressed(path: Path) -> None:
    header, payload = split(path)
    header["w"] = {"dtype": "U8", "shape": [4], "data_offsets": [len(payload), len(payload) + 4]}
    join(path, header, payload + b"abcd")
    with pytest.raises(zipserv.Error, match="stored twice"):
        zipserv.open_file(path)


def test_lazy_info_checks_what_it_reads(path: Path) -> None:
    header, payload = split(path)
    start, _ = header["w" + SUFFIX]["data_offsets"]
    damaged = bytearray(payload)
    damaged[start + 20] ^= 1
    join(path, header, bytes(damaged))
    with zipserv.open_file(path) as file:
        with pytest.raises(zipserv.Error, match="'w'"):
            file.info("w")
        assert file["bias"].shape == (50,)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": 5}',
        '{"weight_map": {"a": 5}}',
        '{"weight_map": {"a": "../model.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": ""}}',
        "[" * 100_000,
        '{"weight_map": {"nothing": "model.safetensors"}}',
        "\x80",
    ],
)
def test_indexes_that_lie(path: Path, text: str) -> None:
    index = path.with_name("model.safetensors.index.json")
    index.write_bytes(text.encode("latin-1"))
    with pytest.raises(zipserv.Error, match=r"index\.json"):
        zipserv.load_file(index)


def test_an_index_to_a_missing_shard(path: Path) -> None:
    index = path.with_name("model.safetensors.index.json")
    index.write_text('{"weight_map": {"w": "gone.safetensors"}}')
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors"):
        zipserv.load_file(index)


def test_missing_places(tmp_path: Path) -> None:
    for place in (tmp_path / "none.safetensors", tmp_path, tmp_path / "none.safetensors.index.json"):
        with pytest.raises(FileNotFoundError):
            zipserv.load_file(place)
    with pytest.raises(FileNotFoundError):
        zipserv.save_file({"w": weights(2)}, tmp_path / "no folder" / "m.safetensors")
    with pytest.raises(IsADirectoryError):
        zipserv.save_file({"w": weights(2)}, tmp_path)


@pytest.mark.parametrize("shard", [None, 100])
def test_a_read_only_target_stays(path: Path, shard: int | None) -> None:
    before = path.read_bytes()
    path.chmod(0o444)
    with pytest.raises(PermissionError, match="read-only"):
        zipserv.save_file({"w": weights(20), "v": weights(21)}, path, max_shard_size=shard)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("shard", [None, 100])
def test_a_folder_or_a_pipe_as_target_stays(tmp_path: Path, shard: int | None) -> None:
    folder, pipe = tmp_path / "folder", tmp_path / "pipe"
    folder.mkdir()
    os.mkfifo(pipe)
    for place in (folder, pipe):
        with pytest.raises(OSError, match="a file's name is needed"):
            zipserv.save_file({"w": weights(20), "v": weights(21)}, place, max_shard_size=shard)
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"] and pipe.is_fifo()


def test_a_place_where_nothing_can_be_written() -> None:
    with pytest.raises(OSError):
        zipserv.save_file({"w": weights(2)}, "/proc/m.safetensors")


FULL = """
import resource, signal, sys
import torch, zipserv
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
tensors = {f"t{i}": torch.zeros(20_000, dtype=torch.uint8) for i in range(20)}
try:
    zipserv.save_file(tensors, sys.argv[1], max_shard_size=eval(sys.argv[2]))
except OSError as error:
    print("OSError", error.errno)
"""


@pytest.mark.parametrize("shard", [None, 150_000])
def test_a_full_disk_leaves_the_old_file(path: Path, shard: int | None) -> None:
    """A limit on file sizes fails in the middle of a write, as a full disk does."""
    before = path.read_bytes()
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", FULL, str(path), str(shard)], capture_output=True, text=True)
    assert run.stdout.startswith("OSError"), run.stderr
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


INTERRUPTED = """
import sys, time
import torch, zipserv
from zipserv import writer

add = writer.FileWriter.add

def slow(self, name, value):
    add(self, name, value)
    if name == "t3":
        print("now", flush=True)
        time.sleep(60)

writer.FileWriter.add = slow
zipserv.save_file({f"t{i}": torch.zeros(1000) for i in range(5)}, sys.argv[1])
"""


def test_ctrl_c_leaves_the_old_file(path: Path) -> None:
    before = path.read_bytes()
    command = [sys.executable, "-W", "ignore", "-c", INTERRUPTED, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "now\n"
    assert len(os.listdir(path.parent)) == 2
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in stderr
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


CUT_SHORT = """
import os, sys
import torch, zipserv
path = sys.argv[1]
z = zipserv.load_file(path)["w"]
os.truncate(path, 8192)
for use in (z.verify, z.decompress, lambda: zipserv.linear(torch.ones(1, 1024).bfloat16(), z)):
    try:
        use()
    except zipserv.Error as error:
        print("Error", error)
"""


def test_a_file_cut_short_while_it_is_mapped_is_an_error_and_no_crash(path: Path) -> None:
    zipserv.save_file({"w": zipserv.compress(weights(1024, 1024))}, path)
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", CUT_SHORT, str(path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("Error") == 3 and "cut short" in run.stdout
