# SPDX-License-Identifier: Apache-2.0
"""Adapters (PEFT, LoRA) on top of compressed layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers", minversion="5.0")

import zipserv  # noqa: E402
from zipserv import ZipLinear, ZipServConfig  # noqa: E402
from zipserv.integrations.peft import decompress_adapted  # noqa: E402

IDS = torch.randint(3, 256, (2, 8), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=256
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return path


def load(folder: Path, compressed: bool = True) -> Any:
    config = {"quantization_config": ZipServConfig()} if compressed else {}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **config)


def lora(model: Any, **kwargs: Any) -> Any:
    torch.manual_seed(3)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **kwargs))


def blobs(model: Any) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("_zipserv")}


def test_adapters_train_and_the_base_stays_compressed(folder: Path) -> None:
    model, plain = lora(load(folder)), lora(load(folder, compressed=False))
    before = blobs(model)
    assert len(before) == 10  # the table, the head, and four of each layer: qkv, o, gate and up, down
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    losses = []
    for each in (model, plain):
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=1e-2)
        own = []
        for _ in range(4):
            loss = each(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            own.append(float(loss.detach()))
        losses.append(own)
    assert losses[0][-1] < losses[0][0]
    # The forward pass is the same; the gradient of x is added up in another order.
    assert losses[0][0] == losses[1][0] and losses[0] == pytest.approx(losses[1], rel=2e-2)
    assert all(torch.equal(buffer, before[name]) for name, buffer in blobs(model).items())


@torch.no_grad()
def test_adapters_on_merged_layers_as_on_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zipserv import merged

    model = lora(load(folder), init_lora_weights=False).eval()
    expected = model(input_ids=IDS).logits
    monkeypatch.setattr(merged, "_SHARED_ON", frozenset({"cpu"}))
    products = []
    monkeypatch.setattr(merged, "linear_blob", lambda *arguments: products.append(1) or zipserv.tensor.linear_blob(*arguments))
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=2e-2, atol=2e-2)
    assert len(products) == 4  # two layers: qkv with an adapter on q, gate and up
    decompress_adapted(model)
    assert type(model.base_model.model.model.layers[0].self_attn.k_proj) is ZipLinear
    assert isinstance(model.base_model.model.model.layers[0].mlp.up_proj, merged.MergedLinear)
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=2e-2, atol=2e-2)


def test_adapter_round_trip(folder: Path, tmp_path: Path) -> None:
    model = lora(load(folder), init_lora_weights=False)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load(folder), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, expected)


def test_merging_into_a_compressed_layer_is_refused(folder: Path) -> None:
    model = lora(load(folder), init_lora_weights=False)
    before = blobs(model)
    with pytest.raises((zipserv.Error, AttributeError), match="compressed|to_linear"):
        model.merge_and_unload()
    assert all(torch.equal(buffer, before[name]) for name, buffer in blobs(model).items())


def test_merging_after_decompression(folder: Path) -> None:
    model = lora(load(folder), init_lora_weights=False)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    decompressed = decompress_adapted(model)
    assert sorted(decompressed) == sorted(
        f"base_model.model.model.layers.{i}.{n}.base_layer" for i in (0, 1) for n in ("mlp.down_proj", "self_attn.q_proj")
    )
    merged = model.merge_and_unload()
    assert type(merged.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert isinstance(merged.model.layers[0].mlp.up_proj, ZipLinear)
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=5e-2, atol=5e-3)
