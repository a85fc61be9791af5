# SPDX-License-Identifier: Apache-2.0
"""A decode loop over the vLLM plugin's own methods, for machines that vLLM does not fit onto: right first, then tokens a second.

    python tools/gpu/decode_loop.py --families llama,qwen2,mixtral,qwen3-moe --batch 1,8,32 --out loop.json
    torchrun --nproc-per-node 2 tools/gpu/decode_loop.py --families llama --layers 8      # tensor parallel, nccl
    ZIPSERV_GROUPED_EXPERTS=0 python tools/gpu/decode_loop.py --families mixtral,qwen3-moe # experts one by one
    python tools/gpu/decode_loop.py --device cpu --tiny                                    # shows that the program works

The classes that multiply, look up, route and load are those of `zipserv.integrations.vllm`; the layers that call them are of `vllm_standin`,
attention is PyTorch's, small operations between products are compiled by torch.compile, for both sides alike. One decode step (token in,
next token out) is one CUDA graph, with the all-reduces of tensor parallelism in it. **It is not vLLM**: no engine, no scheduler, no paged
attention, and the uncompressed experts are PyTorch's grouped product.

Checked before anything is timed:
  - every compressed matrix, as a rank has loaded it, decodes to the bits of the uncompressed shard;
  - by decompression (forced) a layer gives the uncompressed layer's bits; by the fused kernels an error against float64 like cuBLAS's;
  - a folder loads to the same compressed bytes as the plain checkpoint does, at this number of ranks;
  - logits agree with the uncompressed loop, and with one GPU's, within BF16 rounding; the graph's with the eager loop's;
  - a token has the same bits in every batch under VLLM_BATCH_INVARIANT=1.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import vllm_standin as standin

standin.install()

import zipserv  # noqa: E402
from zipserv import choices, grouped, tune  # noqa: E402
from zipserv.integrations.vllm import register  # noqa: E402

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Spec:
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head: int
    vocab: int
    layers: int
    bias: bool = False
    tied: bool = False
    experts: int = 0
    top: int = 0


FAMILIES = {
    "llama": Spec(4096, 14336, 32, 8, 128, 128256, 32),  # Llama-3.1-8B
    "qwen2": Spec(3584, 18944, 28, 4, 128, 152064, 28, bias=True),  # Qwen2.5-7B
    "qwen2-tied": Spec(1536, 8960, 12, 2, 128, 151936, 28, bias=True, tied=True),  # Qwen2.5-1.5B
    "mixtral": Spec(4096, 14336, 32, 8, 128, 32000, 4, experts=8, top=2),  # Mixtral-8x7B, 4 of 32 layers
    "qwen3-moe": Spec(2048, 768, 32, 4, 128, 151936, 4, experts=128, top=8),  # Qwen3-30B-A3B, 4 of 48 layers
}
TINY = {"hidden": 256, "inner": 512, "heads": 4, "kv_heads": 2, "head": 64, "vocab": 640, "layers": 2}


class Wrong(AssertionError):
    """A result that must not be."""


def check(right: bool, what: str) -> None:
    if not right:
        raise Wrong(what)


# --- the model -------------------------------------------------------------------------------------------------------


class Glue:
    """What lies between products, compiled where there is a GPU."""

    def __init__(self, compiled: bool) -> None:
        for name in ("add_norm", "rotate", "softmax", "gate"):
            call = getattr(type(self), name)
            setattr(self, name, torch.compile(call, dynamic=False) if compiled else call)

    @staticmethod
    def add_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = x.float() + residual.float()
        return (total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-5) * weight.float()).to(x.dtype), total.to(x.dtype)

    @staticmethod
    def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """`x`: (batch, heads, 1, size)."""
        first, second = x.float().chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)

    @staticmethod
    def softmax(scores: torch.Tensor, mask: torch.Tensor, scaling: float) -> torch.Tensor:
        return (scores.float() * scaling).masked_fill(~mask, float("-inf")).softmax(-1).to(scores.dtype)

    @staticmethod
    def gate(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return (F.silu(a.float()) * b.float()).to(x.dtype)


class Layer(nn.Module):
    def __init__(self, spec: Spec, config: Any, prefix: str, glue: Glue) -> None:
        super().__init__()
        size = standin.tp_size()
        self.spec, self.glue = spec, glue
        self.heads, self.kv = spec.heads // size, max(1, spec.kv_heads // size)
        self.first, self.second = (nn.Parameter(torch.ones(spec.hidden), requires_grad=False) for _ in range(2))
        self.qkv_proj = standin.QKVParallelLinear(
            spec.hidden, spec.head, spec.heads, spec.kv_heads, spec.bias, config, f"{prefix}.self_attn.qkv_proj"
        )
        self.o_proj = standin.RowParallelLinear(spec.heads * spec.head, spec.hidden, False, config, f"{prefix}.self_attn.o_proj")
        if spec.experts:
            self.router = nn.Parameter(torch.empty(spec.experts, spec.hidden), requires_grad=False)
            self.experts = standin.RoutedExperts(spec.experts, spec.hidden, spec.inner, config, f"{prefix}.mlp.experts")
        else:
            self.gate_up_proj = standin.MergedColumnParallelLinear(spec.hidden, [spec.inner] * 2, False, config, f"{prefix}.mlp.gate_up_proj")
            self.down_proj = standin.RowParallelLinear(spec.inner, spec.hidden, False, config, f"{prefix}.mlp.down_proj")

    def forward(self, x: torch.Tensor, residual: torch.Tensor, state: State, cache: tuple[torch.Tensor, torch.Tensor]) -> tuple[Any, Any]:
        spec, batch = self.spec, x.shape[0]
        h, residual = self.glue.add_norm(x, residual, self.first)
        q, k, v = self.qkv_proj(h)[0].split([n * spec.head for n in (self.heads, self.kv, self.kv)], -1)
        q = self.glue.rotate(q.view(batch, self.heads, 1, spec.head), state.cos, state.sin)
        k = self.glue.rotate(k.view(batch, self.kv, 1, spec.head), state.cos, state.sin)
        keys, values = cache
        keys.index_copy_(2, state.position, k)
        values.index_copy_(2, state.position, v.view(batch, self.kv, 1, spec.head))
        grouped = q.view(batch, self.kv, self.heads // self.kv, spec.head)
        weights = self.glue.softmax(grouped @ keys.transpose(-1, -2), state.mask, spec.head**-0.5)
        x = self.o_proj((weights @ values).view(batch, -1))[0]
        h, residual = self.glue.add_norm(x, residual, self.second)
        if not spec.experts:
            return self.down_proj(self.glue.gate(self.gate_up_proj(h)[0]))[0], residual
        routing, ids = F.linear(h, self.router).float().softmax(-1).topk(spec.top)
        return self.experts(h, routing / routing.sum(-1, keepdim=True), ids.int()), residual


class State:
    """Of one loop: tokens, place, cache. All of it static, as a CUDA graph wants it."""

    def __init__(self, spec: Spec, batch: int, length: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(batch)
        self.tokens = torch.randint(spec.vocab, (batch,), generator=generator).to(device)
        self.start = self.tokens.clone()
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.places = torch.arange(length, device=device)
        angles = torch.arange(length).float()[:, None] * 10000.0 ** (-torch.arange(spec.head // 2) / (spec.head // 2))
        self.table = torch.stack([angles.cos(), angles.sin()]).to(device)
        kv = max(1, spec.kv_heads // standin.tp_size())
        shape = (spec.layers, 2, batch, kv, length, spec.head)
        self.cache = torch.zeros(shape, dtype=BF16, device=device)
        self.filled = length // 2  # the first half of the cache counts as read already
        generator = torch.Generator(device).manual_seed(5)
        read = torch.randn((spec.layers, 2, spec.kv_heads, self.filled, spec.head), generator=generator, device=device, dtype=BF16)
        first = standin.tp_rank() * spec.kv_heads // standin.tp_size()
        self.read = read[:, :, None, first : first + kv].clone()  # the heads of this rank
        self.rewind()

    def rewind(self) -> None:
        self.cache[..., : self.filled, :] = self.read
        self.cache[..., self.filled :, :] = 0
        self.tokens.copy_(self.start)
        self.position.fill_(self.filled)

    def enter(self) -> None:
        self.cos, self.sin = self.table.index_select(1, self.position)
        self.mask = self.places <= self.position


class Model(nn.Module):
    def __init__(self, spec: Spec, config: Any, glue: Glue) -> None:
        super().__init__()
        self.spec, self.glue = spec, glue
        self.embed_tokens = standin.VocabParallelEmbedding(spec.vocab, spec.hidden, config, "model.embed_tokens")
        self.layers = nn.ModuleList(Layer(spec, config, f"model.layers.{i}", glue) for i in range(spec.layers))
        self.norm = nn.Parameter(torch.ones(spec.hidden), requires_grad=False)
        self.lm_head = standin.ParallelLMHead(spec.vocab, spec.hidden, config, "lm_head")
        if spec.tied:
            self.lm_head = self.lm_head.tie_weights(self.embed_tokens)

    def step(self, state: State) -> torch.Tensor:
        """One token on for each sequence; its logits."""
        state.enter()
        x = self.embed_tokens(state.tokens)
        residual = torch.zeros_like(x)
        for layer, cache in zip(self.layers, state.cache, strict=True):
            x, residual = layer(x, residual, state, cache)
        logits = self.lm_head(self.glue.add_norm(x, residual, self.norm)[0])
        state.tokens.copy_(logits.argmax(-1))
        state.position.add_(1)
        return logits

    def bytes(self) -> int:
        return sum({t.data_ptr(): t.nbytes for t in self.parameters()}.values())

    def named_layers(self) -> Iterator[tuple[str, Any]]:
        for name, module in self.named_modules():
            if hasattr(module, "quant_method"):
                yield name, module


# --- the checkpoint --------------------------------------------------------------------------------------------------


def tensors(spec: Spec, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """A checkpoint's names and random weights, the same in each process; made on the device, so that it takes no time."""
    hidden, q, kv = spec.hidden, spec.heads * spec.head, spec.kv_heads * spec.head
    names: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (spec.vocab, hidden))]
    if not spec.tied:
        names.append(("lm_head.weight", (spec.vocab, hidden)))
    for i in range(spec.layers):
        layer = f"model.layers.{i}"
        for part, rows in (("q", q), ("k", kv), ("v", kv)):
            names.append((f"{layer}.self_attn.{part}_proj.weight", (rows, hidden)))
            if spec.bias:
                names.append((f"{layer}.self_attn.{part}_proj.bias", (rows,)))
        names.append((f"{layer}.self_attn.o_proj.weight", (hidden, q)))
        homes = [f"{layer}.mlp.experts.{e}" for e in range(spec.experts)] or [f"{layer}.mlp"]
        if spec.experts:
            names.append((f"{layer}.mlp.gate.weight", (spec.experts, hidden)))
        for home in homes:
            names += [(f"{home}.{part}_proj.weight", (spec.inner, hidden)) for part in ("gate", "up")]
            names.append((f"{home}.down_proj.weight", (hidden, spec.inner)))
    for number, (name, shape) in enumerate(names):
        generator = torch.Generator(device).manual_seed(number)
        scale = 1.0 / math.sqrt(shape[-1]) if len(shape) > 1 else 0.1
        yield name, (torch.randn(shape, generator=generator, device=device) * scale).to(BF16)


