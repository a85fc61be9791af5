# SPDX-License-Identifier: Apache-2.0
"""transformers: tiny models of many architectures, compressed while loading, saved, loaded again."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

import zipserv  # noqa: E402
from zipserv import ZipEmbedding, ZipExperts, ZipLinear, ZipServConfig  # noqa: E402
from zipserv.conv import ZipConv  # noqa: E402
from zipserv.integrations.transformers import adopt  # noqa: E402

SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320}
GQA = {**SMALL, "num_key_value_heads": 2}
MOE = {**GQA, "moe_intermediate_size": 128, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
T5 = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4, "vocab_size": 320, "decoder_start_token_id": 0}

#: name -> (config class, its arguments, auto class)
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaConfig", {**GQA, "tie_word_embeddings": False}, "AutoModelForCausalLM"),
    "llama-tied": ("LlamaConfig", {**GQA, "tie_word_embeddings": True}, "AutoModelForCausalLM"),
    "mistral": ("MistralConfig", GQA, "AutoModelForCausalLM"),
    "qwen2": ("Qwen2Config", GQA, "AutoModelForCausalLM"),
    "qwen3": ("Qwen3Config", {**GQA, "head_dim": 32}, "AutoModelForCausalLM"),
    "gemma2": ("Gemma2Config", {**GQA, "head_dim": 32}, "AutoModelForCausalLM"),
    "gemma3": ("Gemma3TextConfig", {**GQA, "head_dim": 32}, "AutoModelForCausalLM"),
    "phi": ("PhiConfig", SMALL, "AutoModelForCausalLM"),
    "phi3": ("Phi3Config", {**GQA, "pad_token_id": 0}, "AutoModelForCausalLM"),
    "gpt2": ("GPT2Config", {"n_embd": 128, "n_layer": 2, "n_head": 4, "vocab_size": 320}, "AutoModelForCausalLM"),
    "mixtral": ("MixtralConfig", {**GQA, "num_local_experts": 4}, "AutoModelForCausalLM"),
    "qwen2-moe": ("Qwen2MoeConfig", {**MOE, "num_experts": 4, "shared_expert_intermediate_size": 128}, "AutoModelForCausalLM"),
    "qwen3-moe": ("Qwen3MoeConfig", {**MOE, "num_experts": 4, "head_dim": 32}, "AutoModelForCausalLM"),
    "t5": ("T5Config", T5, "AutoModelForSeq2SeqLM"),
    "bert": ("BertConfig", SMALL, "AutoModelForMaskedLM"),
    "vit": ("ViTConfig", {**SMALL, "image_size": 32, "patch_size": 8}, "AutoModelForImageClassification"),
}
CAUSAL = [name for name, (_, _, auto) in MODELS.items() if auto == "AutoModelForCausalLM"]


def make(name: str, folder: Path) -> Path:
    """A folder with a randomly initialised BF16 model."""
    if not (folder / "config.json").exists():
        config_class, arguments, auto = MODELS[name]
        config = getattr(transformers, config_class)(**arguments)
        torch.manual_seed(1)
        model = getattr(transformers, auto).from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder)
    return folder


def load(name: str, folder: Path, **kwargs: Any) -> Any:
    return getattr(transformers, MODELS[name][2]).from_pretrained(folder, dtype="auto", **kwargs)


def run(name: str, model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        if name == "vit":
            pixels = torch.randn(2, 3, 32, 32, generator=generator).to(torch.bfloat16)
            return model(pixel_values=pixels).logits
        ids = torch.randint(3, 320, (2, 9), generator=generator)
        if name == "t5":
            return model(input_ids=ids, decoder_input_ids=ids[:, :4]).logits
        return model(input_ids=ids).logits


def reference(name: str, folder: Path) -> Any:
    model = load(name, folder)
    if "moe" in name or name == "mixtral":
        model.set_experts_implementation("eager")  # the same order of additions
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return lambda name: make(name, tmp_path_factory.getbasetemp() / "models" / name)


def compressed_modules(model: Any) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, ZipLinear | ZipEmbedding | ZipExperts | ZipConv)]


@pytest.mark.parametrize("name", MODELS)
def test_compresses_while_loading_and_round_trips(name: str, folders: Any, tmp_path: Path) -> None:
    plain_folder = folders(name)
    plain = reference(name, plain_folder)
    expected = run(name, plain)

    model = load(name, plain_folder, quantization_config=ZipServConfig())
    assert compressed_modules(model)
    assert not [key for key, p in model.named_parameters() if p.dim() > 1 and p.numel() >= 64 * 64], "stayed dense"
    assert any(isinstance(m, ZipExperts) for m in model.modules()) == ("moe" in name or name == "mixtral")
    assert any(isinstance(m, ZipConv) for m in model.modules()) == (name == "vit")
    assert torch.equal(run(name, model), expected)

    model.save_pretrained(tmp_path / "zip")
    assert json.loads((tmp_path / "zip" / "config.json").read_text())["quantization_config"]["quant_method"] == "zipserv"
    before = zipserv.load_file(plain_folder)
    after = zipserv.load_file(tmp_path / "zip")
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        stored = after[key]
        restored = stored.decompress() if isinstance(stored, zipserv.ZipTensor) else stored
        assert restored.shape == tensor.shape and torch.equal(restored.view(torch.int16), tensor.view(torch.int16)), key
    assert size(tmp_path / "zip") < 0.8 * size(plain_folder)

    again, info = load(name, tmp_path / "zip", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert len(compressed_modules(again)) == len(compressed_modules(model))
    assert torch.equal(run(name, again), expected)

    dense = again.dequantize()
    assert not compressed_modules(dense)
    assert torch.equal(run(name, dense), expected)
    dense.save_pretrained(tmp_path / "dense")
    assert zipserv.load_file(tmp_path / "dense").keys() == before.keys()


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "qwen2-moe", "vit"])
def test_compress_model_in_place(name: str, folders: Any, tmp_path: Path) -> None:
    model = reference(name, folders(name))
    expected = run(name, model)
    report = zipserv.compress_model(model)
    assert report.ratio > 1.25 and not [layer for layer in report.layers if layer.status == "kept" and layer.before > 8192]
    assert torch.equal(run(name, model), expected)
    adopt(model)
    again = reload(model, tmp_path)
    assert len(compressed_modules(again)) == len(compressed_modules(model))
    assert zipserv.load_file(tmp_path).keys() == zipserv.load_file(folders(name)).keys()
    assert torch.equal(run(name, again), expected)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "mixtral"])
@pytest.mark.parametrize("arguments", [[], ["--include", "*"]], ids=["default", "everything"])
def test_a_folder_from_the_command_line(name: str, arguments: list[str], folders: Any, tmp_path: Path) -> None:
    from zipserv.cli import run as zipserv_command

    assert zipserv_command(["compress", str(folders(name)), str(tmp_path / "zip"), *arguments]) == 0
    model, info = load(name, tmp_path / "zip", output_loading_info=True)
    assert compressed_modules(model) and not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(run(name, model), run(name, reference(name, folders(name))))


@pytest.mark.parametrize("name", [*CAUSAL, "t5"])
def test_generates_the_same_tokens(name: str, folders: Any) -> None:
    ids = torch.randint(3, 320, (1, 6), generator=torch.Generator().manual_seed(3))
    arguments = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    expected = reference(name, folders(name)).generate(ids, **arguments)
    model = load(name, folders(name), quantization_config=ZipServConfig())
    assert torch.equal(model.generate(ids, **arguments), expected)


#: Merged groups of the two layers of each model: q, k and v; gate and up.
MERGED = {"llama": 4, "llama-tied": 4, "mistral": 4, "qwen2": 4, "qwen3": 4, "gemma2": 4, "gemma3": 4, "phi": 2, "phi3": 0, "gpt2": 0,
          "mixtral": 2, "qwen2-moe": 4, "qwen3-moe": 2, "t5": 6, "bert": 2, "vit": 2}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_merged_layers_as_on_a_gpu(name: str, folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One product for each group, in code that knows nothing of it: results are views into wider ones."""
    from zipserv import merged

    model = load(name, folders(name), quantization_config=ZipServConfig())
    groups = {id(module._group) for module in model.modules() if isinstance(module, merged.MergedLinear)}
    assert len(groups) == MERGED[name]
    expected = run(name, model)
    products: list[int] = []
    monkeypatch.setattr(merged, "_SHARED_ON", frozenset({"cpu"}))
    monkeypatch.setattr(merged, "linear_blob", lambda *arguments: products.append(1) or zipserv.tensor.linear_blob(*arguments))
    torch.testing.assert_close(run(name, model), expected, rtol=3e-2, atol=3e-2)
    assert len(products) == len(groups)
    apart = load(name, folders(name), quantization_config=ZipServConfig(merge=False))
    assert not any(isinstance(module, merged.MergedLinear) for module in apart.modules())
    assert torch.equal(run(name, apart), expected)


