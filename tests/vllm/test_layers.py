# SPDX-License-Identifier: Apache-2.0
"""Every parallel layer type against vLLM's own uncompressed one, loaded through the same calls of vLLM's loaders."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

import zipserv
from zipserv import tiles
from zipserv.integrations.vllm import config as config_module
from zipserv.integrations.vllm.blobview import BlobView
from zipserv.integrations.vllm.config import ZipServConfig
from zipserv.integrations.vllm.linear import ZipServLinearMethod

K = 256


def weights(m: int, k: int = K) -> torch.Tensor:
    return (torch.randn(m, k, dtype=torch.float32) * 0.02).bfloat16()


def give(layer, parts, source: str, fused: bool = False) -> None:
    """Load a layer's weight shard by shard, the way the models do: plain tensors, blobs, or blobs among plain tensors."""
    if fused:
        parts = [(None, torch.cat([w for _, w in parts]))]
    for i, (shard, weight) in enumerate(parts):
        if source == "blobs" or (source == "mixed" and i % 2):
            weight = BlobView.of(zipserv.compress(weight).blob)
        args = () if shard is None else (shard,)
        layer.weight.weight_loader(layer.weight, weight, *args)


LAYERS = {
    "replicated": (lambda **kw: ReplicatedLinear(K, 320, **kw), [(None, 320)]),
    "column": (lambda **kw: ColumnParallelLinear(K, 320, **kw), [(None, 320)]),
    "row": (lambda **kw: RowParallelLinear(K, 320, **kw), [(None, 320)]),
    "merged": (lambda **kw: MergedColumnParallelLinear(K, [256, 192], **kw), [(0, 256), (1, 192)]),
    "qkv": (lambda **kw: QKVParallelLinear(K, 64, 8, 2, **kw), [("q", 512), ("k", 128), ("v", 128)]),
    "qkv-odd-heads": (lambda **kw: QKVParallelLinear(K, 40, 9, 3, **kw), [("q", 360), ("k", 120), ("v", 120)]),
    "merged-odd": (lambda **kw: MergedColumnParallelLinear(K, [200, 250], **kw), [(0, 200), (1, 250)]),
    "tp-shard": (lambda **kw: ColumnParallelLinear(K, 640, tp_rank=1, tp_size=2, **kw), [(None, 640)]),
    "tp-shard-odd": (lambda **kw: ColumnParallelLinear(K, 720, tp_rank=2, tp_size=3, **kw), [(None, 720)]),
}


@pytest.mark.parametrize("source", ["plain", "blobs", "mixed"])
@pytest.mark.parametrize("kind", LAYERS)
def test_linear_layers(dtype, kind, source) -> None:
    build, shapes = LAYERS[kind]
    parts = [(shard, weights(m)) for shard, m in shapes]
    for bias, skip in ((False, False), (True, False), (True, True)):
        layer = build(bias=bias, skip_bias_add=skip, quant_config=ZipServConfig(), prefix=f"model.{kind}")
        plain = build(bias=bias, skip_bias_add=skip, prefix=f"model.{kind}")
        assert isinstance(layer.quant_method, ZipServLinearMethod)
        assert layer.weight.is_meta  # nothing is allocated before the checkpoint comes
        if bias:
            layer.bias.data.copy_(plain.bias.data.normal_())
        give(layer, parts, source)
        give(plain, parts, "plain")
        assert layer.weight.dtype == torch.uint8, "compressed as soon as the last shard has come"
        expected = zipserv.compress(plain.weight.data).blob
        assert torch.equal(layer.weight.data, expected), "one weight, the same bytes however it was loaded"
        for module in (layer, plain):
            module.quant_method.process_weights_after_loading(module)
        for lead in ((7,), (1,), (2, 3), (0,)):
            x = torch.randn(*lead, K).bfloat16()
            got, want = layer(x), plain(x)
            assert torch.equal(got[0], want[0]) and got[0].shape == want[0].shape
            assert (got[1] is None) == (want[1] is None) and (got[1] is None or torch.equal(got[1], want[1]))


