# SPDX-License-Identifier: Apache-2.0
"""``zipserv bench --model``: a whole language model with random weights, compressed against uncompressed, end to end.

The same model object is measured, compressed in place, and measured again: same weights, same kernels around them,
same process. On a GPU the pass over the prompt and one decode step are CUDA graphs for both. Before each phase a large
copy is timed, so that a clock that has moved in between can be seen.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from zipserv.model import compress_model
from zipserv.offload import Offload
from zipserv.offload import apply as offload_model

from .fused import fused
from .machine import bus_bandwidth
from .timing import call_seconds

#: Models by name; anything else is a config.json or a folder that holds one.
CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "llama", "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 2048,
    },
    "llama-3.2-1b": {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip
_CUDA: Any = torch.cuda  # torch's streams and events are not typed


def run(
    config: str | Path,
    *,
    device: str | torch.device | None = None,
    batch: Sequence[int] = (1,),
    prompt: int = 128,
    new_tokens: int = 64,
    dtype: str = "bfloat16",
    offload: str | None = None,
    graphs: bool = True,
    seed: int = 0,
    rounds: int = 5,
    merge: bool = True,
    fuse: bool = False,
) -> dict[str, Any]:
    """Measure tokens/s, time to the first token and memory, uncompressed and compressed.

    Args:
        config: a name of :data:`CONFIGS`, a ``config.json``, or a folder that holds one.
        device: where to compute; by default the GPU where there is one.
        batch: numbers of sequences.
        prompt: tokens of each prompt.
        new_tokens: decode steps that are timed in one go.
        dtype: ``"bfloat16"`` or ``"float16"``.
        offload: ``"cpu"`` streams the weights from host memory in both phases (no CUDA graphs then).
        graphs: capture the pass over the prompt, and a decode step, in CUDA graphs; on a GPU only.
        seed: of the weights and the prompts.
        rounds: how often each figure is taken; the median counts.
        merge: compressed layers that read the same input are one product (:func:`zipserv.merged.merge_layers`).
        fuse: in both phases, compile what lies between the products of a decode step, and attend without copies of keys
            and values (:mod:`zipserv.bench.fused`).

    Returns:
        What can be written as JSON: ``model``, ``weights`` (bytes before and after), ``rows`` (one for each batch size).
        Where a phase did not fit into the device's memory its figures are ``{"error": ...}``, and quotients are None.

    Raises:
        ValueError: unknown config or dtype, sizes below 1.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype not in ("bfloat16", "float16"):
        raise ValueError(f"dtype is 'bfloat16' or 'float16', not {dtype!r}")
    if min([prompt, new_tokens, rounds, *batch], default=0) < 1:
        raise ValueError("batch, prompt, new_tokens and rounds are at least 1")
    if offload not in (None, "cpu"):
        raise ValueError(f"offload is 'cpu' or None, not {offload!r}")
    graphs = graphs and where.type == "cuda" and offload is None
    settings = {"batch": list(batch), "prompt": prompt, "new_tokens": new_tokens, "graphs": graphs, "rounds": rounds, "merge": merge, "fuse": fuse}
    model, name, fits = _build_on(config, where, getattr(torch, dtype), seed)
    if offload:  # the device was only sooner at drawing the weights
        model.to("cpu")
        fits = True

    phases: dict[str, list[dict[str, Any]]] = {}
    tokens: dict[str, list[torch.Tensor | None]] = {}
    weights: dict[str, int] = {}
    for phase in ("plain", "zipserv"):
        if phase == "zipserv":
            compress_model(model, merge=merge)
            if not fits:
                model.to(where)
            gc.collect()
        weights[phase] = _weight_bytes(model)
        if phase == "plain" and not fits:
            error = {"error": f"out of memory: the weights alone are {weights[phase] / 1e9:.2f} GB"}
            phases[phase], tokens[phase] = [error for _ in batch], [None for _ in batch]
            continue
        handle = offload_model(model, where) if offload else None
        phases[phase], tokens[phase] = [], []
        for size in batch:
            with fused(model) if fuse else contextlib.nullcontext():
                row, ids = _measured(model, where, size, prompt, new_tokens, graphs, seed, rounds, handle)
            phases[phase].append(row)
            tokens[phase].append(ids)
        if handle is not None:
            handle.remove()
            model.to("cpu")
    rows = []
    for size, plain, zipped, a, b in zip(batch, phases["plain"], phases["zipserv"], tokens["plain"], tokens["zipserv"], strict=True):
        both = a is not None and b is not None
        rows.append(
            {
                "batch": size,
                "plain": plain,
                "zipserv": zipped,
                "decode_speedup": zipped["decode_tokens_per_second"] / plain["decode_tokens_per_second"] if both else None,
                "prefill_speedup": plain["first_token_seconds"] / zipped["first_token_seconds"] if both else None,
                "same_tokens": float((a == b).float().mean()) if a is not None and b is not None else None,
            }
        )
    return {
        "model": name,
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "offload": offload,
        **settings,
        "weights": {**weights, "ratio": weights["zipserv"] / weights["plain"]},
        "rows": rows,
    }


