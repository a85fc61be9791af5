# SPDX-License-Identifier: Apache-2.0
"""zipserv.linear against torch.nn.functional.linear and float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import zipserv
from helpers import DTYPES, bits, compressed, linear64, weights
from zipserv import ops

# Raw and tiled weights, ragged and whole tiles, one row, one column.
SIZES = [(1, 1), (1, 300), (300, 1), (64, 64), (128, 192), (190, 250), (320, 500)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k"), SIZES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_same_as_f_linear_and_near_float64(m: int, k: int, dtype: torch.dtype, with_bias: bool) -> None:
    weight, z = compressed(m, k, dtype=dtype)
    bias = weights(m, dtype=dtype, sigma=1) if with_bias else None
    x = weights(7, k, dtype=dtype, sigma=1)
    y, expected, exact = zipserv.linear(x, z, bias), F.linear(x, weight, bias), linear64(x, weight, bias)
    assert y.shape == expected.shape and y.dtype == dtype and y.is_contiguous()
    # One rounding of the exact sum, and what is lost in FP32 sums of these terms.
    terms = linear64(x.abs(), weight.abs(), None if bias is None else bias.abs())
    allowed = torch.finfo(dtype).eps * exact.abs() + 4e-6 * terms + 1e-7
    assert bool(((y.double() - exact).abs() <= allowed).all())
    ours, theirs = (y.double() - exact).square().mean(), (expected.double() - exact).square().mean()
    assert ours <= theirs * 1.05 + 1e-12


@pytest.mark.parametrize("panel_bytes", [1, 64 * 500 * 2, 200 * 500 * 2])
def test_any_panel_gives_the_same(panel_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, z = compressed(320, 500)
    x, bias = weights(5, 500, sigma=1), weights(320)
    monkeypatch.setattr(ops, "PANEL_BYTES", panel_bytes)
    assert torch.equal(zipserv.linear(x, z, bias), F.linear(x, weight, bias))


@pytest.mark.parametrize("lead", [(), (1,), (0,), (2, 3), (2, 0, 3), (2, 1, 3)], ids=str)
def test_leading_dimensions(lead: tuple[int, ...]) -> None:
    weight, z = compressed(128, 192)
    x = weights(*lead, 192)
    y = zipserv.linear(x, z)
    assert y.shape == (*lead, 128)
    assert torch.allclose(y.float(), F.linear(x, weight).float(), rtol=1e-2, atol=1e-3)


def test_strided_inputs() -> None:
    weight, z = compressed(128, 192)
    bias = weights(128)
    base = weights(192, 6)
    for x in (base.t(), weights(6, 400)[:, 5:389:2], weights(4, 3, 192).transpose(0, 1), weights(1, 192).expand(5, 192)):
        assert not x.is_contiguous()
        assert torch.equal(bits(zipserv.linear(x, z, bias)), bits(zipserv.linear(x.contiguous(), z, bias)))
    twice = bias.repeat_interleave(2)[::2]
    assert torch.equal(bits(zipserv.linear(base.t(), z, twice)), bits(zipserv.linear(base.t(), z, bias)))


def test_special_values_pass_through() -> None:
    weight = weights(64, 128)
    weight[0, 0], weight[1, 1], weight[2, 2] = float("inf"), float("nan"), float("-inf")
    y, expected = zipserv.linear(torch.ones(1, 128, dtype=torch.bfloat16), zipserv.compress(weight)), weight.float().sum(1)
    assert y[0, 0] == float("inf") and y[0, 1].isnan() and y[0, 2] == float("-inf")
    assert torch.allclose(y[0, 3:].float(), expected[3:], rtol=1e-2, atol=1e-2)


def test_errors_say_what_would_be_right() -> None:
    _, z = compressed(128, 192)
    x = weights(2, 192)
    cases = [
        (lambda: zipserv.linear(x.float(), z), TypeError, r"x\.to\(torch\.bfloat16\)"),
        (lambda: zipserv.linear(x.half(), z), TypeError, "float16"),
        (lambda: zipserv.linear(x[:, :191], z), ValueError, r"\(2, 191\).*should be 192"),
        (lambda: zipserv.linear(x[0, 0], z), ValueError, "should be 192"),
        (lambda: zipserv.linear([1.0], z), TypeError, "list"),  # type: ignore[arg-type]
        (lambda: zipserv.linear(x, x), TypeError, r"zipserv\.compress\(tensor\)"),  # type: ignore[arg-type]
        (lambda: zipserv.linear(x, z, weights(127)), ValueError, r"should be \(128,\)"),
        (lambda: zipserv.linear(x, z, weights(1, 128)), ValueError, r"should be \(128,\)"),
        (lambda: zipserv.linear(x, z, torch.zeros(128)), TypeError, r"bias\.to\(torch\.bfloat16\)"),
        (lambda: zipserv.linear(x.to("meta"), z), ValueError, r"meta.*cpu"),
        (lambda: zipserv.linear(x, z, weights(128).to("meta")), ValueError, "bias is on meta"),
        (lambda: zipserv.linear(x, zipserv.compress(weights(4, 8, 8))), ValueError, "two dimensions"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()


def test_gradients_of_x_and_bias() -> None:
    weight, z = compressed(190, 250)
    for x in (weights(3, 4, 250, sigma=1), weights(250, sigma=1), weights(250, 5, sigma=1).t()):
        bias = weights(190)
        ours = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
        theirs = [t.detach().double().requires_grad_() for t in (x, bias)]
        up = weights(*x.shape[:-1], 190, sigma=1)
        zipserv.linear(ours[0], z, ours[1]).backward(up)
        F.linear(theirs[0], weight.double(), theirs[1]).backward(up.double())
        for mine, exact in zip(ours, theirs, strict=True):
            assert mine.grad is not None and exact.grad is not None
            assert mine.grad.dtype == torch.bfloat16 and mine.grad.shape == exact.grad.shape
            assert torch.allclose(mine.grad.double(), exact.grad, rtol=2**-8, atol=1e-4)


def test_gradient_in_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, z = compressed(320, 500)
    x = weights(3, 500).requires_grad_()
    whole = torch.autograd.grad(zipserv.linear(x, z).sum(), x)[0]
    monkeypatch.setattr(ops, "PANEL_BYTES", 1)
    panels = torch.autograd.grad(zipserv.linear(x, z).sum(), x)[0]
    assert torch.allclose(whole.double(), panels.double(), rtol=2**-8, atol=1e-4)
    assert torch.allclose(panels.double(), weight.double().sum(0).expand(3, 500), rtol=2**-8, atol=1e-4)


def test_gradient_of_an_empty_batch_and_second_order() -> None:
    weight, z = compressed(128, 192)
    x = weights(0, 192).requires_grad_()
    zipserv.linear(x, z).sum().backward()
    assert x.grad is not None and x.grad.shape == (0, 192)
    x = weights(2, 192, sigma=1).requires_grad_()
    v = weights(2, 128, sigma=1).requires_grad_()
    (first,) = torch.autograd.grad(zipserv.linear(x, z), x, v, create_graph=True)
    (second,) = torch.autograd.grad(first, v, torch.ones_like(first))
    assert torch.allclose(second.double(), weight.double().sum(1).expand(2, 128), rtol=2**-8, atol=1e-3)


def test_autocast_casts_to_the_weights_dtype() -> None:
    weight, z = compressed(128, 192)
    x, bias = torch.randn(3, 192), torch.randn(128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = zipserv.linear(x, z, bias), F.linear(x, weight.float(), bias)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)


def test_memory_is_a_panel_not_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of the weight's size appears while a layer runs."""
    _, z = compressed(1024, 512)
    monkeypatch.setattr(ops, "PANEL_BYTES", 64 * 512 * 2)
    largest = 0
    x = weights(2, 512)
    with torch.profiler.profile(profile_memory=True) as profile:
        zipserv.linear(x, z)
    for event in profile.events() or ():
        largest = max(largest, event.cpu_memory_usage)
    assert 0 < largest <= 4 * 64 * 512 * 2 < z.original_nbytes


def test_bias_that_is_no_tensor() -> None:
    packed = zipserv.compress(weights(64, 64))
    with pytest.raises(TypeError, match="bias must be a torch.Tensor or None, not list"):
        zipserv.linear(weights(1, 64), packed, [0.0] * 64)  # type: ignore[arg-type]


def test_nested_tensor_is_refused_with_the_cure() -> None:
    nested = torch.nested.nested_tensor([weights(2, 64), weights(3, 64)])
    with pytest.raises(TypeError, match="unbind"):
        zipserv.compress(nested)
