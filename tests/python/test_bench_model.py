# SPDX-License-Identifier: Apache-2.0
"""``zipserv bench --model`` on a tiny model: what it reports, not how fast this machine is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers", minversion="5.0")

from zipserv.bench import model as bench  # noqa: E402

SMALL = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 320,
}  # fmt: skip


@pytest.mark.parametrize("offload", [None, "cpu"])
def test_measures_both_and_gets_the_same_tokens(tmp_path: Path, offload: str | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    result = bench.run(tmp_path, device="cpu", batch=(1, 2), prompt=5, new_tokens=2, rounds=1, offload=offload)
    json.dumps(result)
    assert 0.6 < result["weights"]["ratio"] < 0.75
    assert [row["batch"] for row in result["rows"]] == [1, 2]
    for row in result["rows"]:
        assert row["same_tokens"] == 1.0
        assert row["plain"]["decode_tokens_per_second"] > 0 and row["zipserv"]["first_token_seconds"] > 0
    table = bench.format_rows(result)
    assert "tokens/s" in table and len(table.splitlines()) == 5


def test_refusals(tmp_path: Path) -> None:
    for arguments in ({"config": "no-such-model"}, {"config": "tiny", "dtype": "float32"}, {"config": "tiny", "batch": (0,)}):
        with pytest.raises(ValueError, match="config|dtype|at least 1"):
            bench.run(**arguments, device="cpu")
