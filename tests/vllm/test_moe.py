# SPDX-License-Identifier: Apache-2.0
"""Experts: together, the loop over those that were hit, the masked form that CUDA graphs need, and what is left to vLLM."""

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

    def pick(number: torch.Tensor) -> moe.Expert:
        assert number.shape == (1,) and number.dtype == torch.int64
        up, down = w13.index_select(0, number)[0], w2.index_select(0, number)[0]
        return lambda rows: moe._activate(MoEActivation.SILU, rows @ up.t()) @ down.t()

    routed, masked = (form(expert, E, x, weights, ids) for form in (moe._routed, moe._masked))
    picked = moe._picked(pick, x, weights, ids.int())
    expected = torch.empty_like(x)
    here = torch.where(ids < 0, 0, weights)
    reference._fused_moe(expected, x, w13, w2, None, None, here, ids.clamp(min=0), False, "silu", "")
    for got in (routed, masked, picked):
        assert got.shape == x.shape and got.dtype == x.dtype
        torch.testing.assert_close(got.float(), expected.float(), rtol=0.02, atol=0.01)
    torch.testing.assert_close(routed.float(), masked.float(), rtol=0.02, atol=0.01)
    torch.testing.assert_close(routed.float(), picked.float(), rtol=0.02, atol=0.01)


def on_gpu(x: torch.Tensor) -> torch.Tensor:
    class OnGpu(torch.Tensor):
        is_cuda = True

    return x.as_subclass(OnGpu)


