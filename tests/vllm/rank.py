# SPDX-License-Identifier: Apache-2.0
"""One rank of a tensor-, pipeline- or data-parallel group: loads its shard, compares it, and saves its logits (the last stage does)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import reference
import support
import torch
import torch.distributed as dist
from vllm.distributed import get_dp_group, get_tp_group
from vllm.sequence import IntermediateTensors

from zipserv import plan
from zipserv.integrations.vllm.embedding import ZipServEmbeddingMethod
from zipserv.integrations.vllm.linear import ZipServLinearMethod
from zipserv.integrations.vllm.moe import ZipServMoEMethod

TOKENS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3])


@dataclass(frozen=True)
class Job:
    """``plain``: a plain folder; ``zipped``: the same model compressed, None: the plain one with the flag. Sizes of the groups."""

    plain: Path
    zipped: Path | None
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    expert_parallel: bool = False

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline * self.data


def tokens_of(replica: int) -> torch.Tensor:
    """Each data-parallel replica has a request of its own."""
    return TOKENS.roll(replica)[: len(TOKENS) - replica]


def run(job: Job, loaded: support.Loaded, rank: int) -> torch.Tensor | None:
    model, config = loaded.model, loaded.config
    if job.pipeline == 1:
        return reference.logits(model, config, tokens_of(rank // job.tensor))
    names = ("hidden_states", "residual")
    if rank == 0:
        states = reference.hidden(model, config, TOKENS)
        for name in names:
            dist.send(states[name].contiguous(), job.world - 1)
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


def planned(job: Job, loaded: support.Loaded) -> tuple[int, int]:
    """What `zipserv plan` says of the bytes of a rank's weights, and what vLLM has put there."""
    layout = plan.architecture.layout(loaded.config.model_config.hf_config.to_dict(), job.tensor)
    return 2 * (sum(m.elements * m.count for m in layout.matrices) + layout.vectors), sum(p.nbytes for p in loaded.model.parameters())


def main(job: Job, rank: int, port: int, out: Path) -> None:
    os.environ["RANK"] = str(rank)  # vLLM asks it which replica this is
    torch.set_num_threads(1)
    torch.manual_seed(1)
    # vLLM compiles five lines of its embedding, which takes longer than all else here. The models are eager in either case.
    torch._dynamo.config.disable = True
    parallel = dict(
        tensor_parallel_size=job.tensor, pipeline_parallel_size=job.pipeline, data_parallel_size=job.data,
        distributed_executor_backend="external_launcher", enable_expert_parallel=job.expert_parallel,
    )  # fmt: skip
    support.join_group(rank, job.world, port, **parallel)
    assert (get_tp_group().world_size, get_dp_group().world_size) == (job.tensor, job.data)
    with support.load(job.plain, **parallel) as a:
        # vLLM's uncompressed experts on a CPU know no expert parallelism: there only the compressed model can run
        expected = None if job.expert_parallel else run(job, a, rank)
        sizes = planned(job, a)
    with support.load(job.zipped or job.plain, None if job.zipped else "zipserv", **parallel) as b:
        compared = same_layers(a, b)
        got = run(job, b, rank)
    assert compared, "no layer was compared"
    if got is not None:
        torch.save({"expected": expected, "got": got, "compared": compared, "planned": sizes}, f"{out}.{rank}")
    dist.barrier()
