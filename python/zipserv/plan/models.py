# SPDX-License-Identifier: Apache-2.0
"""Where a model's configuration comes from: a folder, a config.json, a name that is known here, or the local model cache."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Published configurations of the models whose shapes the benchmark measures (bench/shapes.py), as far as sizes go.
KNOWN: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False, "dtype": "bfloat16",
    },
    "llama-3.1-70b": {
        "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False, "dtype": "bfloat16",
    },
    "qwen2.5-7b": {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False, "dtype": "bfloat16",
    },
    "qwen2.5-32b": {
        "model_type": "qwen2", "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64,
        "num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False, "dtype": "bfloat16",
    },
    "mistral-24b": {
        "model_type": "mistral", "hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40, "head_dim": 128,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 131072, "tie_word_embeddings": False, "dtype": "bfloat16",
    },
    # Published in FP8: this is what a BF16 copy of it takes.
    "deepseek-v3": {
        "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
        "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
        "first_k_dense_replace": 3, "vocab_size": 129280, "tie_word_embeddings": False, "dtype": "bfloat16",
    },
}  # fmt: skip

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """``config``: the values of a config.json; ``folder``: where its weights may lie, None where there is no such place."""

    name: str
    config: dict[str, Any]
    folder: Path | None = None


def find(model: str) -> Source:
    """The configuration that ``model`` stands for. Nothing is fetched from the network.

    Raises ValueError where there is none, or where it is not a model's configuration.
    """
    path = Path(model)
    if path.is_dir():
        return Source(path.resolve().name, _read(path / "config.json"), path)
    if path.is_file():
        return Source(path.resolve().parent.name if path.name == "config.json" else path.name, _read(path), None)
    if model in KNOWN:
        return Source(model, dict(KNOWN[model]))
    if _REPOSITORY.fullmatch(model):
        snapshot = cached(model)
        if snapshot is not None:
            return Source(model, _read(snapshot / "config.json"), snapshot)
    raise ValueError(
        f"no model configuration {model!r}: give a folder with a config.json, such a file, one of {', '.join(KNOWN)}, "
        f"or the name of a model in the local cache ({cache()}); nothing is downloaded"
    )


def cache() -> Path:
    """The folder of models that were downloaded from the Hugging Face hub."""
    for variable, below in (("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub")):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser() / below
    return Path.home() / ".cache/huggingface/hub"


def cached(name: str) -> Path | None:
    """The newest complete look of the model ``organisation/name`` in the cache: its main revision, else any."""
    root = cache() / ("models--" + name.replace("/", "--"))
    found = []
    try:
        found.append(root / "snapshots" / (root / "refs/main").read_text().strip())
    except OSError:
        pass
    found += sorted((root / "snapshots").glob("*"))
    return next((path for path in found if (path / "config.json").is_file()), None)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent}: no config.json in this folder") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON document: {error}") from error
    if not isinstance(values, dict) or "model_type" not in values:
        raise ValueError(f"{path}: not a model's configuration: it names no model_type")
    return values