def capturing(monkeypatch, x: torch.Tensor) -> torch.Tensor:
    """The tensor as on a GPU whose stream is being captured; the products themselves are the CPU's."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    return on_gpu(x)


@pytest.mark.parametrize("tokens,form", [(1, "picked"), (2, "masked"), (40, "masked"), (1, "grouped"), (40, "grouped"), (3000, "masked")])
def test_a_captured_layer_never_asks_the_host(folders, monkeypatch, tokens, form) -> None:
    """Which form runs follows from shapes alone. The forms themselves see tensors whose values may not be read on the host."""
    with support.load(folders.plain("qwen3-moe"), "zipserv") as loaded:
        layer = next(m for m in loaded.model.modules() if isinstance(getattr(m, "quant_method", None), moe.ZipServMoEMethod))
    method = layer.quant_method
    assert method.w13.longest and method.w2.longest and all(start % moe.grouped.ALIGN == 0 for start, _ in method.w13.spans)
    called = []
    for name in ("_routed", "_masked", "_picked"):
        monkeypatch.setattr(moe, name, lambda *args, name=name: called.append(name))
    x = torch.randn(tokens, 256).bfloat16()
    weights, ids = torch.rand(tokens, 2), torch.zeros(tokens, 2, dtype=torch.int32)
    monkeypatch.setattr(method, "_grouped", lambda *args: called.append("_grouped"))
    if form != "grouped" and tokens < 3000:
        monkeypatch.setattr(method, "_can_group", lambda *args: False)
    method.apply(layer, x, weights, ids, None, None)
    method.apply(layer, capturing(monkeypatch, x), weights, ids, None, None)
    assert called == ["_routed", f"_{form}"]


def test_which_layers_are_multiplied_together(folders, monkeypatch) -> None:
    """Not captured: few tokens an expert; in batch-invariant mode any number; never FP16 or experts that are stored raw."""
    with support.load(folders.plain("qwen3-moe"), "zipserv") as loaded:
        layer = next(m for m in loaded.model.modules() if isinstance(getattr(m, "quant_method", None), moe.ZipServMoEMethod))
    method, called = layer.quant_method, []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(moe, "_routed", lambda *args: called.append("_routed"))
    monkeypatch.setattr(method, "_grouped", lambda *args: called.append("_grouped"))

    def form(tokens: int, dtype: torch.dtype = torch.bfloat16) -> str:
        called.clear()
        x = on_gpu(torch.randn(tokens, 256).to(dtype))
        method.apply(layer, x, torch.rand(tokens, 2), torch.zeros(tokens, 2, dtype=torch.int32), None, None)
        return called[0]

    assert [form(n) for n in (0, 1, 256, 257, 5000)] == ["_routed", "_grouped", "_grouped", "_routed", "_routed"]
    assert form(1, torch.float16) == "_routed"
    monkeypatch.setattr(moe.cuda, "batch_invariant", lambda: True)
    assert [form(n) for n in (1, 256, 257, 5000)] == ["_grouped"] * 4
    monkeypatch.setattr(moe.grouped, "ENABLED", False)
    assert form(1) == "_routed", "ZIPSERV_GROUPED_EXPERTS=0"
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(moe, "_routed", lambda *args: called.append("_routed"))
    monkeypatch.setattr(method.w2, "fits", False)
    assert form(1) == "_routed"


def test_experts_that_are_stored_raw_are_never_multiplied_together(dtype) -> None:
    """One that does not shrink is enough: the kernel would take its weights for tiles."""
    w = (torch.randn(2, 128, 192) * 0.02).bfloat16()
    noise = torch.randint(-32768, 32767, (128, 192), dtype=torch.int16).view(torch.bfloat16)
    for third, fits in ((w[0], True), (noise, False)):
        layer = torch.nn.Module()
        loader = lambda param, loaded, at: param.data[at].copy_(loaded)  # noqa: E731
        experts = moe.Experts(layer, "w13_weight", "layer", (3, 128, 192), torch.bfloat16, {"weight_loader": loader})
        param = layer.w13_weight
        for at, matrix in enumerate((w[0], w[1], third)):
            param.weight_loader(param, matrix, at)
        experts.settle()
        assert (experts.fits, bool(experts.longest)) == (fits, fits)
        if not fits:
            with pytest.raises(ValueError, match="raw"):
                routing = moe.grouped.moe_route(torch.zeros(1, 1, dtype=torch.int32), 3, 8)
                moe.grouped.moe_linear(w[0, :1], experts.weight().blobs, 3, routing, 8, 128, 192, 1)


@pytest.mark.parametrize("serves", [True, False])
def test_kernels_are_compiled_while_loading(folders, monkeypatch, serves) -> None:
    """On a GPU, all that experts multiplied together need: no request and no capture is to wait for the compiler."""
    with support.load(folders.plain("qwen3-moe"), "zipserv") as loaded:
        layer = next(m for m in loaded.model.modules() if isinstance(getattr(m, "quant_method", None), moe.ZipServMoEMethod))
    method, warmed = layer.quant_method, []
    monkeypatch.setattr(moe.cuda, "warm_experts", lambda blobs, m, k, gated=False: warmed.append((m, k, gated)))
    method.process_weights_after_loading(layer)
    assert not warmed, "there is no GPU"
    weight = moe.Experts.weight
    monkeypatch.setattr(moe.Experts, "weight", lambda self: weight(self)._replace(blobs=on_gpu(weight(self).blobs)))
    monkeypatch.setattr(moe.grouped, "ENABLED", serves)
    method.process_weights_after_loading(layer)
    up, down = (method.w13.m, method.w13.k), (method.w2.m, method.w2.k)
    assert warmed == ([(*up, False), (*up, True), (*down, False)] if serves else [])


@pytest.mark.parametrize("tokens", [1, 7, 40])
@pytest.mark.parametrize("absent", [False, True])
def test_experts_together_are_those_one_by_one(folders, monkeypatch, tokens, absent) -> None:
    with support.load(folders.plain("qwen3-moe"), "zipserv") as loaded:
        layer = next(m for m in loaded.model.modules() if isinstance(getattr(m, "quant_method", None), moe.ZipServMoEMethod))
    method, count = layer.quant_method, len(layer.quant_method.w13.spans)
    x = torch.randn(tokens, 256).bfloat16()
    weights, ids = torch.randn(tokens, count).softmax(-1).topk(2)
    if absent:
        ids = torch.where(ids % 2 == 0, ids, -1)
    want = moe._routed(method._expert, count, x, weights, ids)
    for most in (moe.grouped.MAX_PAIRS, 6):  # at once, and a few tokens at a time
        monkeypatch.setattr(moe.grouped, "MAX_PAIRS", most)
        torch.testing.assert_close(method._grouped(x, weights, ids).float(), want.float(), rtol=0.02, atol=0.01)


@pytest.mark.parametrize("form", ["masked", "picked"])
def test_forms_for_capture_run_without_values(form) -> None:
    """On the meta device there is nothing to ask: `.item()`, `nonzero`, `unique` would all fail."""
    x, weights = torch.empty(3, H, device="meta"), torch.empty(3, TOP, device="meta")
    ids = torch.empty(3, TOP, dtype=torch.int32, device="meta")
    if form == "masked":
        y = moe._masked(lambda number, rows: rows * 2, E, x, weights, ids)
    else:
        y = moe._picked(lambda number: lambda rows: rows * 2, x, weights, ids)
    assert y.shape == x.shape and y.is_meta
    with pytest.raises((NotImplementedError, RuntimeError)):
        moe._routed(lambda number, rows: rows * 2, E, x, weights, ids)


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
