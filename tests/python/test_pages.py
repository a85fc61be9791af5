# SPDX-License-Identifier: Apache-2.0
"""The documentation's pages on whole models, the C page and the examples: their code runs."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", minversion="5.0")

ROOT = Path(__file__).parents[2]


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("page", "count", "needs"), [("transformers.md", 4, []), ("offload.md", 2, []), ("lora.md", 2, ["peft"])])
def test_python_blocks(page: str, count: int, needs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in needs:
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    found = blocks(page, "python")
    assert len(found) == count
    names: dict[str, object] = {}
    for block in found:
        exec(compile(block, page, "exec"), names)


def test_c_block(tmp_path: Path) -> None:
    from zipserv import paths

    (source,) = blocks("c-program.md", "c")
    (tmp_path / "program.c").write_text(source)
    compiler = ["cc"] if shutil.which("cc") else [sys.executable, "-m", "ziglang", "cc"]
    library = paths.library_path()
    flags = [f"-I{paths.include_dir()}", str(library), f"-Wl,-rpath,{library.parent}"]
    subprocess.run([*compiler, "program.c", "-o", "program", "-Wall", "-Werror", *flags], cwd=tmp_path, check=True)
    out = subprocess.run([tmp_path / "program"], check=True, capture_output=True, text=True).stdout
    assert "->" in out and "found:" in out


@pytest.mark.parametrize("name", ["transformers_model.py", "offload_model.py", "checkpoint.py", "lora.py"])
def test_examples(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "lora.py":
        pytest.importorskip("peft")
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    assert capsys.readouterr().out