@pytest.mark.parametrize("source", ["plain", "blobs"])
@pytest.mark.parametrize("kind", ["merged", "qkv"])
def test_weights_that_are_fused_on_disk(dtype, kind, source) -> None:
    build, shapes = LAYERS[kind]
    parts = [(shard, weights(m)) for shard, m in shapes]
    layer = build(bias=False, quant_config=ZipServConfig(), prefix="x")
    give(layer, parts, source, fused=True)
    assert torch.equal(layer.weight.data, zipserv.compress(torch.cat([w for _, w in parts])).blob)


@pytest.mark.parametrize("source", ["plain", "blobs"])
@pytest.mark.parametrize("rows", [320, 333])
def test_embedding_and_head(dtype, rows, source, monkeypatch) -> None:
    monkeypatch.setattr(config_module, "_ties_embeddings", lambda: True)
    weight = weights(rows)
    layers = [
        VocabParallelEmbedding(rows, K, quant_config=ZipServConfig(), prefix="model.embed_tokens"),
        ParallelLMHead(rows, K, quant_config=ZipServConfig(), prefix="lm_head"),
    ]
    plain = ParallelLMHead(rows, K)
    for layer in (*layers, plain):
        give(layer, [(None, weight)], source if layer is not plain else "plain")
        layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(5, K).bfloat16()
    for layer in layers:
        assert layer.weight.dtype == torch.uint8
        assert torch.equal(layer.quant_method.apply(layer, x), plain.quant_method.apply(plain, x))
    for ids in (torch.randint(0, rows, (11,)), torch.tensor([[0, rows - 1], [7, 7]]), torch.empty(0, dtype=torch.long)):
        assert torch.equal(layers[0](ids), weight[ids])


def test_an_untied_embedding_stays_plain(dtype) -> None:
    layer = VocabParallelEmbedding(320, K, quant_config=ZipServConfig(), prefix="model.embed_tokens")
    assert layer.weight.shape == (320, K)


def test_tied_head_holds_the_weight_once(dtype, monkeypatch) -> None:
    monkeypatch.setattr(config_module, "_ties_embeddings", lambda: True)
    embedding = VocabParallelEmbedding(320, K, quant_config=ZipServConfig(), prefix="model.embed_tokens")
    head = ParallelLMHead(320, K, quant_config=ZipServConfig(), prefix="lm_head").tie_weights(embedding)
    give(embedding, [(None, weights(320))], "plain")
    for layer in (embedding, head):
        layer.quant_method.process_weights_after_loading(layer)
    assert head.weight is embedding.weight and head.weight.dtype == torch.uint8


@pytest.mark.parametrize("what", ["noise", "tiny"])
def test_what_does_not_shrink_becomes_an_ordinary_layer(dtype, what, monkeypatch) -> None:
    lines: list[str] = []
    from zipserv.integrations.vllm import weight as weight_module

    monkeypatch.setattr(weight_module.logger, "info", lambda text, *args: lines.append(text % args))
    m = 128 if what == "noise" else 4
    value = torch.randint(-30000, 30000, (m, K), dtype=torch.int16).view(torch.bfloat16) if what == "noise" else weights(m)
    value = torch.where(torch.isfinite(value), value, 1)
    layer = ReplicatedLinear(K, m, bias=False, quant_config=ZipServConfig(), prefix="model.small")
    plain = ReplicatedLinear(K, m, bias=False)
    for module in (layer, plain):
        give(module, [(None, value)], "plain")
        module.quant_method.process_weights_after_loading(module)
    assert lines == ["model.small stays uncompressed: it would not shrink"]
    x = torch.randn(3, K).bfloat16()
    assert torch.equal(layer(x)[0].view(torch.int16), plain(x)[0].view(torch.int16))  # bits: sums of such noise may be NaN


