# SPDX-License-Identifier: Apache-2.0
"""Whole models on a GPU: loading, graphs, compiled generation, offload. Run by hand or by the GPU script, not in CI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

import test_transformers as tiny  # noqa: E402
from zipserv import ZipEmbedding, ZipExperts, ZipLinear, ZipServConfig, offload  # noqa: E402
from zipserv.bench import model as bench  # noqa: E402

IDS = torch.randint(3, 2048, (2, 33), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    config = transformers.LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=4, vocab_size=2048
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return path


def load(path: Path, **kwargs: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto", **kwargs)


@torch.no_grad()
def error(model: Any, exact: torch.Tensor) -> float:
    return float((model(IDS.cuda()).logits.double() - exact).square().mean().sqrt())


@torch.no_grad()
def test_as_exact_as_the_uncompressed_model(folder: Path, tmp_path: Path) -> None:
    plain = load(folder, device_map="cuda")
    exact = load(folder, device_map="cuda").double()(IDS.cuda()).logits
    model = load(folder, device_map="cuda", quantization_config=ZipServConfig())
    assert isinstance(model.lm_head, ZipLinear) and isinstance(model.model.embed_tokens, ZipEmbedding)
    assert all(tensor.is_cuda for tensor in [*model.parameters(), *model.buffers()])
    assert torch.equal(model.model.embed_tokens(IDS.cuda()), plain.model.embed_tokens(IDS.cuda()))
    assert error(model, exact) <= 1.1 * error(plain, exact)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, device_map="cuda")
    assert torch.equal(again(IDS.cuda()).logits, model(IDS.cuda()).logits)
    assert torch.equal(again.dequantize()(IDS.cuda()).logits, plain(IDS.cuda()).logits)


@torch.no_grad()
def test_embedding_of_a_long_prompt() -> None:
    table = torch.nn.Embedding(3001, 192, device="cuda", dtype=torch.bfloat16)
    made = ZipEmbedding.from_embedding(table)
    for count in (1, 40, 511, 512, 3000):
        ids = torch.randint(0, 3001, (count,), device="cuda")
        assert torch.equal(made(ids), table(ids)), count
    graph, ids = torch.cuda.CUDAGraph(), torch.randint(0, 3001, (600,), device="cuda")
    made(ids)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        rows = made(ids)
    for _ in range(3):
        ids.copy_(torch.randint(0, 3001, (600,), device="cuda"))
        graph.replay()
        assert torch.equal(rows, table(ids))


def test_memory_while_loading(folder: Path) -> None:
    torch.cuda.empty_cache()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = load(folder, device_map="cuda", quantization_config=ZipServConfig())
    held = torch.cuda.memory_allocated() - base
    dense = sum(2 * p.numel() for p in load(folder).parameters())
    largest = 2 * 2816 * 1024
    assert held < 0.73 * dense
    assert torch.cuda.max_memory_allocated() - base < held + 4 * largest + (16 << 20)
    del model


@torch.no_grad()
def test_compiled_generation_with_a_static_cache(folder: Path) -> None:
    model = load(folder, device_map="cuda", quantization_config=ZipServConfig())
    arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(IDS[:1]).cuda()}
    compiled = model.generate(IDS[:1].cuda(), cache_implementation="static", **arguments)
    assert compiled.shape[1] == IDS.shape[1] + 12
    # Greedy tokens of a random model hang on near ties, so: each is a best one by eager logits, but for rounding.
    logits = model(compiled[:, :-1]).logits.float()[:, IDS.shape[1] - 1 :]
    chosen = logits.gather(-1, compiled[:, IDS.shape[1] :, None]).squeeze(-1)
    assert (logits.amax(-1) - chosen).max() <= 2.0**-6 * logits.abs().amax()


@torch.no_grad()
def test_compile_reduce_overhead(folder: Path) -> None:
    model = load(folder, device_map="cuda", quantization_config=ZipServConfig())
    expected = model(IDS.cuda()).logits
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(compiled(IDS.cuda()).logits, expected, rtol=5e-2, atol=5e-2)


@torch.no_grad()
def test_accelerate_offload_to_the_cpu(folder: Path) -> None:
    pytest.importorskip("accelerate")
    plain = load(folder, device_map="cuda")
    device_map = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 0, "lm_head": 0}
    device_map |= {f"model.layers.{i}": (0 if i < 2 else "cpu") for i in range(4)}
    model = load(folder, device_map=device_map, quantization_config=ZipServConfig())
    torch.testing.assert_close(model(IDS.cuda()).logits, plain(IDS.cuda()).logits, rtol=5e-2, atol=5e-2)


@torch.no_grad()
def test_offload_streams(folder: Path) -> None:
    plain = load(folder, device_map="cuda")
    expected = plain(IDS.cuda()).logits
    del plain
    model = load(folder, quantization_config=ZipServConfig())
    torch.cuda.empty_cache()
    base = torch.cuda.memory_allocated()
    handle = offload.apply(model)
    assert torch.cuda.memory_allocated() - base < handle.device_bytes + (8 << 20)
    for _ in range(4):
        torch.testing.assert_close(model(IDS).logits, expected, rtol=5e-2, atol=5e-2)
    # Host and device do not wait for each other: a long series in one go is still right.
    outputs = [model(IDS).logits for _ in range(16)]
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize("offloaded", [None, "cpu"])
def test_bench(offloaded: str | None) -> None:
    result = bench.run("tiny", device="cuda", batch=(1, 4), prompt=32, new_tokens=8, rounds=2, offload=offloaded)
    print(bench.format_rows(result))
    assert result["graphs"] == (offloaded is None)
    assert all(row["zipserv"]["decode_tokens_per_second"] > 0 for row in result["rows"])


# --- every architecture of test_transformers, as it runs on a GPU: merged layers, fused kernels, captured graphs ------------------------


def on_gpu(name: str, path: Path, **kwargs: Any) -> Any:
    model = tiny.load(name, path, device_map="cuda", **kwargs)
    return model if "quantization_config" in kwargs else one_by_one(name, model)


def one_by_one(name: str, model: Any) -> Any:
    """Experts in a loop: the only implementation for float64, and the order of additions of the compressed ones."""
    if "moe" in name or name == "mixtral":
        model.set_experts_implementation("eager")
    return model


@torch.no_grad()
def logits(name: str, model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    if name == "vit":
        return model(pixel_values=torch.randn(2, 3, 32, 32, generator=generator).to("cuda", model.dtype)).logits
    ids = torch.randint(3, 320, (2, 9), generator=generator).cuda()
    return model(input_ids=ids, **({"decoder_input_ids": ids[:, :4]} if name == "t5" else {})).logits


def of_row(a: torch.Tensor, b: torch.Tensor) -> float:
    """The median distance of rows: a router that is near a tie may send a token elsewhere after a rounding."""
    return float(((a.double() - b.double()).norm(dim=-1) / b.double().norm(dim=-1)).median())


@pytest.mark.parametrize("name", tiny.MODELS)
def test_architectures(name: str, tmp_path: Path) -> None:
    path = tiny.make(name, tmp_path / "plain")
    plain, exact = logits(name, on_gpu(name, path)), logits(name, on_gpu(name, path).double())
    model = on_gpu(name, path, quantization_config=ZipServConfig())
    assert tiny.compressed_modules(model)
    found = logits(name, model)
    assert of_row(found, exact) <= 1.5 * of_row(plain, exact)
    model.save_pretrained(tmp_path / "zip")
    again = on_gpu(name, tmp_path / "zip")
    assert of_row(logits(name, again), exact) <= 1.5 * of_row(plain, exact)
    assert torch.equal(logits(name, one_by_one(name, again.dequantize())), plain), "the weights have other bits"


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "gemma3", "gpt2", "mixtral", "qwen3-moe"])
@torch.no_grad()
def test_tokens_and_captured_steps(name: str, tmp_path: Path) -> None:
    """Greedy tokens, eager and with a static cache, and a captured forward pass."""
    path = tiny.make(name, tmp_path / "plain")
    plain, model = on_gpu(name, path), on_gpu(name, path, quantization_config=ZipServConfig())
    ids = torch.randint(3, 320, (1, 6), generator=torch.Generator().manual_seed(3)).cuda()
    arguments = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    tokens = [each.generate(ids, **arguments) for each in (plain, model)]
    if name != "gpt2":
        tokens.append(model.generate(ids, cache_implementation="static", **arguments))
    first = {int(each[0, 6]) for each in tokens}
    assert all((each == tokens[0]).float().mean() > 0.7 for each in tokens) or len(first) == 1
    expected = model(ids).logits
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=name in tiny.MIXTURES)
    for _ in range(3):
        assert of_row(compiled(ids).logits.clone(), expected) < 0.02


@pytest.mark.parametrize("name", tiny.MIXTURES)
@torch.no_grad()
def test_experts_together(name: str, tmp_path: Path) -> None:
    """As exact as one by one; nothing waits for the device, and a CUDA graph follows the router."""
    path = tiny.make(name, tmp_path / "plain")
    exact = logits(name, on_gpu(name, path).double())
    model = on_gpu(name, path, quantization_config=ZipServConfig())
    found = logits(name, model)
    apart = logits(name, one_by_one(name, model))
    assert of_row(found, exact) <= 1.5 * of_row(apart, exact) and of_row(found, apart) < 0.02
    model.set_experts_implementation("zipserv")
    layer = next(m for m in model.modules() if hasattr(m, "gate_up_proj") and isinstance(m.gate_up_proj, ZipExperts))
    count = len(layer.gate_up_proj)
    x, share = torch.randn(6, 128, device="cuda").bfloat16(), torch.rand(6, 2, device="cuda")
    ids = torch.rand(6, count, device="cuda").topk(2).indices
    layer(x, ids, share)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x, ids, share)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x, ids, share)
    for _ in range(4):
        x.normal_()
        ids.copy_(torch.rand(6, count, device="cuda").topk(2).indices)
        graph.replay()
        one_by_one(name, model)
        assert of_row(y, layer(x, ids, share)) < 0.02
        model.set_experts_implementation("zipserv")


@torch.no_grad()
def test_accelerate_offload_of_experts(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    path = tiny.make("mixtral", tmp_path / "plain")
    whole = on_gpu("mixtral", path, quantization_config=ZipServConfig())
    device_map = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 0, "lm_head": 0, "model.layers.0": 0, "model.layers.1": "cpu"}
    model = tiny.load("mixtral", path, device_map=device_map, quantization_config=ZipServConfig())
    for _ in range(2):
        assert of_row(logits("mixtral", model), logits("mixtral", whole)) < 0.02


def test_an_adapter_trains(folder: Path) -> None:
    """On merged layers: PEFT's losses as on the uncompressed model, the base's bytes as they were, nothing of it in the optimizer."""
    peft = pytest.importorskip("peft")
    losses = []
    for config in ({"quantization_config": ZipServConfig()}, {}):
        torch.manual_seed(3)
        model = peft.get_peft_model(load(folder, device_map="cuda", **config), peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
        before = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("_zipserv")}
        assert bool(before) == bool(config)
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(p.is_floating_point() for p in trained)
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        own = []
        for _ in range(4):
            loss = model(input_ids=IDS.cuda(), labels=IDS.cuda()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            own.append(float(loss.detach()))
        losses.append(own)
        assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers() if name in before)
    assert losses[0][-1] < losses[0][0] and losses[0] == pytest.approx(losses[1], rel=3e-2)


@torch.no_grad()
def test_a_model_over_two_gpus(folder: Path) -> None:
    """accelerate's `device_map` over several GPUs: the layers' device counts, not torch's current one."""
    pytest.importorskip("accelerate")
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    plain = load(folder, device_map="cuda:0")
    device_map = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    device_map |= {f"model.layers.{i}": i // 2 for i in range(4)}
    model = load(folder, device_map=device_map, quantization_config=ZipServConfig())
    assert {tensor.device.index for tensor in model.buffers()} == {0, 1}
    for _ in range(3):
        found = model(IDS.cuda()).logits
        assert of_row(found.to("cuda:0"), plain(IDS.cuda()).logits) < 0.02
    assert model.generate(IDS[:1].cuda(), max_new_tokens=4, do_sample=False).shape == (1, 37)
