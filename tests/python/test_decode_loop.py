# SPDX-License-Identifier: Apache-2.0
"""tools/gpu/decode_loop.py, which runs the vLLM plugin's methods on a GPU without vLLM: on the CPU, with tiny models."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "gpu" / "decode_loop.py"
SIZES = ["--device", "cpu", "--tiny", "--batch", "1,3", "--context", "16", "--steps", "2", "--rounds", "1"]


def start(*command: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the stand-in takes vLLM's name there."""
    path = os.pathsep.join(filter(None, [str(TOOL.parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    environment.pop("VLLM_BATCH_INVARIANT", None)
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=120, check=False)


def test_one_process(tmp_path: Path) -> None:
    out = tmp_path / "loop.json"
    done = start(str(TOOL), *SIZES, "--families", "llama,qwen2,qwen2-tied,qwen3-moe", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(out.read_text())
    assert not document["failed"] and len(document["families"]) == 4
    for family in document["families"]:
        assert len(family["checks"]) == 3 and [row["batch"] for row in family["rows"]] == [1, 3]
        assert family["weight_bytes"]["zipserv"] < 0.8 * family["weight_bytes"]["plain"]
        assert all(row["to plain, zipserv"] < 0.02 and row["speedup"]["zipserv"] > 0 for row in family["rows"])


def test_two_ranks(tmp_path: Path) -> None:
    pytest.importorskip("torch.distributed.run")
    out = tmp_path / "loop.json"
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = start(*ranks, str(TOOL), *SIZES, "--families", "llama,mixtral", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    for family in json.loads(out.read_text())["families"]:
        assert family["tensor_parallel"] == 2 and all(0 < row["to one GPU"] < 0.05 for row in family["rows"])


MISTAKES = {
    "weights": "Collector.finish = lambda self, finish=Collector.finish: finish(self).roll(0).index_fill_(0, torch.tensor([9000]), 7)",
    "products": "ZipServLinearMethod.apply = lambda self, layer, x, bias=None, call=ZipServLinearMethod.apply: call(self, layer, x, bias) * 1.01",
    "folder": "loop.read_folder = lambda folder, config, read=loop.read_folder: ((n, t.clone().flip(0)) for n, t in read(folder, config))",
    "head": "ZipServEmbeddingMethod.embedding = lambda self, layer, ids, call=ZipServEmbeddingMethod.embedding: call(self, layer, ids - 1)",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(mistake: str) -> None:
    code = f"""
import sys
import torch
import decode_loop as loop
from zipserv.integrations.vllm.collect import Collector
from zipserv.integrations.vllm.embedding import ZipServEmbeddingMethod
from zipserv.integrations.vllm.linear import ZipServLinearMethod
{MISTAKES[mistake]}
sys.argv = ["decode_loop.py", *{SIZES!r}, "--families", "qwen2-tied"]
raise SystemExit(loop.main())
"""
    done = start("-c", code)
    assert done.returncode == 1 and "WRONG: qwen2-tied:" in done.stdout, done.stdout + done.stderr


def test_the_standin_has_every_name_that_the_plugin_imports() -> None:
    """And no name that it does not: what it leaves out would be found on the GPU machine only."""
    wanted = set()
    for path in (ROOT / "python" / "zipserv" / "integrations" / "vllm").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                wanted |= {(node.module, alias.name) for alias in node.names}
    lines = ["import vllm_standin", "vllm_standin.install()", *(f"from {module} import {name}" for module, name in sorted(wanted))]
    done = start("-c", "\n".join(lines))
    assert done.returncode == 0, done.stderr
