# SPDX-License-Identifier: Apache-2.0
"""``zipserv plan``: sizes against the models themselves, arithmetic by hand, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cli_helpers import Zipserv, weight
from zipserv import compress, plan
from zipserv.bench.shapes import SHAPES
from zipserv.plan import architecture, capacity, compression, models, speed

GIB = 1 << 30

# Every size differs from every other, so that none can be taken for another.
SIZES: dict[str, Any] = dict(
    hidden_size=96, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=40, vocab_size=500,
)  # fmt: skip
MOE: dict[str, Any] = dict(moe_intermediate_size=72, num_experts=6, num_local_experts=6, num_experts_per_tok=2)
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama with biases": dict(attention_bias=True, mlp_bias=True),
    "llama tied": dict(tie_word_embeddings=True),
    "mistral": {},
    "qwen2": dict(head_dim=24),
    "qwen3": {},
    "phi3": dict(head_dim=24, pad_token_id=0),
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "mixtral": dict(num_local_experts=6, num_experts_per_tok=2),
    "qwen2_moe": dict(MOE, shared_expert_intermediate_size=136, head_dim=24),
    "qwen3_moe": dict(MOE, mlp_only_layers=[1]),
    "deepseek_v3": dict(
        MOE, num_key_value_heads=4, n_routed_experts=6, n_shared_experts=2, q_lora_rank=48, kv_lora_rank=32, qk_nope_head_dim=16,
        qk_rope_head_dim=8, v_head_dim=24, first_k_dense_replace=1, n_group=2, topk_group=1,
    ),
}  # fmt: skip


def config_of(kind: str) -> dict[str, Any]:
    return {"model_type": kind.split()[0], **SIZES, **KINDS[kind]}


@pytest.fixture
def zipserv(capsys: pytest.CaptureFixture[str]) -> Zipserv:
    return Zipserv(capsys)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_of_the_model(kind: str) -> None:
    """transformers builds the model from the same configuration, without memory; buffers of the router's bias count, too."""
    transformers = pytest.importorskip("transformers")
    values = config_of(kind)
    settings = transformers.AutoConfig.for_model(**values)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
    count = sum(p.numel() for p in model.parameters()) + sum(b.numel() for n, b in model.named_buffers() if "score_correction" in n)
    assert architecture.layout(values).parameters == count
    assert architecture.layout({**settings.to_dict(), **({"dtype": None, "torch_dtype": None})}).parameters == count


@pytest.mark.parametrize("model", models.KNOWN)
def test_known_models_are_those_of_the_benchmark(model: str) -> None:
    found = {(matrix.m, matrix.k) for matrix in architecture.layout(models.KNOWN[model]).matrices}
    shapes = {(s.m, s.k) for s in SHAPES if s.model == model}
    assert shapes and shapes <= found
    assert {s.model for s in SHAPES} == set(models.KNOWN)


@pytest.mark.parametrize(("model", "parameters"), [("llama-3.1-8b", 8_030_261_248), ("qwen2.5-7b", 7_615_616_512), ("llama-3.1-70b", 70_553_706_496)])
def test_known_models_have_their_published_size(model: str, parameters: int) -> None:
    assert architecture.layout(models.KNOWN[model]).parameters == parameters