def test_one_line_for_each_layer_that_stays_plain(dtype, monkeypatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(config_module.logger, "info", lambda text, *args: lines.append(text % args))
    config = ZipServConfig(ignore=["lm_head", "model.layers.0", "*.gate", "model.layers.1.mlp.up_proj"])
    config.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
    for prefix, ignored in {
        "model.layers.0.self_attn.o_proj": True,
        "model.layers.01.self_attn.o_proj": False,
        "model.layers.1.mlp.gate": True,
        "model.layers.1.mlp.gate_up_proj": True,
        "model.layers.2.mlp.gate_up_proj": False,
    }.items():
        before = len(lines)
        layer = ReplicatedLinear(K, 128, quant_config=config, prefix=prefix)
        assert isinstance(layer.quant_method, UnquantizedLinearMethod) == ignored
        assert len(lines) == before + ignored and (not ignored or prefix in lines[-1] and "modules_to_not_convert" in lines[-1])
    layer = ReplicatedLinear(K, 128, params_dtype=torch.float16, quant_config=config, prefix="half")
    assert isinstance(layer.quant_method, UnquantizedLinearMethod) and "float16" in lines[-1]


def test_fullgraph_compile(dtype) -> None:
    """torch.compile sees one op, no break, and any number of tokens without compiling again."""
    layer = MergedColumnParallelLinear(K, [256, 192], bias=False, quant_config=ZipServConfig(), prefix="x", return_bias=False)
    give(layer, [(0, weights(256)), (1, weights(192))], "plain")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for tokens in (1, 3, 17):
            x = torch.randn(tokens, K).bfloat16()
            assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("before", [None, "fork", "spawn"])
def test_workers_are_spawned(before, monkeypatch) -> None:
    """vLLM forks its workers unless told otherwise; the library can't be used in a forked child."""
    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD", raising=False)
    if before:
        monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", before)
    ZipServConfig()
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"


def test_loading_again_is_refused(dtype) -> None:
    layer = ReplicatedLinear(K, 320, bias=False, quant_config=ZipServConfig(), prefix="x")
    param = layer.weight
    give(layer, [(None, weights(320))], "plain")
    with pytest.raises(RuntimeError, match="compressed already"):
        param.weight_loader(param, weights(320))
    with pytest.raises(RuntimeError, match="compressed already"):
        layer.weight.weight_loader(layer.weight, weights(320))


def test_a_damaged_blob_is_refused(dtype) -> None:
    blob = zipserv.compress(weights(320)).blob.clone()
    blob[128 + 8 * 20 + 100] ^= 4  # a mantissa bit: only the checksum knows
    layer = ReplicatedLinear(K, 320, bias=False, quant_config=ZipServConfig(), prefix="x")
    with pytest.raises(zipserv.Error):
        layer.weight.weight_loader(layer.weight, BlobView.of(blob))


@pytest.mark.parametrize("shape", [(320, 256), (333, 200)])
def test_blob_views_slice_like_tensors(shape) -> None:
    """Whatever a loader may do to a checkpoint tensor gives what it gives of the plain tensor."""
    weight = weights(*shape)
    view = BlobView.of(zipserv.compress(weight).blob)
    steps = {
        "narrow": lambda t: t.narrow(0, 64, 128).narrow(1, 3, 60),
        "chunk": lambda t: t.chunk(3, 0)[1],
        "split": lambda t: t.split([100, t.shape[0] - 100])[1],
        "index": lambda t: t[5:77, 10],
        "transpose": lambda t: t.t()[7:9],
        "step": lambda t: t[1::3, ::2],
        "unsqueeze": lambda t: t.unsqueeze(0).unbind()[0],
        "reshape": lambda t: t.view(1, *t.shape)[0, 3],
        "cast": lambda t: t[:70].to(torch.float32),
        "math": lambda t: t[:70] * 2,
        "contiguous": lambda t: t.t().contiguous()[:5],
    }
    seconds = {"": lambda t: t, "narrowed": lambda t: t.narrow(0, 1, 1), "last": lambda t: t.narrow(-1, 1, 2)}
    for (name, step), (second, then) in itertools.product(steps.items(), seconds.items()):
        got, want = then(step(view)), then(step(weight))
        assert got.shape == want.shape and got.dtype == want.dtype, (name, second)
        out = torch.empty_like(want)
        out.copy_(got)
        assert torch.equal(out, want), (name, second)


def test_stacked_experts_of_blobs_slice_like_tensors() -> None:
    weight = weights(4 * 128, 192).view(4, 128, 192)
    view = BlobView.of(zipserv.compress(weight).blob)
    for step in (lambda t: t[2], lambda t: t.chunk(2, dim=1)[1].unbind()[3], lambda t: t.transpose(-1, -2)[1, :64]):
        assert torch.equal(step(view).clone(), step(weight))
    assert view[1].is_rectangle() and tiles.on_borders(view.header, *view[1].part())
