# SPDX-License-Identifier: Apache-2.0
"""Hostile model folders."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from zipserv import cli

INDEX = "model.safetensors.index.json"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    root = tmp_path / "model"
    root.mkdir()
    save_file({"a.weight": torch.randn(128, 128).bfloat16()}, root / "model-00001-of-00001.safetensors")
    (root / INDEX).write_text(json.dumps({"weight_map": {"a.weight": "model-00001-of-00001.safetensors"}}))
    (root / "config.json").write_text("{}")
    return root


def refused(model: Path, capsys: pytest.CaptureFixture[str], *words: str) -> None:
    capsys.readouterr()
    target = model.parent / "packed"
    assert cli.run(["compress", str(model), str(target)]) == 3
    errors = capsys.readouterr().err
    assert all(word in errors for word in words), errors
    assert not target.exists()


def test_the_model_is_accepted(model: Path) -> None:
    assert cli.run(["compress", str(model), str(model.parent / "packed"), "--quiet"]) == 0


@pytest.mark.parametrize("where", ["../secret.safetensors", "/etc/passwd", "", ".", "sub/../../model.safetensors", "no\0name", 7, None, ["x"]])
def test_index_that_points_elsewhere(model: Path, capsys: pytest.CaptureFixture[str], where: object) -> None:
    save_file({"a.weight": torch.zeros(64, 64)}, model.parent / "secret.safetensors")
    (model / INDEX).write_text(json.dumps({"weight_map": {"a.weight": where}}))
    refused(model, capsys, INDEX)


NO_OBJECTS = ("", "[]", "7", '"weight_map"', "{", "[" * 200_000, '{"a":' * 200_000, "\ud800")
NO_INDEXES = ('{"weight_map": []}', '{"weight_map": null}', "{}")


@pytest.mark.parametrize(
    ("name", "text"), [(name, text) for name in (INDEX, "config.json") for text in NO_OBJECTS] + [(INDEX, text) for text in NO_INDEXES]
)
def test_json_that_is_none(model: Path, capsys: pytest.CaptureFixture[str], name: str, text: str) -> None:
    (model / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(model, capsys, name)


def test_json_of_gigabytes_is_not_read(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(model / "config.json", "wb") as file:
        file.truncate(20 << 30)  # a hole: takes no room on the disk
    refused(model, capsys, "config.json", "too large")


def test_links_in_circles(model: Path) -> None:
    (model / "loop").symlink_to(model)
    (model / "deeper").mkdir()
    (model / "deeper" / "up").symlink_to("..")
    (model / "nowhere").symlink_to("gone")
    target = model.parent / "packed"
    assert cli.run(["compress", str(model), str(target), "--quiet"]) == 0
    assert len(list(target.rglob("*.safetensors"))) == 1


def test_pipes_are_not_waited_for(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(model / "pipe.safetensors")
    os.mkfifo(model / "pipe.txt")
    target = model.parent / "packed"
    assert cli.run(["compress", str(model), str(target), "--quiet"]) == 0
    assert not (target / "pipe.txt").exists()
    for command in ("inspect", "verify"):
        capsys.readouterr()
        assert cli.run([command, str(model / "pipe.safetensors")]) == 3
        assert "pipe.safetensors" in capsys.readouterr().err
    assert cli.run(["compress", str(model / "pipe.safetensors"), str(model.parent / "out.safetensors")]) == 3


def test_one_bad_shard_spoils_nothing_else(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "model-00002-of-00002.safetensors").write_bytes(b"not tensors")
    refused(model, capsys, "model-00002")