_STACKED: dict[str, tuple[str, Any]] = {f"{part}_proj": ("qkv_proj", part) for part in "qkv"}
_STACKED |= {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}
_EXPERT = {"gate_proj": ("w13_weight", "w1"), "up_proj": ("w13_weight", "w3"), "down_proj": ("w2_weight", "w2")}


def load(model: Model, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
    """As vLLM's models do it: each tensor to the loader of the parameter that it is part of."""
    for name, tensor in weights:
        parts = name.removeprefix("model.").split(".")
        if parts[0] != "layers":
            module = getattr(model, parts[0])
            module.weight.weight_loader(module.weight, tensor)
            continue
        layer, leaf, kind = model.layers[int(parts[1])], parts[-2], parts[-1]
        if "experts" in parts:
            target, shard = _EXPERT[leaf]
            param = getattr(layer.experts, target)
            param.weight_loader(param, tensor, name, shard_id=shard, expert_id=int(parts[4]))
        elif leaf == "gate":
            layer.router.copy_(tensor)
        else:
            target, part = _STACKED.get(leaf, (leaf, None))
            param = getattr(getattr(layer, target), kind)
            param.weight_loader(param, tensor, *(() if part is None else (part,)))
    for _, module in model.named_layers():
        module.quant_method.process_weights_after_loading(module)


def write_folder(spec: Spec, device: torch.device, folder: Path) -> None:
    """What `zipserv compress` writes: matrices of linear layers and experts compressed, everything else as it is."""
    with zipserv.FileWriter(folder / "model.safetensors", {"format": "pt"}) as writer:
        for name, tensor in tensors(spec, device):
            packed = tensor.dim() == 2 and not name.endswith("mlp.gate.weight") and (spec.tied or "embed" not in name)
            writer.add(name, zipserv.compress(tensor).cpu() if packed else tensor.cpu())


def read_folder(folder: Path, config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Through the plugin's mapper, as vLLM reads a folder."""
    import safetensors

    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if name != "zipserv.header"]  # noqa: SIM118
        yield from config.get_checkpoint_weight_mapper().apply((name, file.get_tensor(name)) for name in names)


# --- the run ---------------------------------------------------------------------------------------------------------


class Run:
    def __init__(self, name: str, spec: Spec, options: argparse.Namespace, device: torch.device) -> None:
        self.name, self.spec, self.options, self.device = name, spec, options, device
        self.glue = Glue(device.type == "cuda" and not options.no_compile)
        self.kind = standin.get_quantization_config("zipserv")
        self.context = standin.vllm_config(tied=spec.tied)
        self.told: dict[str, Any] = {"family": name, **vars(spec), "tensor_parallel": standin.tp_size(), "checks": []}
        self.failed: list[str] = []

    def say(self, text: str) -> None:
        if standin.tp_rank() == 0:
            print(f"[{time.perf_counter() - START:6.1f} s] {self.name}: {text}", flush=True)

    def passed(self, text: str) -> None:
        self.told["checks"].append(text)
        self.say(f"right: {text}")

    def build(self, config: Any, weights: Iterator[tuple[str, torch.Tensor]] | None = None, spec: Spec | None = None) -> Model:
        spec = spec or self.spec
        torch.set_default_dtype(BF16)
        torch.set_default_device(self.device)
        try:
            with standin.set_current_vllm_config(self.context):
                model = Model(spec, config, self.glue)
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
        with standin.set_current_vllm_config(self.context):
            load(model, weights or tensors(spec, self.device))
        return model.eval()

    def run(self, alone: dict[int, torch.Tensor] | None) -> dict[str, Any]:
        """What was found; `failed` says what is wrong."""
        plain, packed = self.build(None), self.build(self.kind())
        self.told["weight_bytes"] = {"plain": plain.bytes(), "zipserv": packed.bytes()}
        self.say(f"weights {plain.bytes() / 1e9:.2f} GB -> {packed.bytes() / 1e9:.2f} GB a rank ({packed.bytes() / plain.bytes():.3f} x)")
        models = {"plain": plain, "zipserv": packed}
        if self.spec.experts:
            models["zipserv, experts plain"] = self.build(self.kind(ignore=["*.experts"]))
        self.told["rows"] = []
        self.attempt(self.check_weights, plain, packed)
        self.attempt(self.check_layers, plain, packed)
        self.attempt(self.check_folder)
        for batch in self.options.batch:
            self.attempt(self.loop, models, batch, alone)
        self.attempt(self.check_invariance, packed)
        return self.told

    def attempt(self, step: Callable[..., None], *arguments: Any) -> None:
        """What goes wrong in one step is told, and the next is taken: time on a GPU is dear. Several ranks wait for each other: there all end."""
        try:
            step(*arguments)
        except Exception as error:
            text = str(error) if isinstance(error, Wrong) else traceback.format_exc()
            self.failed.append(f"{self.name}: {text}")
            print(f"rank {standin.tp_rank()}: WRONG: {self.failed[-1]}", flush=True)
            if standin.tp_size() > 1:
                os._exit(1)

    # -- checks

    def matrices(self, plain: Model, packed: Model) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, int, int]]:
        """Name, uncompressed weight, blob, rows, columns of each compressed matrix."""
        twins = dict(plain.named_layers())
        for name, module in packed.named_layers():
            method = module.quant_method
            if type(method).__name__ == "ZipServMoEMethod":
                for part, weight in ((method.w13, twins[name].w13_weight), (method.w2, twins[name].w2_weight)):
                    blobs = getattr(module, part.name)
                    for i, (start, stop) in enumerate(part.spans):
                        yield f"{name}.{part.name}[{i}]", weight[i], blobs[start:stop], part.m, part.k
            elif hasattr(module, "zip_weight") and module.zip_weight.plain is None:
                yield name, twins[name].weight, module.weight, module.zip_weight.m, module.zip_weight.k

    def check_weights(self, plain: Model, packed: Model) -> None:
        count = 0
        for name, weight, blob, m, k in self.matrices(plain, packed):
            back = torch.ops.zipserv.decompress(blob, m, k, 1)
            check(back.shape == weight.shape and torch.equal(back.view(torch.int16), weight.view(torch.int16)), f"{name} has other bits")
            count += 1
        check(count >= 3 * self.spec.layers, f"only {count} matrices are compressed")
        self.passed(f"{count} matrices decode to the uncompressed shards' bits")

    def check_layers(self, plain: Model, packed: Model) -> None:
        """Layer 0 and the head: by decompression the same bits, by the kernels an error like cuBLAS's."""
        twins = dict(plain.named_layers())
        chosen = [(n, m) for n, m in packed.named_layers() if (n.startswith("layers.0.") or n == "lm_head") and hasattr(m, "zip_weight")]
        sizes = sorted({1, *self.options.batch, 300})
        worst = 0.0
        for name, module in chosen:
            m, k = module.zip_weight.m, module.zip_weight.k
            for n in sizes:
                x = torch.randn(n, k, device=self.device).to(BF16)
                got = module.quant_method.apply(module, x, module.bias)
                want = twins[name].quant_method.apply(twins[name], x, module.bias)
                exact = x.double() @ twins[name].weight.double().T + (0 if module.bias is None else module.bias.double())
                errors = [float((y.double() - exact).square().mean().sqrt()) for y in (got, want)]
                worst = max(worst, errors[0] / errors[1])
                check(errors[0] <= 1.05 * errors[1], f"{name}, {n} tokens: error {errors[0]:.3g}, F.linear's {errors[1]:.3g}")
                if self.device.type == "cuda":
                    problem = choices.Problem(m, k, tune.bucket(n))
                    with choices.chosen(self.device.index or 0, problem, choices.Choice("decompress")):
                        got = module.quant_method.apply(module, x, module.bias)
                    check(torch.equal(got, want), f"{name}, {n} tokens: other bits by decompression")
        bits = "; the same bits by decompression" if self.device.type == "cuda" else ""
        self.passed(f"{len(chosen)} layers x {sizes} tokens: error at most {worst:.3f} x F.linear's{bits}")

    def check_folder(self) -> None:
        """A compressed folder, each rank taking its own tiles, against the plain checkpoint compressed while it loads."""
        spec = replace(self.spec, layers=min(self.spec.layers, 2 if not self.spec.experts else 1), vocab=min(self.spec.vocab, 8192))
        place = [tempfile.mkdtemp(prefix="zipserv-loop-") if standin.tp_rank() == 0 else ""]
        if standin.tp_size() > 1:
            dist.broadcast_object_list(place, device=self.device)
        folder = Path(place[0])
        if standin.tp_rank() == 0:
            write_folder(spec, self.device, folder)
        barrier()
        config = self.kind.from_config({"quant_method": "zipserv", "version": 1})
        start = time.perf_counter()
        read = self.build(config, read_folder(folder, config), spec)
        seconds = time.perf_counter() - start
        fresh = self.build(self.kind(), None, spec)
        pairs = list(zip(read.named_parameters(), fresh.named_parameters(), strict=True))
        for (name, a), (_, b) in pairs:
            check(a.dtype == b.dtype and torch.equal(a, b), f"{name} of the folder has other bytes")
        barrier()
        if standin.tp_rank() == 0:
            (folder / "model.safetensors").unlink()
            folder.rmdir()
        self.passed(f"a folder of {spec.layers} layers loads to the same {len(pairs)} parameters, byte for byte ({seconds:.1f} s)")

    def check_invariance(self, packed: Model) -> None:
        """A layer that is built while VLLM_BATCH_INVARIANT=1 stands in the environment switches the mode on."""
        if self.device.type != "cuda":
            return
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
        try:
            self.build(self.kind(), None, replace(self.spec, layers=1, vocab=1024, experts=min(self.spec.experts, 8)))
            check(zipserv.cuda.batch_invariant(), "the variable does not switch the mode on")
            count = 0
            for name, module in packed.named_layers():
                if not (name.startswith("layers.0.") or name == "lm_head") or not hasattr(module, "zip_weight"):
                    continue
                x = torch.randn(70, module.zip_weight.k, device=self.device).to(BF16)
                x[5] *= 1e3
                together = module.quant_method.apply(module, x, module.bias)
                for n in (1, 2, 8, 9, 16, 17, 32, 33, 64, 65):
                    some = torch.randperm(70, device=self.device)[:n]
                    got = module.quant_method.apply(module, x[some], module.bias)
                    check(torch.equal(got, together[some]), f"{name}: a batch of {n} changes bits")
                    count += 1
            if self.spec.experts:
                self.check_expert_forms(packed.layers[0].experts)
        finally:
            del os.environ["VLLM_BATCH_INVARIANT"]
            zipserv.set_batch_invariant(False)
        forms = "; experts: the three forms one by one agree, together a token has the bits it has alone" if self.spec.experts else ""
        self.passed(f"batch-invariant mode: {count} batches, no bit changes{forms}")

    def check_expert_forms(self, experts: Any) -> None:
        from zipserv.integrations.vllm import moe

        method, spec = experts.quant_method, self.spec
        for n in (1, 2, 5):
            x = torch.randn(n, spec.hidden, device=self.device).to(BF16)
            weights, ids = torch.randn(n, spec.experts, device=self.device).softmax(-1).topk(spec.top)
            routed = moe._routed(method._expert, spec.experts, x, weights, ids)
            check(torch.equal(routed, moe._masked(method._expert, spec.experts, x, weights, ids)), f"{n} tokens: masked and routed experts differ")
            if method.w13.longest and method.w2.longest:
                check(torch.equal(routed, moe._picked(method._pick, x, weights, ids)), f"{n} tokens: picked and routed experts differ")
            if not method._can_group(x.dtype, spec.top):
                continue
            together = method._grouped(x, weights, ids)
            off = distance(together.float(), routed.float())
            check(off < 0.01, f"{n} tokens: experts multiplied together are off by {off:.4f} of those one by one")
            for token in range(n):
                here = slice(token, token + 1)
                alone = method._grouped(x[here], weights[here], ids[here])
                check(torch.equal(alone, together[here]), f"{n} tokens: multiplied together, experts give token {token} other bits than alone")

    def check_no_wait(self, model: Model, state: State) -> None:
        """Not captured, either, does a dense step wait for the device."""
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model.step(state)
        except RuntimeError as error:
            raise Wrong(f"a step waits for the device: {error}") from error
        finally:
            torch.cuda.set_sync_debug_mode("default")

    # -- the loop

    def loop(self, models: dict[str, Model], batch: int, alone: dict[int, torch.Tensor] | None) -> None:
        row: dict[str, Any] = {"batch": batch}
        near = 0.1 if self.spec.experts else 0.05  # a router near a tie may choose another expert after a rounding
        state = State(self.spec, batch, self.options.context, self.device)
        eager, replays, outputs = {}, {}, {}
        for name, model in models.items():
            state.rewind()
            eager[name] = model.step(state).float()
            state.rewind()
        for name, model in models.items():
            if self.device.type != "cuda":
                replays[name], outputs[name] = (lambda model=model: model.step(state)), eager[name]
                continue
            if name == "zipserv" and not self.spec.experts:
                self.check_no_wait(model, state)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                model.step(state)
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            barrier()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # nccl's own thread asks for events meanwhile
                outputs[name] = model.step(state)
            replays[name] = graph.replay
        for name in models:
            state.rewind()
            replays[name]()
            got = (outputs[name] if self.device.type == "cuda" else eager[name]).float()
            far = distance(got, eager[name])
            row[f"graph to eager, {name}"] = far
            check(far < 0.4 * near, f"{name}, batch {batch}: the graph's logits are {far:.3g} from the eager loop's")
            if name != "plain":
                far = row[f"to plain, {name}"] = distance(got, eager["plain"])
                check(far < near, f"{name}, batch {batch}: logits are {far:.3g} from the uncompressed loop's")
        if alone is not None:
            far = row["to one GPU"] = distance(eager["zipserv"], alone[batch].to(self.device))
            check(far < near, f"batch {batch}: logits are {far:.3g} from one GPU's")
        row["same tokens"] = self.same_tokens(models, replays, state)
        row["seconds"] = self.timed(replays, state)
        base = row["seconds"]["plain"]
        row["speedup"] = {name: base / seconds for name, seconds in row["seconds"].items() if name != "plain"}
        told = ", ".join(f"{name} {batch / s:.1f} tokens/s" for name, s in row["seconds"].items())
        ratios = ", ".join(f"{name} {r:.3f} x" for name, r in row["speedup"].items())
        distances = ", ".join(f"{k} {v:.2g}" for k, v in row.items() if isinstance(v, float) and "to" in k.split())
        self.say(f"batch {batch}: {told}; {ratios}; same tokens {row['same tokens']:.0%}; logits' distances: {distances}")
        self.told["rows"].append(row)

    def same_tokens(self, models: dict[str, Model], replays: dict[str, Callable[[], object]], state: State) -> float:
        """Greedy tokens of both loops, each fed with the uncompressed one's."""
        steps = min(self.options.steps, self.options.context - state.filled)
        fed = []
        state.rewind()
        for _ in range(steps):
            replays["plain"]()
            fed.append(state.tokens.clone())
        state.rewind()
        same = []
        for token in fed:
            replays["zipserv"]()
            same.append((state.tokens == token).float().mean())
            state.tokens.copy_(token)
        return float(torch.stack(same).mean())

    def timed(self, replays: dict[str, Callable[[], object]], state: State) -> dict[str, float]:
        """Seconds of a step: medians of rounds in turns, forwards and backwards."""
        steps = min(self.options.steps, self.options.context - state.filled)
        seconds: dict[str, list[float]] = {name: [] for name in replays}
        for turn in range(self.options.rounds):
            for name in list(replays)[:: 1 if turn % 2 else -1]:
                state.rewind()
                barrier()
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(steps):
                    replays[name]()
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                seconds[name].append((time.perf_counter() - start) / steps)
        return {name: statistics.median(values) for name, values in seconds.items()}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of logits: the median over the sequences. A router that is near a tie may choose another expert after a rounding, for a few of them."""
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).median())


def barrier() -> None:
    if standin.tp_size() > 1:
        dist.barrier()


def one_gpu(name: str, spec: Spec, options: argparse.Namespace, device: torch.device) -> dict[int, torch.Tensor]:
    """The uncompressed model's first logits without tensor parallelism."""
    run = Run(name, spec, options, device)
    run.glue = Glue(compiled=False)  # for one step
    model = run.build(None)
    logits = {batch: model.step(State(spec, batch, options.context, device)).float().cpu() for batch in options.batch}
    del model
    release(device)
    return logits


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def chosen(spec: Spec, options: argparse.Namespace) -> Spec:
    if options.tiny:
        spec = replace(spec, **TINY, experts=min(spec.experts, 8), top=min(spec.top, 2))
    return replace(spec, layers=options.layers) if options.layers else spec


