# SPDX-License-Identifier: Apache-2.0
"""Experts: the loop over those that were hit, the masked form that CUDA graphs need, and what is left to vLLM."""

from __future__ import annotations

import dataclasses

import pytest
import reference
import support
import torch
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from zipserv.integrations.vllm import moe

E, H, INNER, TOP = 8, 96, 64, 2


def routing(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    weights, ids = torch.randn(tokens, E).softmax(-1).topk(TOP)
    return weights, ids


def experts() -> tuple[torch.Tensor, torch.Tensor]:
    return (torch.randn(E, 2 * INNER, H) * 0.1).bfloat16(), (torch.randn(E, H, INNER) * 0.1).bfloat16()


@pytest.mark.parametrize("tokens", [0, 1, 7, 64])
@pytest.mark.parametrize("absent", [False, True])
def test_both_forms_agree_with_the_definition(tokens, absent) -> None:
    w13, w2 = experts()
    x = torch.randn(tokens, H).bfloat16()
    weights, ids = routing(tokens)
    if absent:  # expert parallel: other ranks' experts have the number -1
        ids = torch.where(ids % 2 == 0, ids, -1)

    def expert(number: int, rows: torch.Tensor) -> torch.Tensor:
        return moe._activate(MoEActivation.SILU, rows @ w13[number].t()) @ w2[number].t()

    routed, masked = (form(expert, E, x, weights, ids) for form in (moe._routed, moe._masked))
    expected = torch.empty_like(x)
    here = torch.where(ids < 0, 0, weights)
    reference._fused_moe(expected, x, w13, w2, None, None, here, ids.clamp(min=0), False, "silu", "")
    for got in (routed, masked):
        assert got.shape == x.shape and got.dtype == x.dtype
        torch.testing.assert_close(got.float(), expected.float(), rtol=0.02, atol=0.01)
    torch.testing.assert_close(routed.float(), masked.float(), rtol=0.02, atol=0.01)


def test_the_masked_form_adds_nothing_of_experts_that_were_not_chosen() -> None:
    """Not even infinities or NaN: zero times infinity would be."""
    x, ids, weights = torch.randn(3, H).bfloat16(), torch.zeros(3, TOP, dtype=torch.long), torch.ones(3, TOP)

    def expert(number: int, rows: torch.Tensor) -> torch.Tensor:
        return rows if number == 0 else torch.full_like(rows, float("inf"))

    assert torch.isfinite(moe._masked(expert, E, x, weights, ids)).all()


@pytest.mark.parametrize("activation", sorted(moe._GATES, key=lambda a: a.value))
def test_activations_are_vllms(activation, dtype) -> None:
    from vllm.model_executor.layers import activation as ops

    x = torch.randn(5, 64).bfloat16()
    native = {"silu": ops.SiluAndMul, "gelu": ops.GeluAndMul, "gelu_tanh": lambda: ops.GeluAndMul(approximate="tanh")}[activation.value]()
    assert torch.equal(moe._activate(activation, x), native.forward_native(x))


def test_what_is_left_to_vllm(folders) -> None:
    with support.load(folders.plain("mixtral"), "zipserv") as loaded:
        layer = next(m for m in loaded.model.modules() if isinstance(getattr(m, "quant_method", None), moe.ZipServMoEMethod))
        config = layer.moe_config
    assert moe.ZipServMoEMethod.why_not(config) is None
    for change, said in (
        ({"has_bias": True}, "bias"),
        ({"is_lora_enabled": True}, "LoRA"),
        ({"activation": MoEActivation.SWIGLUOAI}, "swigluoai"),
        ({"swiglu_limit": 7.0}, "clamped"),
    ):
        assert said in (moe.ZipServMoEMethod.why_not(dataclasses.replace(config, **change)) or "")
