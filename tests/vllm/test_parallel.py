# SPDX-License-Identifier: Apache-2.0
"""Tensor, pipeline and expert parallel: one process for each rank, gloo between them, the same folder for all."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import reference
import support
import torch

HERE = Path(__file__).parent
TOKENS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3])


def run_ranks(folders, tmp_path: Path, name: str, way: str, tensor: int, pipeline: int = 1, *options: str) -> dict[int, dict]:
    world, port, out = tensor * pipeline, str(support.free_port()), tmp_path / "out"
    zipped = "flag" if way == "plain" else str(folders.compressed(name))
    arguments = [str(world), port, str(pipeline), str(folders.plain(name)), zipped, str(out), *options]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    ranks = [subprocess.Popen([sys.executable, HERE / "rank.py", str(rank), *arguments], **pipes) for rank in range(world)]
    outputs = []
    try:
        outputs = [rank.communicate(timeout=400)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(output[-3000:] for output in outputs)
    return {int(path.suffix[1:]): torch.load(path) for path in tmp_path.glob("out.*")}


@pytest.mark.parametrize(
    "name,way,tensor",
    [("llama", "compressed", 2), ("llama", "plain", 2), ("llama-odd", "compressed", 2), ("qwen2-tied", "compressed", 2), ("llama", "compressed", 4)],
)
def test_tensor_parallel(folders, tmp_path, name, way, tensor) -> None:
    """Each rank's layers give the bits of its uncompressed shard; so do the logits; and TP changes no more than rounding."""
    results = run_ranks(folders, tmp_path, name, way, tensor)
    assert len(results) == tensor
    with support.load(folders.plain(name)) as one:
        single = reference.logits(one.model, one.config, TOKENS).float()
    for result in results.values():
        assert torch.equal(result["got"], result["expected"])
        assert (result["got"].float() - single).abs().max() < 0.03 * single.abs().max()


@pytest.mark.parametrize("options", [(), ("--expert-parallel",)])
def test_moe_parallel(folders, tmp_path, options) -> None:
    """Experts cut in two, or half of them on each rank: their weights bit for bit, and the logits of one process up to rounding."""
    results = run_ranks(folders, tmp_path, "mixtral", "compressed", 2, 1, *options)
    with support.load(folders.plain("mixtral")) as one:
        single = reference.logits(one.model, one.config, TOKENS).float()
    assert len(results) == 2
    for result in results.values():
        assert (result["got"].float() - single).abs().max() <= 0.03 * single.abs().max()


def test_pipeline_parallel(folders, tmp_path) -> None:
    """Each stage loads its own layers from the one folder; the last stage's logits are those of one process, bit for bit."""
    results = run_ranks(folders, tmp_path, "llama", "compressed", 1, 2)
    with support.load(folders.plain("llama")) as one:
        single = reference.logits(one.model, one.config, TOKENS)
    assert list(results) == [1] and torch.equal(results[1]["got"], single)


@pytest.mark.parametrize("kind", ["column", "row"])
def test_a_rank_reads_only_its_own_tiles(kind) -> None:
    """At TP = 4, three quarters of the blob's pages can be made unreadable without the rank noticing."""
    done = subprocess.run([sys.executable, HERE / "untouched.py", kind], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    readable, pages = re.search(r"readable (\d+) of (\d+) pages", done.stdout).groups()
    assert int(readable) < 0.35 * int(pages)