START = time.perf_counter()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--families", type=lambda text: text.split(","), default=list(FAMILIES), help=", ".join(FAMILIES))
    parser.add_argument("--batch", type=numbers, default=[1, 8, 32])
    parser.add_argument("--layers", type=int, help="so many instead of the model's")
    parser.add_argument("--context", type=int, default=1024, help="length of the cache, half of it filled")
    parser.add_argument("--steps", type=int, default=32, help="decode steps that are timed in one go")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a few hundred columns, two layers")
    parser.add_argument("--no-compile", action="store_true", help="small operations one by one")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    rank, world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", rank if world > 1 else device.index or 0)
        torch.cuda.set_device(device)
    torch._dynamo.config.recompile_limit = 256
    torch.manual_seed(0)
    register()

    specs = {name: chosen(FAMILIES[name], options) for name in options.families}
    alone: dict[str, Any] = {}
    if world > 1:
        with torch.no_grad():
            alone = {name: one_gpu(name, spec, options, device) for name, spec in specs.items()}
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", device_id=device if device.type == "cuda" else None)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    about = {"device": name, "torch": torch.__version__, "ranks": world, "experts together": grouped.ENABLED}
    found: list[dict[str, Any]] = []
    failed: list[str] = []
    for name, spec in specs.items():
        run = Run(name, spec, options, device)
        with torch.no_grad():
            run.attempt(lambda run=run, name=name: found.append(run.run(alone.get(name))))  # type: ignore[misc]
        failed += run.failed
        del run
        if rank == 0 and options.out:
            options.out.write_text(json.dumps({"about": about, "families": found, "failed": failed}, indent=1) + "\n")
        release(device)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
