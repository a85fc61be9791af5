# SPDX-License-Identifier: Apache-2.0
"""One rank of a tensor- or pipeline-parallel group: loads its shard, compares it, and rank 0 (or the last stage) saves logits.

python rank.py RANK WORLD PORT PIPELINE PLAIN ZIP OUT: PLAIN is a plain folder, ZIP the same model compressed, or "flag".
"""

from __future__ import annotations

import os
import sys

os.environ["VLLM_TARGET_DEVICE"] = "cpu"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from pathlib import Path

import reference
import support
import torch
import torch.distributed as dist
from vllm.sequence import IntermediateTensors

from zipserv.integrations.vllm.embedding import ZipServEmbeddingMethod
from zipserv.integrations.vllm.linear import ZipServLinearMethod
from zipserv.integrations.vllm.moe import ZipServMoEMethod

TOKENS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3])


def run(loaded: support.Loaded, rank: int, world: int, pipeline: int) -> torch.Tensor | None:
    model, config = loaded.model, loaded.config
    if pipeline == 1:
        return reference.logits(model, config, TOKENS)
    names = ("hidden_states", "residual")
    if rank == 0:
        states = reference.hidden(model, config, TOKENS)
        for name in names:
            dist.send(states[name].contiguous(), world - 1)
        return None
    received = {name: torch.empty(len(TOKENS), 256, dtype=torch.bfloat16) for name in names}
    for name in names:
        dist.recv(received[name], 0)
    states = reference.hidden(model, config, TOKENS, intermediate_tensors=IntermediateTensors(received))
    with torch.no_grad():
        return model.compute_logits(states)


def same_layers(plain: support.Loaded, zipped: support.Loaded) -> int:
    """Every layer of this rank against its uncompressed twin: the same bits out."""
    compared = 0
    twins = plain.modules()
    for name, module in zipped.modules().items():
        if isinstance(module.quant_method, ZipServLinearMethod | ZipServEmbeddingMethod):
            x = torch.randn(5, module.zip_weight.k).bfloat16()
            a, b = (m.quant_method.apply(m, x, None) for m in (module, twins[name]))
            assert torch.equal(a, b), name
            assert module.weight.dtype == torch.uint8 or module.zip_weight.plain is not None, name
            compared += 1
    experts = {n: m for n, m in plain.model.named_modules() if hasattr(m, "w13_weight")}
    for name, module in zipped.model.named_modules():
        if isinstance(getattr(module, "quant_method", None), ZipServMoEMethod):
            parts = (module.quant_method.w13, module.quant_method.w2)
            for part, weight in zip(parts, (experts[name].w13_weight, experts[name].w2_weight), strict=True):
                assert len(part.spans) == weight.shape[0]
                for number in range(weight.shape[0]):
                    assert torch.equal(part.linear(number, torch.eye(part.k).bfloat16()).t(), weight[number]), name
            compared += 1
    return compared


def main() -> None:
    rank, world, port, pipeline = map(int, sys.argv[1:5])
    plain, zipped, out = (Path(a) for a in sys.argv[5:8])
    support.join_group(rank, world, port, pipeline)
    torch.set_num_threads(1)
    torch.manual_seed(1)
    parallel = dict(tensor_parallel_size=world // pipeline, pipeline_parallel_size=pipeline, distributed_executor_backend="external_launcher")
    if "--expert-parallel" in sys.argv:
        parallel["enable_expert_parallel"] = True
    with support.load(plain, **parallel) as a:
        # vLLM's uncompressed experts on a CPU know no expert parallelism: there only the compressed model can run
        expected = None if "--expert-parallel" in sys.argv else run(a, rank, world, pipeline)
    with support.load(plain if str(zipped) == "flag" else zipped, "zipserv" if str(zipped) == "flag" else None, **parallel) as b:
        compared = same_layers(a, b)
        got = run(b, rank, world, pipeline)
    assert compared, "no layer was compared"
    if got is not None:
        torch.save({"expected": expected, "got": got, "compared": compared}, f"{out}.{rank}")
    dist.barrier()


if __name__ == "__main__":
    main()
