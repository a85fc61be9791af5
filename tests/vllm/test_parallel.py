# SPDX-License-Identifier: Apache-2.0
"""Tensor, pipeline, data and expert parallel: one process for each rank, gloo between them, the same folder for all."""

from __future__ import annotations

from pathlib import Path

import pytest
import rank
import ranks
import reference
import support
import torch
import untouched


def run_ranks(folders, tmp_path: Path, name: str, way: str, **sizes) -> dict[int, dict]:
    job = rank.Job(folders.plain(name), None if way == "plain" else folders.compressed(name), **sizes)
    port = support.free_port()
    ranks.run([(rank.main, (job, number, port, tmp_path / "out")) for number in range(job.world)], tmp_path)
    return {int(path.suffix[1:]): torch.load(path) for path in tmp_path.glob("out.*")}


def single(folders, name: str, replica: int = 0) -> torch.Tensor:
    """Logits of the uncompressed model in one process."""
    with support.load(folders.plain(name)) as one:
        return reference.logits(one.model, one.config, rank.tokens_of(replica)).float()


@pytest.mark.parametrize(
    "name,way,tensor",
    [
        ("llama", "compressed", 2),
        ("llama", "plain", 2),
        ("llama-odd", "compressed", 2),
        ("qwen2-tied", "compressed", 2),
        ("llama", "compressed", 4),
        ("llama", "compressed", 8),
    ],
)
def test_tensor_parallel(folders, tmp_path, name, way, tensor) -> None:
    """Each rank's layers give the bits of its uncompressed shard; so do the logits; and TP changes no more than rounding."""
    results = run_ranks(folders, tmp_path, name, way, tensor=tensor)
    assert len(results) == tensor
    expected = single(folders, name)
    for result in results.values():
        assert torch.equal(result["got"], result["expected"])
        assert (result["got"].float() - expected).abs().max() < 0.03 * expected.abs().max()
        assert result["planned"][0] == result["planned"][1]


@pytest.mark.parametrize("expert_parallel", [False, True])
def test_moe_parallel(folders, tmp_path, expert_parallel) -> None:
    """Experts cut in two, or half of them on each rank: their weights bit for bit, and the logits of one process up to rounding."""
    results = run_ranks(folders, tmp_path, "mixtral", "compressed", tensor=2, expert_parallel=expert_parallel)
    expected = single(folders, "mixtral")
    assert len(results) == 2
    for result in results.values():
        assert (result["got"].float() - expected).abs().max() <= 0.03 * expected.abs().max()
        assert result["planned"][0] == result["planned"][1]


def test_pipeline_parallel(folders, tmp_path) -> None:
    """Each stage loads its own layers from the one folder; the last stage's logits are those of one process, bit for bit."""
    results = run_ranks(folders, tmp_path, "llama", "compressed", pipeline=2)
    assert list(results) == [1] and torch.equal(results[1]["got"].float(), single(folders, "llama"))


def test_data_parallel(folders, tmp_path) -> None:
    """Two replicas with a request each, and each of two ranks: the logits of the uncompressed model, bit for bit."""
    results = run_ranks(folders, tmp_path, "llama", "compressed", tensor=2, data=2)
    assert sorted(results) == [0, 1, 2, 3]
    for number, result in results.items():
        expected = single(folders, "llama", number // 2)
        assert torch.equal(result["got"], result["expected"]) and result["got"].shape == expected.shape
        assert (result["got"].float() - expected).abs().max() < 0.03 * expected.abs().max()
    assert results[0]["got"].shape != results[2]["got"].shape


@pytest.mark.parametrize("kind", ["column", "row"])
def test_a_rank_reads_only_its_own_tiles(kind, tmp_path) -> None:
    """At TP = 4, three quarters of the blob's pages can be made unreadable without the rank noticing."""
    ranks.run([(untouched.main, (kind, tmp_path / "pages"))], tmp_path, timeout=300)
    readable, pages = map(int, (tmp_path / "pages").read_text().split())
    assert readable < 0.35 * pages
