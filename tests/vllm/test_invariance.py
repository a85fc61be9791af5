# SPDX-License-Identifier: Apache-2.0
"""Batch-invariant mode: under VLLM_BATCH_INVARIANT=1 a token's bits do not depend on what else is in the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

import zipserv
from test_layers import LAYERS, K, give, weights
from zipserv import cpu, cuda
from zipserv.integrations.vllm import moe
from zipserv.integrations.vllm.config import ZipServConfig
from zipserv.integrations.vllm.weight import follow_batch_invariance

TOKENS = 70


@pytest.fixture
def modes() -> Iterator[None]:
    """Whatever a test sets is undone."""
    before = cpu.cpu_linear(), cuda.batch_invariant()
    yield
    cpu.set_cpu_linear(before[0])
    cuda.set_batch_invariant(before[1])


@pytest.fixture
def invariant(monkeypatch, modes) -> None:
    """Set late, as a script may do it: the library has read its environment long before."""
    cpu.set_cpu_linear("auto")
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")


def varies(apply: Callable[[torch.Tensor], torch.Tensor], k: int) -> int:
    """How many batches give a token other bits than it has in the batch of all."""
    torch.manual_seed(2)
    x = torch.randn(TOKENS, k).bfloat16()
    x[5] *= 1e3  # a neighbour with large values
    together = apply(x)
    wrong = 0
    for size in (1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 64, 65):
        for _ in range(3):
            chosen = torch.randperm(TOKENS)[:size]
            wrong += not torch.equal(apply(x[chosen]).view(torch.int16), together[chosen].view(torch.int16))
    return wrong


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", LAYERS)
def test_linear_layers(dtype, invariant, kind, threads) -> None:
    build, shapes = LAYERS[kind]
    layer = build(bias=True, quant_config=ZipServConfig(), prefix="x", return_bias=False)
    layer.bias.data.normal_()
    give(layer, [(shard, weights(m)) for shard, m in shapes], "plain")
    assert layer.weight.dtype == torch.uint8
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert varies(layer, K) == 0
    finally:
        torch.set_num_threads(before)


def test_head(dtype, invariant) -> None:
    head = ParallelLMHead(333, K, quant_config=ZipServConfig(), prefix="lm_head")
    give(head, [(None, weights(333))], "plain")
    head.quant_method.process_weights_after_loading(head)
    assert varies(lambda x: head.quant_method.apply(head, x), K) == 0


@pytest.mark.parametrize("form", [moe._routed, moe._masked])
def test_experts(dtype, invariant, form) -> None:
    """Both forms, and the same bits from either: an engine uses one for prompts and the other in CUDA graphs."""
    follow_batch_invariance()
    experts, inner, top = 4, 128, 2
    up = [zipserv.compress(weights(2 * inner)) for _ in range(experts)]
    down = [zipserv.compress(weights(K, inner)) for _ in range(experts)]
    router = torch.randn(experts, K).bfloat16()

    def expert(number: int, x: torch.Tensor) -> torch.Tensor:
        return zipserv.linear(moe._activate(MoEActivation.SILU, zipserv.linear(x, up[number])), down[number])

    def apply(x: torch.Tensor, form=form) -> torch.Tensor:
        chosen = (x[:, None].float() * router.float()).sum(-1)
        weight, ids = chosen.softmax(-1).topk(top)
        return form(expert, experts, x, weight, ids)

    assert varies(apply, K) == 0
    x = torch.randn(9, K).bfloat16()
    assert torch.equal(apply(x), apply(x, moe._masked))
    picked = apply(x, lambda run, count, *routing: moe._picked(lambda number: lambda rows: run(int(number), rows), *routing))
    assert torch.equal(apply(x), picked)


def test_layers_follow_vllms_variable(dtype, invariant) -> None:
    assert cpu.cpu_linear() == "auto" and not cuda.batch_invariant()
    ReplicatedLinear(K, 320, bias=False, quant_config=ZipServConfig(), prefix="x")
    assert cpu.cpu_linear() == "fused" and cuda.batch_invariant()


def test_without_it_nothing_is_switched(dtype, modes) -> None:
    ReplicatedLinear(K, 320, bias=False, quant_config=ZipServConfig(), prefix="x")
    assert cpu.cpu_linear() == "exact" and not cuda.batch_invariant()


@pytest.mark.skipif(not cpu.FEW_TOKENS, reason="on this processor few tokens are multiplied as many are")
def test_the_property_is_not_free(dtype, modes) -> None:
    """Without the mode a token's bits do change with the batch: few tokens and many are multiplied in different ways."""
    cpu.set_cpu_linear("auto")
    m = 4096  # of 512 results a token all may round alike in both ways, where these differ in the order of sums alone
    layer = ReplicatedLinear(K, m, bias=False, quant_config=ZipServConfig(), prefix="x", return_bias=False)
    give(layer, [(None, weights(m))], "plain")
    assert varies(layer, K) > 0