def test_merging_is_no_matter_of_files(folders: Any, tmp_path: Path) -> None:
    made = load("llama", folders("llama"), quantization_config=ZipServConfig())
    apart = load("llama", folders("llama"), quantization_config=ZipServConfig(merge=False))
    for model, folder in ((made, tmp_path / "merged"), (apart, tmp_path / "apart")):
        model.save_pretrained(folder)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "merged" / file).read_bytes() == (tmp_path / "apart" / file).read_bytes()
    assert "merge" not in json.loads((tmp_path / "merged" / "config.json").read_text())["quantization_config"]


def test_tied_weights_are_compressed_once(folders: Any, tmp_path: Path) -> None:
    model = load("llama-tied", folders("llama-tied"), quantization_config=ZipServConfig())
    for each in (model, model.to("cpu"), reload(model, tmp_path)):
        assert each.lm_head.weight_zipserv is each.model.embed_tokens.weight_zipserv
    assert "lm_head.weight" not in zipserv.load_file(tmp_path)


def reload(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


def test_modules_to_not_convert(folders: Any, tmp_path: Path) -> None:
    config = ZipServConfig(modules_to_not_convert=["lm_head", "model.layers.1", r"model\.layers\.\d+\.self_attn"])
    model = load("llama", folders("llama"), quantization_config=config)
    kept = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    assert kept == {"lm_head", *(f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qkvo")} | {
        f"model.layers.1.mlp.{p}_proj" for p in ("gate", "up", "down")
    }
    again = reload(model, tmp_path)
    assert {name for name, module in again.named_modules() if type(module) is torch.nn.Linear} == kept
    assert torch.equal(run("llama", again), run("llama", load("llama", folders("llama"))))


def test_a_tied_weight_that_must_stay_dense_on_one_side_stays_dense_on_both(folders: Any) -> None:
    model = load("llama-tied", folders("llama-tied"), quantization_config=ZipServConfig(modules_to_not_convert=["lm_head"]))
    assert type(model.model.embed_tokens) is torch.nn.Embedding
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(model.model.layers[0].mlp.up_proj, ZipLinear)


def test_sharded_checkpoints(folders: Any, tmp_path: Path) -> None:
    plain = load("mixtral", folders("mixtral"))
    plain.save_pretrained(tmp_path / "plain", max_shard_size="200KB")
    model = load("mixtral", tmp_path / "plain", quantization_config=ZipServConfig())
    model.save_pretrained(tmp_path / "zip", max_shard_size="200KB")
    assert len(list((tmp_path / "zip").glob("*.safetensors"))) > 2
    again = load("mixtral", tmp_path / "zip")
    assert torch.equal(run("mixtral", again), run("mixtral", model))


def test_device_map_and_half_precision(folders: Any) -> None:
    pytest.importorskip("accelerate")
    model = load("llama", folders("llama"), quantization_config=ZipServConfig(), device_map={"": "cpu"})
    assert torch.equal(run("llama", model), run("llama", load("llama", folders("llama"))))
    auto = getattr(transformers, MODELS["llama"][2])
    half = auto.from_pretrained(folders("llama"), dtype=torch.float16, quantization_config=ZipServConfig())
    plain = auto.from_pretrained(folders("llama"), dtype=torch.float16)
    assert half.lm_head.weight_dtype == torch.float16
    assert torch.equal(run("llama", half), run("llama", plain))


def test_float32_stays_as_it_is_and_says_so(folders: Any, caplog: pytest.LogCaptureFixture) -> None:
    auto = getattr(transformers, MODELS["llama"][2])
    model = auto.from_pretrained(folders("llama"), dtype=torch.float32, quantization_config=ZipServConfig())
    assert not compressed_modules(model)
    assert "compressed nothing" in caplog.text and "dtype=torch.bfloat16" in caplog.text


def test_a_folder_with_dense_experts_and_compressed_ones(folders: Any, tmp_path: Path) -> None:
    """Whoever wrote the folder may have left single experts alone; their order must hold."""
    model = load("mixtral", folders("mixtral"), quantization_config=ZipServConfig())
    model.save_pretrained(tmp_path)
    tensors = zipserv.load_file(tmp_path)
    mixed = {key: t.decompress() if isinstance(t, zipserv.ZipTensor) and ".experts.1." in key else t for key, t in tensors.items()}
    zipserv.save_file(mixed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = load("mixtral", tmp_path)
    assert torch.equal(run("mixtral", again), run("mixtral", model))


MIXTURES = ["mixtral", "qwen2-moe", "qwen3-moe"]


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Experts as on a GPU, by the ops' CPU forms; the tokens of each product."""
    from zipserv import grouped
    from zipserv.integrations.transformers import experts

    products: list[int] = []
    multiply = grouped.multiply
    monkeypatch.setattr(experts, "_TOGETHER_ON", frozenset({"cpu"}))
    monkeypatch.setattr(grouped, "multiply", lambda x, *args, **kwargs: products.append(len(x)) or multiply(x, *args, **kwargs))
    return products


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_together_as_on_a_gpu(name: str, folders: Any, together: list[int]) -> None:
    model = load(name, folders(name), quantization_config=ZipServConfig())
    found = run(name, model)
    assert together == [18, 18], "one product a layer, of both sequences' tokens"
    model.set_experts_implementation("eager")
    torch.testing.assert_close(found, run(name, model), rtol=3e-2, atol=1e-2)
    assert len(together) == 2
    plain = model.dequantize()
    plain.set_experts_implementation("zipserv")  # nothing is compressed any more
    assert torch.equal(run(name, plain), run(name, reference(name, folders(name)))) and len(together) == 2


@pytest.mark.parametrize("name", MIXTURES)
@torch.no_grad()
def test_experts_together_are_one_graph(name: str, folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """For torch.compile, and so for CUDA graphs: nothing asks which experts were chosen, for any number of tokens."""
    from zipserv.integrations.transformers import experts

    monkeypatch.setattr(experts, "_TOGETHER_ON", frozenset({"cpu"}))
    model = load(name, folders(name), quantization_config=ZipServConfig())
    torch._dynamo.reset()  # models share transformers' code, and so its limit of recompilations
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for tokens in (9, 1, 40):
        ids = torch.randint(3, 320, (2, tokens), generator=torch.Generator().manual_seed(tokens))
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=1e-2, atol=1e-2)


def test_experts_one_by_one_where_that_is_right(folders: Any, together: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tokens, a gradient, another dtype, an expert that does not shrink, the switch; never by chance."""
    from zipserv import grouped
    from zipserv.integrations.transformers import experts

    model = load("mixtral", folders("mixtral"), quantization_config=ZipServConfig())
    layer = model.model.layers[0].mlp.experts
    x, ids = torch.randn(6, 128).bfloat16(), torch.randint(0, 4, (6, 2))
    share = torch.rand(6, 2)
    with torch.no_grad():
        want = layer(x, ids, share)
        assert together == [6]
        assert layer(x, ids, share.bfloat16()).shape == want.shape and together == [6, 6]
        together.clear()
        many = 1 + 64 * 4 // 2
        layer(torch.randn(many, 128).bfloat16(), torch.randint(0, 4, (many, 2)), torch.rand(many, 2))
        assert layer(x[:0], ids[:0], share[:0]).shape == (0, 128)
    asked = x.clone().requires_grad_()
    layer(asked, ids, share).float().sum().backward()
    assert asked.grad is not None and asked.grad.abs().sum() > 0
    with torch.no_grad():
        layer(asked, ids, share)
        assert together == [6], "a gradient that is not recorded is no obstacle"
        together.clear()
        for change in (
            lambda patch: patch.setattr(grouped, "ENABLED", False),
            lambda patch: patch.setattr(experts, "_TOGETHER_ON", frozenset({"cuda"})),
            lambda patch: patch.setattr(layer, "is_transposed", True),
            lambda patch: layer.down_proj.split(),  # as experts are of which one is stored raw
        ):
            with monkeypatch.context() as patch:
                change(patch)
                torch.testing.assert_close(layer(x, ids, share), want, rtol=3e-2, atol=1e-3)
        auto = getattr(transformers, MODELS["mixtral"][2])
        half = auto.from_pretrained(folders("mixtral"), dtype=torch.float16, quantization_config=ZipServConfig())
        assert half.model.layers[0].mlp.experts.gate_up_proj.together() is not None and run("mixtral", half).dtype == torch.float16
    assert not together


def test_experts_that_travel_have_buffers_of_their_own(folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate's offload moves single buffers by the names in a state dict."""
    from zipserv.integrations.transformers import modules

    monkeypatch.setattr(modules, "_take_down_hooks", lambda model: {"model.layers.0": 0, "model.layers.1": "cpu"})
    monkeypatch.setattr(modules, "_put_back_hooks", lambda model, device_map: None)
    model = load("mixtral", folders("mixtral"), quantization_config=ZipServConfig())
    all_experts = [module for module in model.modules() if isinstance(module, ZipExperts)]
    assert len(all_experts) == 4 and all(len(list(experts.buffers())) == 4 for experts in all_experts)
    assert torch.equal(run("mixtral", model), run("mixtral", reference("mixtral", folders("mixtral"))))


def test_other_activations_are_the_models_own(together: list[int]) -> None:
    """What the kernel has at its end is SiLU and gates; all else is the module's."""
    from zipserv.integrations.transformers.experts import _activation

    config = transformers.MixtralConfig(**{**GQA, "num_local_experts": 4, "hidden_act": "gelu"})
    torch.manual_seed(2)
    model = transformers.MixtralForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    zipserv.compress_model(model)
    layer = model.model.layers[0].mlp.experts
    assert not _activation(layer)[1]
    found = run("mixtral", model)
    assert together == [18, 18]
    model.set_experts_implementation("eager")
    torch.testing.assert_close(found, run("mixtral", model), rtol=3e-2, atol=1e-2)
    silu = transformers.MixtralForCausalLM._from_config(transformers.MixtralConfig(**{**GQA, "num_local_experts": 4})).model.layers[0].mlp.experts
    assert _activation(silu)[1]


def test_the_largest_layer_bounds_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense weights alive at the same time while loading."""
    from zipserv.integrations.transformers import ZipServQuantizer

    config = transformers.LlamaConfig(**{**GQA, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "vocab_size": 256})
    torch.manual_seed(0)
    transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    alive, peak, total = [0], [0], [0]
    keep = ZipServQuantizer.keep_compressed

    def watched(self: ZipServQuantizer, name: str, weight: torch.Tensor) -> torch.Tensor:
        size = weight.untyped_storage().nbytes()
        alive[0] += size
        total[0] += size
        peak[0] = max(peak[0], alive[0])
        weakref.finalize(weight, lambda: alive.__setitem__(0, alive[0] - size))
        return keep(self, name, weight)

    monkeypatch.setattr(ZipServQuantizer, "keep_compressed", watched)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", quantization_config=ZipServConfig())
    largest = 2 * 256 * 512
    assert total[0] > 20 * largest
    assert largest <= peak[0] <= 2 * largest


@pytest.mark.parametrize(("first", "second"), [("zipserv", "transformers.quantizers.auto"), ("transformers.quantizers.auto", "zipserv")])
def test_import_order_does_not_matter_and_import_is_lazy(first: str, second: str) -> None:
    code = f"""
import sys
import {first}
assert {first!r} != "zipserv" or "transformers" not in sys.modules
import {second}
import transformers.quantizers.auto as auto
assert "zipserv" in auto.AUTO_QUANTIZER_MAPPING and "zipserv" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING
assert auto.__spec__.loader is auto.__loader__ and auto.__file__.endswith("auto.py")
"""
    subprocess.run([sys.executable, "-W", "error::RuntimeWarning", "-c", code], check=True)


def test_config_refuses_what_it_does_not_know() -> None:
    with pytest.raises(TypeError, match="a list of names"):
        ZipServConfig(modules_to_not_convert="lm_head")
    with pytest.raises(TypeError):
        ZipServConfig(bits=4)
    with pytest.raises(zipserv.Error, match="use a newer zipserv"):
        ZipServConfig(version=2)
    with pytest.raises(ValueError, match="quant_method"):
        ZipServConfig(quant_method="gptq")


def test_disk_is_refused_clearly(folders: Any) -> None:
    with pytest.raises(ValueError, match="'disk'"):
        load("llama", folders("llama"), quantization_config=ZipServConfig(), device_map={"model": "cpu", "lm_head": "disk"})


@torch.no_grad()
def test_conv1d_keeps_its_orientation_in_files(folders: Any, tmp_path: Path) -> None:
    """GPT-2's weights are transposed linear weights; the square ones would not be noticed by shape."""
    plain = reference("gpt2", folders("gpt2"))
    expected = run("gpt2", plain)
    zipserv.save_file({"transformer.h.0.attn.c_proj.weight": zipserv.compress(plain.transformer.h[0].attn.c_proj.weight)}, tmp_path / "one")
    zipserv.load_model(plain, tmp_path / "one", strict=False)
    assert isinstance(plain.transformer.h[0].attn.c_proj, ZipLinear) and torch.equal(run("gpt2", plain), expected)
    zipserv.compress_model(plain)
    other = reference("gpt2", folders("gpt2"))
    torch.nn.init.zeros_(other.transformer.h[0].mlp.c_fc.bias)
    zipserv.compress_model(other)
    other.load_state_dict(plain.state_dict())
    assert torch.equal(run("gpt2", other), expected)


def test_sharded_parameters_are_refused_clearly(tmp_path: Path) -> None:
    from torch.distributed.tensor import distribute_tensor

    from zipserv.integrations.transformers import ZipServQuantizer

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        model[0].weight = torch.nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh))
        quantizer = ZipServQuantizer(ZipServConfig())
        quantizer.targets = {"0.weight": "linear"}
        with pytest.raises(ValueError, match="without tp_plan"):
            quantizer.param_needs_quantization(model, "0.weight")
        assert not quantizer.param_needs_quantization(model, "0.bias")
    finally:
        torch.distributed.destroy_process_group()


def test_a_damaged_blob_is_an_error_that_names_the_weight(folders: Any, tmp_path: Path) -> None:
    model = load("llama", folders("llama"), quantization_config=ZipServConfig())
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    data = bytearray(file.read_bytes())
    at = data.index(b"ZIPSERV\0") + 16
    data[at] ^= 1
    file.write_bytes(data)
    with pytest.raises(RuntimeError) as caught:
        load("llama", tmp_path)
    assert "zipserv" in str(caught.value).lower() or "conversion" in str(caught.value).lower()
