# SPDX-License-Identifier: Apache-2.0
"""Every command reads every hostile file: an error with a message, and nothing else happens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import hostile
import pytest
import torch

import zipserv
from zipserv import cli

COMMANDS = ("inspect", "inspect --fast", "verify", "decompress", "compress", "load")

# Reads all files with all commands in one process that can take hardly more memory than it has already; one line of
# JSON for each, at once, so that a crash shows where it happened.
CHILD = """
import contextlib, io, json, os, resource, sys
import torch
import zipserv
from zipserv import cli

torch.set_num_threads(1)
folder, names = sys.argv[1], os.listdir(sys.argv[1])
warm = torch.randn(256, 256).bfloat16()
zipserv.compress(warm).decompress()
cli.run(["inspect", os.path.join(folder, names[0])])
with open("/proc/self/status") as file:
    size = next(int(line.split()[1]) for line in file if line.startswith("VmSize")) << 10
resource.setrlimit(resource.RLIMIT_AS, (size + (256 << 20),) * 2)

def load(path):
    try:
        for value in zipserv.load_file(path).values():
            if isinstance(value, zipserv.ZipTensor):
                value.decompress()
    except (zipserv.Error, OSError) as error:
        return 3, str(error)
    return 0, ""

def command(words, path, target):
    words = words.split() + [path] + ([target] if words.endswith("compress") else [])
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = cli.run(words)
    return int(code), errors.getvalue()

for name in sorted(names):
    path, target = os.path.join(folder, name), os.path.join(folder, name) + ".out"
    for words in json.loads(sys.argv[2]):
        code, text = load(path) if words == "load" else command(words, path, target)
        print(json.dumps([name, words, code, text, os.path.exists(target)]), flush=True)
        if os.path.exists(target):
            os.remove(target)
print(json.dumps(sorted(os.listdir(folder)) == sorted(names)))
"""

# Wrong in what only a comparison of the weights can find: opening is right to succeed, reading the weights is not.
STRUCTURE_IS_FINE = {"checksum", "sign_flipped", "bitmap_flipped", "wrong_checksum"}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[int, str, bool]]:
    folder = tmp_path_factory.mktemp("hostile")
    for name, data in hostile.files().items():
        (folder / name).write_bytes(data)
    command = [sys.executable, "-c", CHILD, str(folder), json.dumps(COMMANDS)]
    environment = {**os.environ, "GOMAXPROCS": "2", "COLUMNS": "200"}
    child = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    lines = [json.loads(line) for line in child.stdout.splitlines()]
    assert child.returncode == 0, f"died after {lines[-1:]}: {child.stderr[-2000:]}"
    assert lines.pop() is True, "something was left behind"
    return {(name, words): (code, text, written) for name, words, code, text, written in lines}


def test_the_valid_blob_is_accepted(tmp_path: Path) -> None:
    """Without this, all other tests could pass because the reader accepts nothing."""
    (tmp_path / "good.safetensors").write_bytes(hostile.holding(hostile.blob()))
    assert cli.run(["verify", str(tmp_path / "good.safetensors"), "--quiet"]) == 0
    assert zipserv.load_file(tmp_path / "good.safetensors").keys() == {"layer.weight"}


@pytest.mark.parametrize("words", COMMANDS)
@pytest.mark.parametrize("name", hostile.files())
def test_hostile_file(results: dict[tuple[str, str], tuple[int, str, bool]], name: str, words: str) -> None:
    code, text, written = results[name, words]
    assert not written, f"{words} left a file behind"
    if words == "inspect --fast" and code == 0:
        return  # headers alone may be right
    if (name, words) == ("wrong_checksum", "inspect"):
        assert code == 0  # it has no matrix, and nothing else is read
        return
    assert code in ((1, 3) if words == "verify" else (3,)), text
    assert name in text, "the message names the file"
    assert "Traceback" not in text and "memory" not in text.lower() and len(text) < 1000, text


def test_every_blob_that_is_wrong_in_structure_is_refused_without_decoding() -> None:
    for name, data in hostile.blobs():
        if name in STRUCTURE_IS_FINE:
            continue
        with pytest.raises(zipserv.Error):
            zipserv.ZipTensor(torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8))
            raise AssertionError(name)


def compressed_file(folder: Path) -> Path:
    path = folder / "good.safetensors"
    weight = torch.randn(192, 128, generator=torch.Generator().manual_seed(3)).mul(0.02).bfloat16()
    weight[1, 1] = 1e20
    tensors: dict[str, torch.Tensor | zipserv.ZipTensor] = {"w": zipserv.compress(weight), "v": torch.arange(40.0)}
    zipserv.save_file(tensors, path)
    return path


def test_cut_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = compressed_file(tmp_path).read_bytes()
    path = tmp_path / "cut.safetensors"
    for cut in [*range(0, len(data), 997), len(data) - 1]:
        path.write_bytes(data[:cut])
        assert cli.run(["verify", str(path)]) in (1, 3), cut
        assert "cut.safetensors" in capsys.readouterr().err


def test_flipped_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever bits flip: where the check of a file succeeds, its weights are the original ones."""
    good = compressed_file(tmp_path)
    data, path = good.read_bytes(), tmp_path / "flipped.safetensors"
    original = {name: zipserv.load_file(good)[name] for name in ("w", "v")}
    accepted = 0
    for seed in range(400):
        path.write_bytes(hostile.flipped(seed)(data))
        code = cli.run(["verify", str(path)])
        assert code in (0, 1, 3)
        assert "Traceback" not in capsys.readouterr().err
        if code:
            continue
        accepted += 1
        loaded = zipserv.load_file(path)
        for name, value in original.items():
            if name in loaded:  # a name may have changed: then it is another tensor, with the same bits
                plain, other = (v.decompress() if isinstance(v, zipserv.ZipTensor) else v for v in (value, loaded[name]))
                assert torch.equal(plain.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)), seed
    assert accepted < 200  # most flips are in what is checked
