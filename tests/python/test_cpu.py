# SPDX-License-Identifier: Apache-2.0
"""Products on the CPU: fused (decoded and multiplied tile by tile) and exact (F.linear's bits), and the switch between them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

import zipserv
from helpers import assert_same_bits, bits, compressed, flipped, linear64, weights
from zipserv import _zipserv, cpu
from zipserv.rows import linear_rows

pytestmark = pytest.mark.default_products

# Raw and tiled weights, ragged and whole tiles, one row, one column.
SIZES = [(1, 1), (1, 300), (300, 1), (64, 64), (128, 192), (190, 250), (320, 500)]


@pytest.fixture(autouse=True)
def _auto() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    zipserv.set_cpu_linear("auto")
    torch.set_num_threads(threads)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 16, 17, 40])
@pytest.mark.parametrize("mode", ["auto", "fused"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_as_near_to_float64_as_f_linear(tokens: int, mode: str, with_bias: bool) -> None:
    zipserv.set_cpu_linear(mode)
    ours = theirs = 0.0
    for m, k in SIZES:
        weight, z = compressed(m, k)
        bias = weights(m, sigma=1) if with_bias else None
        x = weights(tokens, k, sigma=1)
        y, expected, exact = zipserv.linear(x, z, bias), F.linear(x, weight, bias), linear64(x, weight, bias)
        assert y.shape == expected.shape and y.dtype == torch.bfloat16 and y.is_contiguous()
        terms = linear64(x.abs(), weight.abs(), None if bias is None else bias.abs())
        assert bool(((y.double() - exact).abs() <= 2**-8 * exact.abs() + 4e-6 * terms + 1e-7).all())
        ours += float((y.double() - exact).square().sum())
        theirs += float((expected.double() - exact).square().sum())
    assert ours <= theirs * 1.02


def test_bits_depend_on_neither_tokens_nor_threads_nor_strides() -> None:
    zipserv.set_cpu_linear("fused")
    _, z = compressed(1000, 700)
    bias, x = weights(1000), weights(37, 700, sigma=1)
    every = zipserv.linear(x, z, bias)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert_same_bits(zipserv.linear(x, z, bias), every)
        for tokens in (1, 2, 3, 5, 16):
            assert_same_bits(zipserv.linear(x[20 : 20 + tokens], z, bias), every[20 : 20 + tokens])
    wide = weights(37, 900, sigma=1)
    wide[:, 100:800] = x
    for same in (wide[:, 100:800], x.t().contiguous().t(), x.repeat_interleave(2, 1)[:, ::2], x.view(1, 37, 700)):
        assert_same_bits(zipserv.linear(same, z, bias.repeat_interleave(2)[::2]).view(37, 1000), every)
    assert_same_bits(zipserv.linear(x[:1].expand(4, 700), z, bias), every[:1].expand(4, 1000))
    assert_same_bits(zipserv.linear(x[5], z, bias), every[5])
    assert zipserv.linear(x[:0], z, bias).shape == (0, 1000)


def test_auto_is_fused_for_few_tokens_and_exact_for_many() -> None:
    weight, z = compressed(640, 1088)
    x = weights(64, 1088, sigma=1)
    few = cpu.FEW_TOKENS
    assert few == _zipserv.linear_few()
    many = zipserv.linear(x, z)
    assert_same_bits(many, F.linear(x, weight))
    zipserv.set_cpu_linear("fused")
    fused = zipserv.linear(x, z)
    assert not torch.equal(fused, many), "both ways are the same: nothing is tested here"
    zipserv.set_cpu_linear("auto")
    if few:
        assert_same_bits(zipserv.linear(x[:few], z), fused[:few])
    assert_same_bits(zipserv.linear(x[: few + 1], z), F.linear(x[: few + 1], weight))
    zipserv.set_cpu_linear("exact")
    for tokens in (1, 2, few or 1, 64):
        assert_same_bits(zipserv.linear(x[:tokens], z), F.linear(x[:tokens], weight))


def test_other_ways_to_the_op_are_fused_too() -> None:
    """A gradient, a transform and the op itself give what the short cut gives."""
    zipserv.set_cpu_linear("fused")
    _, z = compressed(320, 500)
    x, bias = weights(3, 500, sigma=1), weights(320)
    expected = zipserv.linear(x, z, bias)
    h = z.header
    assert_same_bits(torch.ops.zipserv.linear(x, z.blob, h.m, h.k, h.dtype_code, bias), expected)
    with_grad = x.clone().requires_grad_()
    y = zipserv.linear(with_grad, z, bias)
    assert y.requires_grad
    assert_same_bits(y, expected)
    compiled = torch.compile(lambda t: zipserv.linear(t, z, bias), backend="eager", fullgraph=True)
    assert_same_bits(compiled(x), expected)
    with torch.no_grad():
        part = linear_rows(x, z.blob, h.m, h.k, h.dtype, 64, 200, bias[64:200])
    assert_same_bits(part, expected[:, 64:200])


@pytest.mark.parametrize("kind", ["random", "constant", "wide", "zeros"])
def test_weights_of_every_kind(kind: str) -> None:
    """Dense tiles, long escape lists, raw blobs; infinities and NaN where F.linear has them."""
    weight = {
        "random": torch.randint(-(2**15), 2**15, (192, 320), dtype=torch.int16).view(torch.bfloat16),
        "constant": torch.full((192, 320), -0.75, dtype=torch.bfloat16),
        "wide": (torch.randn(192, 320) * torch.exp(4 * torch.randn(192, 320))).bfloat16(),
        "zeros": torch.zeros(192, 320, dtype=torch.bfloat16),
    }[kind]
    mixed = weights(256, 320)  # tiled, whatever its first rows are
    mixed[:32] = weight[:32]
    for matrix in (weight, mixed):
        z = zipserv.compress(matrix)
        for mode in ("auto", "fused"):
            zipserv.set_cpu_linear(mode)
            x = weights(2, 320)
            y, expected, exact = zipserv.linear(x, z), F.linear(x, matrix), linear64(x, matrix)
            huge = linear64(x.abs(), matrix.abs()) > 1e37  # sums may or may not overflow on the way
            assert torch.equal(y.isnan() & ~huge, expected.isnan() & ~huge)
            finite = exact.isfinite() & ~huge
            assert bool(((y.double() - exact).abs() <= 2**-8 * exact.abs() + 4e-6 * linear64(x.abs(), matrix.abs()))[finite].all())


def test_no_memory_for_the_weight() -> None:
    _, z = compressed(2048, 512)
    x = weights(2, 512)
    with torch.profiler.profile(profile_memory=True) as profile:
        zipserv.linear(x, z)
    assert max(e.cpu_memory_usage for e in profile.events() or ()) <= 2 * 2048 * 2 + 4096


def test_many_callers_at_once() -> None:
    zipserv.set_cpu_linear("fused")
    _, z = compressed(512, 512)
    xs = [weights(1 + i % 5, 512, sigma=1) for i in range(24)]
    expected = [zipserv.linear(x, z) for x in xs]
    with ThreadPoolExecutor(8) as pool:
        for found, wanted in zip(pool.map(lambda x: zipserv.linear(x, z), xs), expected, strict=True):
            assert_same_bits(found, wanted)


def test_damaged_blobs_are_errors() -> None:
    _, z = compressed(128, 192)
    x = weights(1, 192)
    blob = flipped(z.blob, 128 + 7, 3)  # flags of the first tile
    with pytest.raises(zipserv.Error, match="tile 0"):
        torch.ops.zipserv.linear(x, blob, 128, 192, 1, None)
    with pytest.raises(ValueError, match="128 x 192"):
        torch.ops.zipserv.linear(x, z.blob, 192, 192, 1, None)
    with pytest.raises(ValueError, match="128 x 192 weights, not 192 x 192"):
        y = torch.empty(1, 192, dtype=torch.bfloat16)
        _zipserv.linear(z.blob.data_ptr(), z.blob.numel(), 192, 192, 0, 192, x.data_ptr(), 192, 1, 0, y.data_ptr(), 192, 1)


def test_fp16_is_always_exact() -> None:
    weight, z = compressed(128, 192, dtype=torch.float16)
    x = weights(1, 192, dtype=torch.float16, sigma=1)
    for mode in ("auto", "fused", "exact"):
        zipserv.set_cpu_linear(mode)
        assert torch.equal(bits(zipserv.linear(x, z)), bits(F.linear(x, weight)))


def test_the_switch() -> None:
    assert zipserv.cpu_linear() == "auto"
    zipserv.set_cpu_linear("exact")
    assert zipserv.cpu_linear() == "exact"
    with pytest.raises(ValueError, match="'fast' is no way.*'auto', 'exact' and 'fused'"):
        zipserv.set_cpu_linear("fast")

    def start(value: str) -> subprocess.CompletedProcess[str]:
        code = "import zipserv; print(zipserv.cpu_linear())"
        return subprocess.run([sys.executable, "-c", code], env={**os.environ, "ZIPSERV_CPU_LINEAR": value}, capture_output=True, text=True)

    assert start("fused").stdout == "fused\n"
    wrong = start("fast")
    assert wrong.returncode == 1 and "ValueError: environment variable ZIPSERV_CPU_LINEAR: 'fast'" in wrong.stderr


def test_a_model_writes_the_same_text() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=640, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=500
    )
    plain = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    with torch.no_grad():
        plain.lm_head.weight.mul_(20)  # logits far enough apart for the choice not to hang on a rounding
    ids = torch.randint(3, 500, (1, 5))
    arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected, logits = plain.generate(ids, **arguments), plain(ids).logits
    zipserv.compress_model(plain)
    found = plain(ids).logits
    assert not torch.equal(found, logits), "the fused products were not used"
    assert float(((found - logits).norm() / logits.norm()).detach()) < 0.02
    assert torch.equal(plain.generate(ids, **arguments), expected)