@pytest.mark.parametrize("kind", ["llama", "mixtral", "deepseek_v3", "gemma3_text"])
def test_ranks_hold_the_model_between_them(kind: str) -> None:
    one, two = (architecture.layout(config_of(kind), tp) for tp in (1, 2))
    assert one.parameters == two.parameters
    rows = {(a.layer, a.k): (a, b) for a, b in zip(one.matrices, two.matrices, strict=True)}
    for a, b in rows.values():
        whole = a.layer in ("router", "w_uk, w_uv") or (kind == "deepseek_v3" and a.layer in ("qkv", "kv_a"))
        assert b.elements == (a.elements if whole and a.layer != "w_uk, w_uv" else a.elements // 2), a.layer


def test_heads_of_keys_and_values_are_copied_where_ranks_are_more() -> None:
    values = {**config_of("llama"), "num_key_value_heads": 1}
    two = architecture.layout(values, 2)
    qkv = next(matrix for matrix in two.matrices if matrix.layer == "qkv")
    assert qkv.m == (2 + 2) * 40 and two.kv_per_token == 3 * 2 * 40


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not known here; known are llama"),
        ({"model_type": "llava", "text_config": {}}, "text_config"),
        ({"num_hidden_layers": None}, "needs num_hidden_layers"),
        ({"hidden_size": "96"}, "needs hidden_size"),
        ({"dtype": "float16"}, "the weights are float16"),
        ({"torch_dtype": "float32"}, "the weights are float32"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized already (fp8)"),
        ({"quantization_config": {"quant_method": "zipserv", "modules_to_not_convert": "lm_head"}}, "a list of names, not 'lm_head'"),
        ({"model_type": ["llama"]}, "model_type is a name, not ['llama']"),
        ({"model_type": None}, "model_type is a name, not None"),
        ({"max_position_embeddings": "4096"}, "max_position_embeddings, a positive number; it says '4096'"),
        ({"num_experts_per_tok": -2}, "num_experts_per_tok, a positive number"),
        ({"num_local_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok is 5: there are 4 experts"),
        ({"mlp_only_layers": 3}, "mlp_only_layers, a list of layers' numbers"),
        ({"decoder_sparse_step": 1.5}, "decoder_sparse_step"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers 1000000000000, 16384 is the most"),
        ({"hidden_size": 10**30}, "hidden_size 1000"),
    ],
)
def test_what_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as error:
        architecture.layout({**config_of("llama"), **change})
    assert said in str(error.value)


@pytest.mark.parametrize(("tp", "said"), [(0, "at least one rank"), (3, "attention heads (4) cannot be cut into 3"), (8, "attention heads")])
def test_ranks_that_do_not_divide(tp: int, said: str) -> None:
    with pytest.raises(ValueError) as error:
        architecture.layout(config_of("llama"), tp)
    assert said in str(error.value)


def test_ignored_modules_stay_uncompressed() -> None:
    quantization = {"quant_method": "zipserv", "modules_to_not_convert": ["lm_head", "model.layers.1", "*.down_proj"]}
    layout = architecture.layout({**config_of("llama"), "quantization_config": quantization})
    plain = [(m.layer, m.names[0]) for m in layout.matrices if m.plain and m.layer != "embed_tokens"]
    assert [layer for layer, _ in plain] == ["down", "qkv", "o", "gate_up", "down", "down", "lm_head"]


def test_bits() -> None:
    bits = compression.Bits(12.0, "given", "")
    assert bits.nbytes(128, 64) == 128 + 2 * 4096 * 12 // 8
    assert bits.nbytes(1000, 100) == 128 + 16 * 2 * 4096 * 12 // 8
    assert bits.nbytes(30, 4096) is None  # padding to 64 rows eats the gain
    assert compression.bits(None).how == "assumed"
    with pytest.raises(ValueError, match="less than 16"):
        compression.bits(None, 17.0)


def test_bits_of_a_folder(tmp_path: Path) -> None:
    """The real size of the weights, within 1 %: sampled from a plain folder, read from a compressed one."""
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": weight(256, 320, seed=i) for i in range(70)}
    exact = 8 * sum(compress(t).nbytes for t in tensors.values()) / sum(t.numel() for t in tensors.values())
    save_file(tensors, tmp_path / "model.safetensors")
    sampled = compression.bits(tmp_path)
    assert sampled.how == "measured" and sampled.per_weight == pytest.approx(exact, rel=0.01)
    save_file({f"{name}_zipserv": compress(t).blob for name, t in tensors.items()}, tmp_path / "model.safetensors")
    read = compression.bits(tmp_path)
    assert read.how == "read" and read.per_weight == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize(("text", "size"), [("24GiB", 24 * GIB), ("80GB", 80 * 10**9), ("1.5 gib", 3 * GIB // 2), ("4096", 4096), ("2M", 2 * 10**6)])
def test_sizes(text: str, size: int) -> None:
    assert capacity.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-3GiB", "24 gallons", "1e9"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        capacity.parse_size(text)


def test_capacity_by_hand() -> None:
    """Llama-3.1-8B on 24 GiB: 16.06 GB of weights, 131,072 bytes of KV cache a token."""
    layout = architecture.layout(models.KNOWN["llama-3.1-8b"])
    bits = compression.Bits(11.0, "given", "")
    room = capacity.capacity(layout, bits, gpu_memory=24 * GIB, utilization=0.9, reserve=GIB, kv_bytes=2, batch=8, length=1000)
    assert room.kv_bytes_per_token == 2 * 32 * 8 * 128 * 2
    assert room.before.weights == 2 * layout.parameters
    embedding = 128256 * 4096
    packed = (layout.parameters - embedding - layout.vectors) * 11 / 8
    assert room.after.weights == pytest.approx(packed + 2 * embedding + 2 * layout.vectors, rel=1e-5)
    for side in (room.before, room.after):
        assert side.tokens == (int(24 * GIB * 0.9) - GIB - side.weights) // 131072 // 16 * 16
        assert side.sequences == side.tokens // 1008
    assert room.tokens_gained == room.after.tokens - room.before.tokens > 0
    small = capacity.capacity(layout, bits, gpu_memory=16 * GIB, utilization=0.9, reserve=GIB, kv_bytes=2, batch=8, length=1000)
    assert not small.before.fits and small.before.tokens == 0 and small.after.fits


def test_roofline_by_hand() -> None:
    values = {**config_of("llama"), "hidden_size": 512, "num_hidden_layers": 1}
    layout, bits = architecture.layout(values), compression.Bits(8.0001, "given", "")
    read = [m for m in layout.matrices if m.read]
    assert {m.layer for m in layout.matrices} - {m.layer for m in read} == {"embed_tokens"}
    before = sum(2 * m.elements for m in read) + 2 * layout.vectors
    after = sum(capacity.stored(m, bits)[0] for m in read) + 2 * layout.vectors
    estimate = speed.roofline(layout, bits, batch=1, length=10, kv_bytes=2, machine=None)
    cache = 10 * layout.kv_per_token * 2
    assert estimate.kind == "roofline" and estimate.speedup == pytest.approx((before + cache) / (after + cache))
    # Where arithmetic is the limit nothing is won.
    slow = speed.Machine("slow", 1e15, 1e9, "given")
    assert speed.roofline(layout, bits, batch=64, length=1, kv_bytes=2, machine=slow).speedup == pytest.approx(1, abs=1e-3)
    # Where memory is, a machine changes little.
    thin = speed.Machine("thin", 1e6, 1e15, "given")
    assert speed.roofline(layout, bits, batch=1, length=10, kv_bytes=2, machine=thin).speedup == pytest.approx(estimate.speedup, rel=0.02)


def test_experts_that_a_batch_reads() -> None:
    layout = architecture.layout(config_of("mixtral"))
    expert = next(m for m in layout.matrices if m.experts > 1)
    assert speed.experts_hit(expert, 1, 2) == pytest.approx(2)
    assert speed.experts_hit(expert, 1000, 2) == pytest.approx(6)
    assert speed.experts_hit(expert, 2, 2) == pytest.approx(2 + 2 * 4 / 6)


def bench_document(shapes: list[tuple[int, int]], tokens: tuple[int, ...] = (1, 8)) -> dict[str, Any]:
    points = [
        {
            "model": "x", "layer": "y", "m": m, "k": k, "weights": kind, "tokens": n,
            "blas_seconds": m * k * n * 1e-12, "zip_seconds": m * k * 8e-13 * n * scale,
        }
        for m, k in shapes
        for n in tokens
        for kind, scale in (("gaussian", 0.5), ("trained", 1.0))
    ]  # fmt: skip
    limits = {"copy_bandwidth": 2e12, "flops": 4e14, "cache_bytes": 1}
    about = {"date": "2026-01-01", "gpu": "Test GPU", "cpu": "x"}
    return {"about": about, "limits": limits, "weights": [], "points": points, "skipped": [], "failed": []}


def test_measured_figures() -> None:
    layout = architecture.layout(models.KNOWN["llama-3.1-8b"])
    table = speed.Table(bench_document([(s.m, s.k) for s in SHAPES if s.model == "llama-3.1-8b"]))
    found = speed.measured(layout, table, batch=1)
    assert found.kind == "measured" and found.covered == 1 and found.speedup == pytest.approx(1 / 0.8) and not found.missing
    assert speed.measured(layout, table, batch=3).speedup == pytest.approx(1 / 0.8)  # between two measured numbers of tokens
    beyond = speed.measured(layout, table, batch=16)
    assert beyond.speedup is None and beyond.covered == 0 and len(beyond.missing) == 5
    partly = speed.measured(layout, speed.Table(bench_document([(28672, 4096)])), batch=8)
    assert partly.covered == pytest.approx(32 * 28672 * 4096 / sum(m.elements * m.count for m in layout.matrices if m.read))
    assert "qkv 6144x4096" in partly.missing and partly.speedup == pytest.approx(1.25)


def test_experts_are_not_covered_by_a_table_of_dense_products() -> None:
    layout = architecture.layout(models.KNOWN["deepseek-v3"])
    table = speed.Table(bench_document([(m.m, m.k) for m in layout.matrices]))
    assert {name.split()[0] for name in speed.measured(layout, table, batch=1).missing} == {"experts"}


@pytest.mark.parametrize(
    "document",
    [{}, {"about": {}, "limits": {}, "points": []}, {"about": {"cpu": 1}, "limits": {"flops": 1, "copy_bandwidth": 1}, "points": []}],
)
def test_tables_that_are_none(document: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"not a bench\.json"):
        speed.Table(document)


#: For each value that a configuration may wrongly have: the plan is made, or a ValueError says why not, within a second.
WRONG: list[Any] = [None, [], ["x"], {}, {"a": 1}, "96", -1, 0, 1, 1.5, True, float("inf"), 10**12, 10**400]


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3_moe", "deepseek_v3"])
def test_no_configuration_ends_in_anything_else(name: str, tmp_path: Path) -> None:
    good = models.KNOWN["deepseek-v3"] if name == "deepseek_v3" else config_of("llama")
    moe = {"model_type": name, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
    good = {**good, **({} if name in ("llama", "deepseek_v3") else moe), "num_hidden_layers": 3}
    more = ["sliding_window", "max_position_embeddings", "quantization_config", "head_dim", "mlp_only_layers", "decoder_sparse_step"]
    assert plan.make(written(tmp_path, good), gpu_memory=1 << 45)["model"]["type"] == name
    refused = 0
    for key in [*good, *more]:
        for value in WRONG:
            try:
                plan.make(written(tmp_path, {**good, key: value}), gpu_memory=1 << 45)
            except ValueError as error:
                refused += bool(str(error))
    assert refused > 60


def written(folder: Path, values: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(values))
    return folder / "config.json"


@pytest.mark.parametrize("key", ["blas_seconds", "zip_seconds", "tokens"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), None, "x"])
def test_times_that_no_measurement_gives(key: str, value: Any) -> None:
    document = bench_document([(28672, 4096)])
    for point in document["points"]:
        point[key] = value
    with pytest.raises(ValueError, match=r"not a bench\.json"):
        speed.Table(document)


@pytest.mark.parametrize(
    ("change", "kind"),
    [({"length": "4096"}, TypeError), ({"batch": 1.5}, TypeError), ({"tp": 0}, ValueError), ({"utilization": 2}, ValueError)],
)
def test_arguments_that_make_no_sense(change: dict[str, Any], kind: type[Exception]) -> None:
    with pytest.raises(kind, match=next(iter(change))):
        plan.make("llama-3.1-8b", **{"gpu_memory": 1 << 40, **change})


def test_command(zipserv: Zipserv, tmp_path: Path) -> None:
    table = tmp_path / "bench.json"
    table.write_text(json.dumps(bench_document([(s.m, s.k) for s in SHAPES if s.model == "llama-3.1-8b"])))
    arguments = ("plan", "llama-3.1-8b", "--gpu-memory", "24GiB", "--batch", 8, "--length", 2048, "--table", table)
    text = zipserv(*arguments)
    assert text.code == 0, text.err
    for words in ("assumption", "KV-cache tokens", "roofline", "no kernel can beat", "measured  1.250", "linear layers alone", "100% of the bytes"):
        assert words in text.out
    document = zipserv(*arguments, "--json").json
    assert document["ok"] and document["compression"]["how"] == "assumed"
    assert document["capacity"]["tokens_gained"] == document["capacity"]["after"]["tokens"] - document["capacity"]["before"]["tokens"]
    assert document["speed"]["roofline"]["kind"] == "roofline" and document["speed"]["measured"]["kind"] == "measured"
    assert "(measured)" in document["speed"]["roofline"]["detail"]  # its bandwidth is the table's


def test_a_table_from_another_gpu_is_said_to_be_one(zipserv: Zipserv, tmp_path: Path) -> None:
    table = tmp_path / "bench.json"
    table.write_text(json.dumps(bench_document([(28672, 4096)])))
    text = zipserv("plan", "llama-3.1-8b", "--gpu", "l40s", "--table", table)
    assert "measured on Test GPU, the roofline is that of L40S" in text.out


def test_no_table_no_measured_figure(zipserv: Zipserv) -> None:
    text = zipserv("plan", "qwen2.5-7b", "--gpu", "l40s", "--tp", 2)
    assert text.code == 0 and "measured  nothing" in text.out and "data sheet" in text.out
    document = zipserv("plan", "qwen2.5-7b", "--gpu-memory", "24GiB", "--json").json
    assert document["speed"]["measured"] is None and document["speed"]["roofline"]["before_seconds"] is None


def test_config_file_folder_and_local_cache(zipserv: Zipserv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "hub/models--some--model/snapshots/abc"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_of("qwen3")))
    save_file({"model.layers.0.mlp.down_proj.weight": weight(256, 256)}, folder / "model.safetensors")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    hows = {}
    for name in (folder, folder / "config.json", "some/model"):
        document = zipserv("plan", name, "--gpu-memory", "1GiB", "--reserve", "1MiB", "--json").json
        assert document["model"]["type"] == "qwen3"
        hows[name] = document["compression"]["how"]
    assert list(hows.values()) == ["measured", "assumed", "measured"]
    missing = zipserv("plan", "some/other", "--gpu-memory", "1GiB")
    assert missing.code == 3 and "nothing is downloaded" in missing.err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("plan", "llama-3.1-8b"), 2, "--gpu-memory"),
        (("plan", "llama-3.1-8b", "--gpu-memory", "lots"), 2, "is no size"),
        (("plan", "llama-3.1-8b", "--gpu-memory", "1GiB"), 3, "leaves nothing"),
        (("plan", "llama-3.1-8b", "--gpu-memory", "24GiB", "--tp", "3"), 3, "cannot be cut into 3"),
        (("plan", "llama-3.1-8b", "--gpu-memory", "24GiB", "--bandwidth", "100"), 2, "go together"),
        (("plan", "nothing", "--gpu-memory", "24GiB"), 3, "no model configuration 'nothing'"),
        (("plan", "llama-3.1-8b", "--gpu-memory", "24GiB", "--bits", "3"), 3, "bits, not 3"),
    ],
)
def test_wrong_usage(zipserv: Zipserv, arguments: tuple[str, ...], code: int, said: str) -> None:
    result = zipserv(*arguments)
    assert result.code == code and said in result.err


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_files_that_are_no_configuration(zipserv: Zipserv, tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    result = zipserv("plan", tmp_path, "--gpu-memory", "24GiB")
    assert result.code == 3 and "config.json" in result.err


def test_picture(zipserv: Zipserv, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    table = tmp_path / "bench.json"
    table.write_text(json.dumps(bench_document([(s.m, s.k) for s in SHAPES if s.model == "llama-3.1-8b"])))
    for more in ((), ("--table", table)):
        result = zipserv("plan", "llama-3.1-8b", "--gpu-memory", "16GiB", "--plot", tmp_path / "plan.png", *more)
        assert result.code == 0, result.err
        assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_python(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch is at least 1"):
        plan.make("llama-3.1-8b", gpu_memory=24 * GIB, batch=0)
    with pytest.raises(ValueError, match="KV cache has 2 bytes"):
        plan.make("llama-3.1-8b", gpu_memory=24 * GIB, kv_bytes=4)
