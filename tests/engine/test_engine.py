# SPDX-License-Identifier: Apache-2.0
"""vLLM's own engine, on a CPU, with the plugin: scheduler, paged KV cache, attention kernels, workers, HTTP server. Tiny random models.

Compressed weights are multiplied in the CPU's exact mode, so tokens and log-probabilities must be those of the uncompressed model, bit for
bit, wherever vLLM multiplies by PyTorch (experts: by kernels of its own, so within rounding).
"""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", ZIPSERV_CPU_LINEAR="exact", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process: an import takes longer than a test

import pytest
import torch
import transformers

COMMON: dict[str, Any] = dict(
    vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
    max_position_embeddings=256, tie_word_embeddings=False, eos_token_id=None,
)  # fmt: skip
CONFIGS = {
    "llama": transformers.LlamaConfig(**COMMON),
    "qwen2": transformers.Qwen2Config(**COMMON | {"tie_word_embeddings": True}),
    "mixtral": transformers.MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2),
}
PROMPTS = [[3, 1, 4, 1, 5], [2, 7, 1, 8, 2, 8, 1, 8], [1] * 20, list(range(40))]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Each model as a plain checkpoint and as `zipserv compress` makes it."""
    root, made = tmp_path_factory.mktemp("models"), {}
    for name, config in CONFIGS.items():
        torch.manual_seed(len(name))
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        for param in model.parameters():
            param.data += torch.randn_like(param) * 0.05
        made[name, "plain"], made[name, "zip"] = root / name, root / f"{name}-zip"
        model.save_pretrained(root / name)
        command = [sys.executable, "-m", "zipserv", "compress", str(root / name), str(root / f"{name}-zip")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return made


def answers(folder: Path, quantization: str | None = None, **options: Any) -> dict[str, Any]:
    """Greedy tokens and their log-probabilities, all prompts in one batch; the classes of the model's methods."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    defaults: dict[str, Any] = dict(dtype="bfloat16", skip_tokenizer_init=True, max_model_len=128, max_num_seqs=8, enforce_eager=True, seed=0)
    llm = LLM(str(folder), quantization=quantization, **defaults | options)
    params = SamplingParams(temperature=0, max_tokens=10, detokenize=False, logprobs=1)
    outputs = [o.outputs[0] for o in llm.generate([TokensPrompt(prompt_token_ids=p) for p in PROMPTS], params, use_tqdm=False)]
    found = {
        "method": llm.llm_engine.vllm_config.model_config.quantization,
        "tokens": [list(o.token_ids) for o in outputs],
        "logprobs": [[step[token].logprob for step, token in zip(o.logprobs, o.token_ids, strict=True)] for o in outputs],
    }
    del llm
    gc.collect()
    return found


@pytest.fixture(scope="session")
def plain(folders: dict[tuple[str, str], Path]) -> dict[str, dict[str, Any]]:
    found = {name: answers(folders[name, "plain"]) for name in CONFIGS}
    assert all(len(set(map(tuple, each["tokens"]))) > 1 for each in found.values()), "the models say the same to everything"
    return found


def same(got: dict[str, Any], want: dict[str, Any], exactly: bool = True) -> None:
    assert got["method"] == "zipserv" and want["method"] is None
    if exactly:
        assert got["tokens"] == want["tokens"] and got["logprobs"] == want["logprobs"]
        return
    for a, b in zip(got["logprobs"], want["logprobs"], strict=True):
        assert a[0] == pytest.approx(b[0], abs=0.05)
    assert sum(a[0] == b[0] for a, b in zip(got["tokens"], want["tokens"], strict=True)) >= len(PROMPTS) - 1


@pytest.mark.parametrize("way", ["flag", "folder"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_engine_answers_as_with_the_uncompressed_model(folders: Any, plain: Any, name: str, way: str) -> None:
    got = answers(folders[name, "plain"], "zipserv") if way == "flag" else answers(folders[name, "zip"])
    same(got, plain[name], exactly=name != "mixtral")


def test_prompts_one_by_one(folders: Any, plain: Any) -> None:
    """Without a batch and without prefix cache: the same first tokens, log-probabilities within rounding."""
    got = answers(folders["llama", "zip"], max_num_seqs=1, enable_prefix_caching=False, max_num_batched_tokens=128)
    assert [t[0] for t in got["tokens"]] == [t[0] for t in plain["llama"]["tokens"]]
    for a, b in zip(got["logprobs"], plain["llama"]["logprobs"], strict=True):
        assert a[0] == pytest.approx(b[0], abs=0.05)


def test_two_ranks(folders: Any, tmp_path: Path) -> None:
    """Tensor parallel: the engine's own workers, spawned, in a process that only vLLM sets up."""
    plain, zipped = str(folders["llama", "plain"]), str(folders["llama", "zip"])
    code = f"""
import json
import test_engine
from pathlib import Path
if __name__ == "__main__":
    runs = [({plain!r}, None), ({plain!r}, "zipserv"), ({zipped!r}, None)]
    found = [test_engine.answers(Path(folder), method, tensor_parallel_size=2) for folder, method in runs]
    Path({str(tmp_path / "out.json")!r}).write_text(json.dumps(found))
"""
    (tmp_path / "run.py").write_text(code)
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    done = subprocess.run([sys.executable, str(tmp_path / "run.py")], capture_output=True, text=True, env=environment, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    want, *compressed = json.loads((tmp_path / "out.json").read_text())
    assert len(compressed) == 2
    for got in compressed:
        same(got, want)


@pytest.fixture
def server(folders: Any, tmp_path: Path) -> Iterator[str]:
    """`vllm serve FOLDER`: no flag, the folder says what it is."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folders["llama", "zip"]), "--port", str(port), "--host", "127.0.0.1",
        "--skip-tokenizer-init", "--enforce-eager", "--max-model-len", "128", "--served-model-name", "small",
    ]  # fmt: skip
    log = (tmp_path / "log").open("w+")
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"} | {"VLLM_LOGGING_LEVEL": "INFO"}
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    try:
        for _ in range(300):
            assert process.poll() is None, (tmp_path / "log").read_text()[-5000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                time.sleep(1)
        yield f"http://127.0.0.1:{port}"
        assert "quantization=zipserv" in (tmp_path / "log").read_text()
    finally:
        process.terminate()
        process.wait(30)


def test_serve(server: str, plain: Any) -> None:
    body = {
        "model": "small", "prompt": PROMPTS[0], "max_tokens": 10, "temperature": 0, "detokenize": False, "return_token_ids": True,
        "ignore_eos": True,
    }  # fmt: skip
    request = urllib.request.Request(f"{server}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        answer = json.load(urllib.request.urlopen(request, timeout=60))
    except urllib.error.HTTPError as error:
        raise AssertionError(error.read().decode()) from error
    assert answer["choices"][0]["token_ids"] == plain["llama"]["tokens"][0]


def test_compiled(folders: Any) -> None:
    """vLLM's torch.compile of the whole model, both compiled. Last, for it leaves marks in the process."""
    same(answers(folders["llama", "zip"], enforce_eager=False), answers(folders["llama", "plain"], enforce_eager=False))
