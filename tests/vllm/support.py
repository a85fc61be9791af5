# SPDX-License-Identifier: Apache-2.0
"""What the tests share: the process group, tiny checkpoints, models built and loaded by vLLM itself."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from vllm.config import DeviceConfig, ParallelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model_loader

from zipserv.integrations.vllm import register

COMMON: dict[str, Any] = dict(
    vocab_size=320,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=128,
    tie_word_embeddings=False,
)

CONFIGS: dict[str, transformers.PretrainedConfig] = {
    "llama": transformers.LlamaConfig(**COMMON),
    "llama-tied": transformers.LlamaConfig(**COMMON | {"tie_word_embeddings": True}),
    "llama-odd": transformers.LlamaConfig(**COMMON | {"vocab_size": 333, "intermediate_size": 416, "head_dim": 40}),
    "qwen2": transformers.Qwen2Config(**COMMON | {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "qwen2-tied": transformers.Qwen2Config(**COMMON | {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": transformers.Qwen3Config(**COMMON),
    "mixtral": transformers.MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": transformers.Qwen3MoeConfig(**COMMON, moe_intermediate_size=128, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True),
}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def current_config(**kwargs: Any) -> contextlib.AbstractContextManager[None]:
    return set_current_vllm_config(VllmConfig(device_config=DeviceConfig("cpu"), **kwargs))


def join_group(rank: int, world: int, port: int, **parallel: Any) -> None:
    """Into a gloo group of ``world`` ranks; ``parallel`` is what vLLM's ParallelConfig takes."""
    register()
    config = ParallelConfig(**parallel)
    with current_config(parallel_config=config):
        init_distributed_environment(world, rank, f"tcp://127.0.0.1:{port}", rank, "gloo")
        initialize_model_parallel(config.tensor_parallel_size, config.pipeline_parallel_size)


class Folders:
    """Checkpoint folders by name, each made when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def plain(self, name: str) -> Path:
        folder = self.root / name
        if not folder.exists():
            torch.manual_seed(len(name))
            model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.bfloat16)
            for param in model.parameters():  # nothing constant: norms and biases must count, too
                param.data += torch.randn_like(param) * 0.02
            model.save_pretrained(folder)
        return folder

    def compressed(self, name: str, *options: str) -> Path:
        folder = self.root / "-".join([name, "zip", *(option.strip("-*=") for option in options)])
        if not folder.exists():
            command = [sys.executable, "-m", "zipserv", "compress", str(self.plain(name)), str(folder), *options]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr + done.stdout
            assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "zipserv"
        return folder


@dataclasses.dataclass
class Loaded:
    model: torch.nn.Module
    config: VllmConfig

    def modules(self) -> dict[str, torch.nn.Module]:
        """The layers that have weights of their own and a method to apply them."""
        return {name: module for name, module in self.model.named_modules() if hasattr(module, "quant_method") and hasattr(module, "prefix")}


@contextlib.contextmanager
def load(folder: Path, quantization: str | None = None, **kwargs: Any) -> Iterator[Loaded]:
    """The model as `LLM(folder, quantization=...)` builds and loads it, with its configuration current."""
    defaults: dict[str, Any] = dict(dtype="bfloat16", skip_tokenizer_init=True, enforce_eager=True, max_model_len=128)
    defaults["compilation_config"] = {"custom_ops": ["none"]}  # vLLM's own PyTorch forms of norms, rotations, activations
    config = EngineArgs(model=str(folder), quantization=quantization, **defaults | kwargs).create_engine_config()
    with set_current_vllm_config(config):
        yield Loaded(get_model_loader(config.load_config).load_model(vllm_config=config, model_config=config.model_config), config)
