# SPDX-License-Identifier: Apache-2.0
"""The disk is full or the target read-only: the old file is as it was, and nothing else is left."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import zipserv
from zipserv import cli


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"{name}.weight": torch.randn(256, 256, generator=generator).mul(0.02).bfloat16() for name in "abcd"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_file(tensors(), tmp_path / "in.safetensors", metadata={"format": "pt"})
    return tmp_path / "in.safetensors"


def in_child(limit: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """One command in a process that may not write files longer than ``limit`` bytes."""
    program = (
        "import resource, sys; from zipserv import cli; "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); sys.exit(cli.run(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("command", ["compress", "decompress"])
def test_file_too_large_leaves_the_old_one(source: Path, command: str) -> None:
    if command == "decompress":
        packed = source.with_name("packed.safetensors")
        assert cli.run(["compress", str(source), str(packed), "--quiet"]) == 0
        source = packed
    target = source.with_name("out.safetensors")
    target.write_bytes(b"old")
    names = sorted(os.listdir(source.parent))
    result = in_child(200_000, command, source, target, "--force")
    assert result.returncode == 4 and "out.safetensors" in result.stderr and "Traceback" not in result.stderr
    assert target.read_bytes() == b"old" and sorted(os.listdir(source.parent)) == names


def test_folder_goes_on_when_there_is_room_again(tmp_path: Path) -> None:
    model, packed = tmp_path / "model", tmp_path / "packed"
    model.mkdir()
    save_file({"a.weight": tensors()["a.weight"]}, model / "model-1.safetensors")
    save_file(tensors(1), model / "model-2.safetensors")
    (model / "config.json").write_text("{}")
    result = in_child(200_000, "compress", model, packed)
    assert result.returncode == 4, result.stderr
    assert sorted(os.listdir(packed)) == [".zipserv-unfinished.json", "model-1.safetensors"]
    assert cli.run(["compress", str(model), str(packed), "--quiet"]) == 0
    assert cli.run(["verify", str(packed), str(model), "--quiet"]) == 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_errors_of_the_disk(source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int) -> None:
    """Whenever the disk fails: while tensors are written, or only when all is brought to the disk."""
    target = source.with_name("out.safetensors")
    target.write_bytes(b"old")

    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fails)
            assert cli.run(["compress", str(source), str(target), "--force"]) == 4
        assert os.strerror(number) in capsys.readouterr().err
        assert target.read_bytes() == b"old" and sorted(os.listdir(source.parent)) == ["in.safetensors", "out.safetensors"]


def test_old_file_survives_save_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    zipserv.save_file({"a": zipserv.compress(tensors()["a.weight"])}, path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        zipserv.save_file({"a": zipserv.compress(tensors(1)["a.weight"])}, path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.safetensors"]


def test_read_only_file_is_not_replaced(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = source.with_name("out.safetensors")
    target.write_bytes(b"old")
    target.chmod(0o444)
    assert cli.run(["compress", str(source), str(target), "--force"]) == 4
    assert "read-only" in capsys.readouterr().err and target.read_bytes() == b"old"
    packed = source.with_name("packed.safetensors")
    assert cli.run(["compress", str(source), str(packed)]) == 0
    assert cli.run(["decompress", str(packed), str(target), "--force"]) == 4
    assert "read-only" in capsys.readouterr().err and target.read_bytes() == b"old"


def test_no_such_folder(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["compress", str(source), str(source.parent / "none" / "out.safetensors")]) == 4
    assert "none" in capsys.readouterr().err


_SCRIPT = """
set -e
mount -t tmpfs -o size=$1 tmpfs "$2"
printf old > "$2/out.safetensors"
if [ "$3" = ro ]; then mount -o remount,ro "$2"; fi
set +e
"$4" -m zipserv compress "$5" "$2/out.safetensors" --force
echo "code $?"
echo "held $(cat "$2/out.safetensors") $(ls -A "$2" | wc -l)"
"""


def can_mount() -> bool:
    if shutil.which("unshare") is None or shutil.which("mount") is None:
        return False
    script = 'd=$(mktemp -d) && mount -t tmpfs tmpfs "$d"'
    return subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="no file system can be mounted here (unshare -rm)")
@pytest.mark.parametrize(("size", "mode"), [("256k", "rw"), ("4m", "ro")])
def test_real_full_and_read_only_disk(source: Path, tmp_path: Path, size: str, mode: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["unshare", "-rm", "bash", "-c", _SCRIPT, "sh", size, str(disk), mode, sys.executable, str(source)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-2:] == ["code 4", "held old 1"], (result.stdout, result.stderr)
    assert ("no space left" if mode == "rw" else "read-only") in result.stderr.lower()
