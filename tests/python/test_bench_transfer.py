# SPDX-License-Identifier: Apache-2.0
"""``zipserv bench --offload cpu`` and ``--load``: what they report, not how fast this machine is."""

from __future__ import annotations

import json

import pytest
import torch

from cli_helpers import Zipserv
from zipserv.bench import gpu, transfer

CPU = torch.device("cpu")


def test_streaming(capsys: pytest.CaptureFixture[str]) -> None:
    result = transfer.streaming(CPU, layers=3, hidden=256, inner=512, tokens=(1, 4), rounds=1)
    json.dumps(result)
    assert [row["tokens"] for row in result["rows"]] == [1, 4]
    for row in result["rows"]:
        plain, small = row["plain"], row["zipserv"]
        assert 0.65 < small["streamed_bytes"] / plain["streamed_bytes"] < 0.75
        assert plain["buffer_bytes"] == 2 * plain["streamed_bytes"] / 3
        assert row["speedup"] == pytest.approx(small["tokens_per_second"] / plain["tokens_per_second"])
    assert "speed-up" in transfer.streaming_lines(result)[1]
    run = Zipserv(capsys)("bench", "--offload", "cpu", "--device", "cpu", "--json")
    assert run.json["offload"]["layers"] == 2


def test_streaming_finds_wrong_results(monkeypatch: pytest.MonkeyPatch) -> None:
    real = transfer.offload._Weight.view
    monkeypatch.setattr(transfer.offload._Weight, "view", lambda self, data: real(self, data).clone().zero_())
    with pytest.raises(gpu.WrongResult, match="compute something else"):
        transfer.streaming(CPU, layers=2, hidden=256, inner=512, rounds=1)


def test_loading(capsys: pytest.CaptureFixture[str]) -> None:
    run = Zipserv(capsys)("bench", "--load", "0.003", "--device", "cpu", "--json")
    result = run.json["load"]
    assert result["bytes"] > 3e6 and result["bus"] is None
    assert all(result[key] > 0 for key in ("page_cache", "load", "load_unverified", "safetensors"))
    assert "100%" in "".join(transfer.loading_lines(result))
