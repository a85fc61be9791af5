# SPDX-License-Identifier: Apache-2.0
"""Whole models, built and loaded by vLLM itself: from a plain checkpoint with the flag, and from a compressed folder without."""

from __future__ import annotations

import pytest
import reference
import support
import torch
import transformers
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from zipserv.integrations.vllm.collect import Collector
from zipserv.integrations.vllm.embedding import ZipServEmbeddingMethod
from zipserv.integrations.vllm.linear import ZipServLinearMethod
from zipserv.integrations.vllm.moe import ZipServMoEMethod

DENSE = ["llama", "llama-tied", "llama-odd", "qwen2", "qwen2-tied", "qwen3"]
SPARSE = ["mixtral", "qwen3-moe"]
WAYS = ["plain", "compressed"]
TOKENS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3])


def zipped(folders: support.Folders, name: str, way: str):
    """The plain checkpoint with `quantization="zipserv"`, or the folder of `zipserv compress` with nothing said."""
    return support.load(folders.plain(name), "zipserv") if way == "plain" else support.load(folders.compressed(name))


def transformers_logits(folder, tokens: torch.Tensor) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(tokens[None]).logits[0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", DENSE)
def test_dense_model_gives_the_uncompressed_models_bits(folders, name, way) -> None:
    with support.load(folders.plain(name)) as plain:
        layers = plain.modules()
        expected = reference.logits(plain.model, plain.config, TOKENS)
    with zipped(folders, name, way) as zip_:
        assert zip_.config.model_config.quantization == "zipserv"
        methods = {type(module.quant_method) for module in zip_.modules().values()}
        assert ZipServLinearMethod in methods and ZipServEmbeddingMethod in methods
        assert zip_.modules().keys() == layers.keys()
        for label, module in zip_.modules().items():
            compare(label, module, layers[label])
        got = reference.logits(zip_.model, zip_.config, TOKENS)
    assert torch.equal(got, expected)
    # and neither is just equal to itself: transformers, in FP32, is near
    far = transformers_logits(folders.plain(name), TOKENS)
    assert (expected[:, : far.shape[1]].float() - far).abs().max() < 0.05 * far.abs().max()


def compare(label: str, module: torch.nn.Module, plain: torch.nn.Module) -> None:
    """One layer against its uncompressed twin on the same input, several numbers of tokens."""
    for tokens in (1, 5):
        if isinstance(module.quant_method, ZipServEmbeddingMethod) and module.prefix.endswith("embed_tokens"):
            ids = torch.randint(0, module.org_vocab_size, (tokens,))
            assert torch.equal(module(ids), plain(ids)), label
        x = torch.randn(tokens, module.input_size if hasattr(module, "input_size") else module.hidden_size).bfloat16()
        y, z = (m.quant_method.apply(m, x, getattr(m, "bias", None)) for m in (module, plain))
        assert torch.equal(y, z), label


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SPARSE)
def test_moe_model_agrees_with_the_uncompressed_model(folders, name, way) -> None:
    with support.load(folders.plain(name)) as plain:
        expected = reference.logits(plain.model, plain.config, TOKENS)
        weights = {n: (m.w13_weight, m.w2_weight) for n, m in plain.model.named_modules() if hasattr(m, "w13_weight")}
    with zipped(folders, name, way) as zip_:
        experts = {n: m for n, m in zip_.model.named_modules() if isinstance(getattr(m, "quant_method", None), ZipServMoEMethod)}
        assert experts and experts.keys() == weights.keys()
        for label, module in experts.items():
            for part, weight in zip((module.quant_method.w13, module.quant_method.w2), weights[label], strict=True):
                for number in range(weight.shape[0]):  # the identity's rows give the weight back, bit for bit
                    assert torch.equal(part.linear(number, torch.eye(part.k).bfloat16()).t(), weight[number]), label
        got = reference.logits(zip_.model, zip_.config, TOKENS)
    # the stand-in for the uncompressed experts works in FP32: the same up to BF16 rounding
    assert (got.float() - expected.float()).abs().max() <= 0.02 * expected.float().abs().max()


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_loading_holds_few_layers_uncompressed(folders, name, monkeypatch) -> None:
    """A plain checkpoint: the uncompressed weights in memory at any time are those of the layers under way; a compressed one: none."""
    alive, peak = {}, 0
    make, finish = Collector._make_plain, Collector.finish

    def made(self):
        nonlocal peak
        plain = make(self)
        alive[self.name] = plain.numel()
        peak = max(peak, sum(alive.values()))
        return plain

    def finished(self):
        blob = finish(self)
        alive.pop(self.name, None)
        return blob

    monkeypatch.setattr(Collector, "_make_plain", made)
    monkeypatch.setattr(Collector, "finish", finished)
    with support.load(folders.plain(name), "zipserv") as loaded:
        pass
    total = sum(m.zip_weight.m * m.zip_weight.k for m in loaded.model.modules() if hasattr(m, "zip_weight"))
    methods = [m.quant_method for m in loaded.model.modules() if isinstance(getattr(m, "quant_method", None), ZipServMoEMethod)]
    parts = [part for method in methods for part in (method.w13, method.w2)]
    total += sum(p.m * p.k * len(p.spans) for p in parts)
    assert not alive and 0 < peak < 0.65 * total  # two layers and a head: one layer, and what of the next comes first in the file
    peak = 0
    with support.load(folders.compressed(name)):
        pass
    assert peak == 0, "blobs on tile borders are never decoded to be loaded"


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_dummy_weights(folders, name) -> None:
    with support.load(folders.plain(name), "zipserv", load_format="dummy") as dummy:
        assert torch.isfinite(reference.logits(dummy.model, dummy.config, TOKENS)).all()
        assert dummy.model.lm_head.weight.dtype == torch.uint8


