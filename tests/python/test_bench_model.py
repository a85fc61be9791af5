# SPDX-License-Identifier: Apache-2.0
"""``zipserv bench --model`` on a tiny model: what it reports, not how fast this machine is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")

from zipserv import ZipLinear  # noqa: E402
from zipserv.bench import model as bench  # noqa: E402
from zipserv.bench.fused import DYNAMIC, decode_attention  # noqa: E402
from zipserv.merged import MergedLinear  # noqa: E402

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


def test_short_memory_leaves_the_other_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model, or a batch, that does not fit uncompressed: the rest is measured all the same."""
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    arguments = {"device": "cpu", "batch": (1, 2), "prompt": 3, "new_tokens": 2, "rounds": 1}
    measure, build = bench._measure, bench._build

    def short(model: Any, device: torch.device, batch: int, *rest: Any) -> Any:
        if batch == 2 and not any(isinstance(module, ZipLinear) for module in model.modules()):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB. More words.")
        return measure(model, device, batch, *rest)

    monkeypatch.setattr(bench, "_measure", short)
    result = bench.run(tmp_path, **arguments)
    first, second = result["rows"]
    assert first["decode_speedup"] > 0 and second["decode_speedup"] is None and second["same_tokens"] is None
    assert second["plain"] == {"error": "out of memory: CUDA out of memory"}
    assert second["zipserv"]["decode_tokens_per_second"] > 0
    assert "plain: out of memory" in bench.format_rows(result)

    tries = []

    def too_large(*arguments: Any) -> Any:
        tries.append(arguments)
        if len(tries) == 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return build(*arguments)

    monkeypatch.setattr(bench, "_build", too_large)
    result = bench.run(tmp_path, **arguments)
    assert [row["zipserv"]["decode_tokens_per_second"] > 0 for row in result["rows"]] == [True, True]
    assert "the weights alone are" in result["rows"][0]["plain"]["error"]
    json.dumps(result)
    bench.format_rows(result)


def test_layers_are_merged_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    seen = []
    weigh = bench._weight_bytes
    monkeypatch.setattr(bench, "_weight_bytes", lambda model: seen.append(sum(isinstance(m, MergedLinear) for m in model.modules())) or weigh(model))
    sizes = [
        bench.run(tmp_path, device="cpu", prompt=2, new_tokens=1, rounds=1, merge=merge)["weights"]["zipserv"] for merge in (True, False)
    ]
    assert seen == [0, 10, 0, 0]
    assert sizes[0] <= sizes[1] < 1.01 * sizes[0]  # one copy of the bytes


@pytest.mark.parametrize("kind", ["none", "bool", "added"])
def test_attention_of_one_token(kind: str) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 8, 1, 32), torch.randn(3, 2, 40, 32), torch.randn(3, 2, 40, 32)
    mask = None if kind == "none" else torch.rand(3, 1, 1, 40) > 0.3
    if kind == "added":
        mask = torch.zeros(3, 1, 1, 40).masked_fill(~mask, float("-inf"))
    wide = [part.repeat_interleave(4, 1) for part in (key, value)]
    want = torch.nn.functional.scaled_dot_product_attention(query, *wide, attn_mask=mask, scale=0.2)
    torch.testing.assert_close(decode_attention(query, key, value, mask, 0.2), want.transpose(1, 2))


def test_a_fused_step_gives_the_same_and_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama as llama

    compiled, sources = [], getattr(torch.compiler.config, "dynamic_sources", None)
    monkeypatch.setattr(torch, "compile", lambda call: compiled.append(call.__name__) or call)  # what is compiled, not how
    before = (llama.LlamaRMSNorm.forward, llama.LlamaMLP.forward, llama.apply_rotary_pos_emb)
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    model, _ = bench._build(tmp_path, torch.device("cpu"), torch.bfloat16, 0)
    arguments = (model, torch.device("cpu"), 2, 5, 6, False, 0, 1, None)
    _, want = bench._measure(*arguments)
    with bench.fused(model):
        assert model.config._attn_implementation == "zipserv_bench"
        assert DYNAMIC in getattr(torch.compiler.config, "dynamic_sources", DYNAMIC)
        _, got = bench._measure(*arguments)
    assert torch.equal(got, want)
    assert sorted(compiled) == ["_weights", "apply_rotary_pos_emb", "forward", "forward"]
    assert before == (llama.LlamaRMSNorm.forward, llama.LlamaMLP.forward, llama.apply_rotary_pos_emb)
    assert model.config._attn_implementation == "sdpa"
    assert getattr(torch.compiler.config, "dynamic_sources", None) == sources


def test_refusals(tmp_path: Path) -> None:
    for arguments in ({"config": "no-such-model"}, {"config": "tiny", "dtype": "float32"}, {"config": "tiny", "batch": (0,)}):
        with pytest.raises(ValueError, match="config|dtype|at least 1"):
            bench.run(**arguments, device="cpu")