def format_rows(result: dict[str, Any]) -> str:
    """The result of :func:`run` as a table."""
    weights = result["weights"]
    lines = [
        f"{result['model']} on {result['device']}, {result['dtype']}, prompt {result['prompt']}, {result['new_tokens']} new tokens"
        f"{', CUDA graphs' if result['graphs'] else ''}{', layers merged' if result['merge'] else ''}"
        f"{', decode step fused' if result['fuse'] else ''}"
        f"{', weights streamed from host memory' if result['offload'] else ''}",
        f"weights: {weights['plain'] / 1e9:.3f} GB -> {weights['zipserv'] / 1e9:.3f} GB ({weights['ratio']:.3f}x)",
        f"{'batch':>5} {'tokens/s':>20} {'speed-up':>8} {'first token, ms':>20} {'speed-up':>8} {'peak memory, GB':>16} {'same tokens':>11}",
    ]
    for row in result["rows"]:
        plain, zipped = row["plain"], row["zipserv"]

        def pair(key: str, scale: float, plain: dict[str, Any] = plain, zipped: dict[str, Any] = zipped) -> str:
            values = [part.get(key) for part in (plain, zipped)]
            if values == [None, None]:
                return "-"
            return " -> ".join("-" if value is None else f"{value * scale:.2f}" for value in values)

        def quotient(key: str, form: str, row: dict[str, Any] = row) -> str:
            return "-" if row[key] is None else format(row[key], form)

        lines.append(
            f"{row['batch']:>5} {pair('decode_tokens_per_second', 1):>20} {quotient('decode_speedup', '.2f'):>7}x "
            f"{pair('first_token_seconds', 1e3):>20} "
            f"{quotient('prefill_speedup', '.2f'):>7}x {pair('peak_bytes', 1e-9):>16} {quotient('same_tokens', '.0%'):>11}"
        )
        lines += [f"      {phase}: {part['error']}" for phase, part in (("plain", plain), ("zipserv", zipped)) if "error" in part]
        if plain.get("bus_bytes_per_second") and zipped.get("bus_bytes_per_second"):
            lines.append(_stream_line(row))
    return "\n".join(lines)


def _stream_line(row: dict[str, Any]) -> str:
    """How much of the bus the streaming takes, and what it needs on the GPU."""
    told = []
    for phase in ("plain", "zipserv"):
        part = row[phase]
        rate = part["streamed_bytes"] * part["decode_tokens_per_second"] / row["batch"]
        told.append(
            f"{part['streamed_bytes'] / 1e9:.2f} GB a step at {rate / 1e9:.1f} GB/s ({rate / part['bus_bytes_per_second']:.0%} of the bus), "
            f"two blocks of {part['buffer_bytes'] / 2e9:.2f} GB"
        )
    return f"      streamed: {' -> '.join(told)}"


def _build_on(config: str | Path, device: torch.device, dtype: torch.dtype, seed: int) -> tuple[Any, str, bool]:
    """The model on the device, or on the CPU where it does not fit there; whether it fits."""
    try:
        return *_build(config, device, dtype, seed), True
    except torch.cuda.OutOfMemoryError:
        _release(device)
    return *_build(config, torch.device("cpu"), dtype, seed), False


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _measured(model: Any, device: torch.device, *arguments: Any) -> tuple[dict[str, Any], torch.Tensor | None]:
    """:func:`_measure`, or what was missing."""
    _release(device)
    try:
        return _measure(model, device, *arguments)
    except torch.cuda.OutOfMemoryError as error:
        return {"error": f"out of memory: {str(error).split('. ')[0]}"}, None