def test_ignored_layers_stay_uncompressed(folders) -> None:
    folder = folders.compressed("llama", "--exclude=*q_proj*")
    with support.load(folders.plain("llama")) as plain, support.load(folder) as zip_:
        attention = zip_.model.model.layers[0].self_attn
        assert isinstance(attention.qkv_proj.quant_method, UnquantizedLinearMethod)
        assert isinstance(attention.o_proj.quant_method, ZipServLinearMethod)
        assert torch.equal(reference.logits(zip_.model, zip_.config, TOKENS), reference.logits(plain.model, plain.config, TOKENS))


def test_everything_compressed_loads_too(folders) -> None:
    """A folder whose embeddings and router are compressed as well: vLLM keeps those plain, and decodes them as they load."""
    for name in ("llama", "mixtral"):
        folder = folders.compressed(name, "--include=*")
        with support.load(folders.plain(name), "zipserv") as flag, support.load(folder) as zip_:
            assert torch.equal(reference.logits(zip_.model, zip_.config, TOKENS), reference.logits(flag.model, flag.config, TOKENS))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_dtypes_are_served_uncompressed(folders, dtype) -> None:
    with support.load(folders.plain("llama"), dtype=dtype) as plain, support.load(folders.compressed("llama"), dtype=dtype) as zip_:
        assert not any("ZipServ" in type(m.quant_method).__name__ for m in zip_.modules().values())
        assert torch.equal(reference.logits(zip_.model, zip_.config, TOKENS), reference.logits(plain.model, plain.config, TOKENS))


def test_a_checkpoint_with_a_missing_weight_is_refused(folders, tmp_path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "missing"
    shutil.copytree(folders.plain("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.layers.1.mlp.gate_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match=r"layers.1.mlp.gate_up_proj.*holds no weight"):
        with support.load(folder, "zipserv"):
            pass


def test_a_newer_layout_is_refused() -> None:
    from zipserv.integrations.vllm.config import ZipServConfig

    with pytest.raises(ValueError, match="version 2"):
        ZipServConfig.from_config({"quant_method": "zipserv", "version": 2})


@pytest.mark.parametrize("form", ["stacked", "one-by-one"])
def test_stacked_experts(folders, tmp_path, form) -> None:
    """Experts stored as one three-dimensional tensor a layer, compressed as one blob or (transformers' way) one for each expert."""
    import json
    import shutil

    from safetensors.torch import load_file, save_file

    import zipserv

    folder = tmp_path / form
    shutil.copytree(folders.plain("qwen3-moe"), folder)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        parts = {part: [tensors.pop(f"{prefix}.{expert}.{part}.weight") for expert in range(8)] for part in ("gate_proj", "up_proj", "down_proj")}
        gate_up = [torch.cat(pair) for pair in zip(parts["gate_proj"], parts["up_proj"], strict=True)]
        for name, experts in (("gate_up_proj", gate_up), ("down_proj", parts["down_proj"])):
            if form == "stacked":
                tensors[f"{prefix}.{name}_zipserv"] = zipserv.compress(torch.stack(experts)).blob
            else:
                tensors |= {f"{prefix}.{name}.{i}_zipserv": zipserv.compress(expert).blob for i, expert in enumerate(experts)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "zipserv", "version": 1}
    (folder / "config.json").write_text(json.dumps(config))
    with support.load(folders.plain("qwen3-moe"), "zipserv") as flag, support.load(folder) as zip_:
        assert torch.equal(reference.logits(zip_.model, zip_.config, TOKENS), reference.logits(flag.model, flag.config, TOKENS))