def _build(config: str | Path, device: torch.device, dtype: torch.dtype, seed: int) -> tuple[Any, str]:
    from transformers import AutoConfig, AutoModelForCausalLM

    path = Path(config)
    if str(config) in CONFIGS:
        values, name = dict(CONFIGS[str(config)]), str(config)
    elif path.exists():
        file = path / "config.json" if path.is_dir() else path
        values, name = json.loads(file.read_text()), str(config)
        values.pop("quantization_config", None)
    else:
        raise ValueError(f"no model config {config!r}: one of {', '.join(CONFIGS)}, a config.json, or a folder that holds one")
    settings = AutoConfig.for_model(**values)
    auto: Any = AutoModelForCausalLM
    torch.manual_seed(seed)
    with torch.device(device):
        model = auto.from_config(settings, dtype=dtype)
    return model.eval().requires_grad_(False), name


def _weight_bytes(model: Any) -> int:
    """Parameters and compressed weights; what is shared counts once."""
    tensors = {t.data_ptr(): t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()] if t.numel()}
    return sum(tensors.values())


@torch.inference_mode()
def _measure(
    model: Any,
    device: torch.device,
    batch: int,
    prompt: int,
    new_tokens: int,
    graphs: bool,
    seed: int,
    rounds: int,
    handle: Offload | None,
) -> tuple[dict[str, Any], torch.Tensor]:
    from transformers import StaticCache

    gpu = device.type == "cuda"
    copy_seconds = _copy_seconds(device)
    bus = bus_bandwidth(device) if handle is not None else None
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    generator = torch.Generator().manual_seed(seed + batch)
    ids = torch.randint(0, model.config.vocab_size, (batch, prompt), generator=generator).to(device)
    length = -(-(prompt + new_tokens + 1) // 64) * 64  # attention copies masks of other lengths
    cache: Any = StaticCache(config=model.config, max_cache_len=length)
    takes = inspect.signature(model.forward).parameters
    keep = {"cache" if "cache" in takes else "past_key_values": cache}  # its name in newer and older transformers
    token = torch.zeros((batch, 1), dtype=torch.long, device=device)

    def rewind(length: int) -> None:
        for layer in cache.layers:
            if layer.is_initialized:
                layer.cumulative_length.fill_(length)

    def prefill() -> None:
        rewind(0)
        logits = model(input_ids=ids, use_cache=True, logits_to_keep=1, **keep).logits
        token.copy_(logits[:, -1].argmax(-1, keepdim=True))

    def step() -> None:
        logits = model(input_ids=token, use_cache=True, **keep).logits
        token.copy_(logits[:, -1].argmax(-1, keepdim=True))

    prefill()
    start: Callable[[], object] = prefill
    if graphs:
        _release(device)
        start = _captured(prefill, lambda: rewind(0)).replay
    first = [call_seconds(start, device) for _ in range(rounds)]
    del start
    _release(device)  # the graph's memory
    replay: Callable[[], object] = step
    if graphs:
        replay = _captured(step, lambda: rewind(prompt)).replay
    produced = []

    def decode() -> None:
        for _ in range(new_tokens):
            replay()

    def decode_and_keep() -> None:
        for _ in range(new_tokens):
            replay()
            produced.append(token.clone())

    prefill()
    decode_and_keep()
    seconds = []
    for _ in range(rounds):
        prefill()
        seconds.append(call_seconds(decode, device))
    row = {
        "first_token_seconds": statistics.median(first),
        "decode_tokens_per_second": batch * new_tokens / statistics.median(seconds),
        "decode_spread": (max(seconds) - min(seconds)) / statistics.median(seconds),
        "peak_bytes": torch.cuda.max_memory_allocated(device) if gpu else None,
        "copy_seconds": copy_seconds,
        "streamed_bytes": handle.host_bytes if handle is not None else None,
        "buffer_bytes": handle.device_bytes if handle is not None else None,
        "bus_bytes_per_second": bus,
    }
    return row, torch.cat(produced, 1).cpu()


def _captured(step: Callable[[], object], rewind: Callable[[], object]) -> Any:
    side = _CUDA.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    rewind()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    rewind()
    return graph


def _copy_seconds(device: torch.device) -> float:
    """A copy of 256 MiB (CPU: 64), the best of five: the same in both phases, or the figures are not comparable."""
    source = torch.ones((256 if device.type == "cuda" else 64) << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return min(call_seconds(lambda: target.copy_(source), device) for _ in range(5))
