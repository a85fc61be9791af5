# SPDX-License-Identifier: Apache-2.0
"""The torch.library ops: opcheck, fake kernels, torch.compile, checks of direct calls."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import zipserv
from helpers import DTYPES, assert_same_bits, bits, compressed, flipped, weights
from zipserv.format import DTYPE_CODES

ops = torch.ops.zipserv


def _check(op: Any, *args: Any) -> None:
    torch.library.opcheck(op, args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    weight, z = compressed(128, 192, dtype=dtype)
    shape = (z.blob, 128, 192, DTYPE_CODES[dtype])
    x, bias = weights(3, 192, dtype=dtype), weights(128, dtype=dtype)
    _check(ops.linear.default, x, *shape, None)
    _check(ops.linear.default, x.clone().requires_grad_(), *shape, bias.clone().requires_grad_())
    _check(ops.linear.default, weights(192, 3, dtype=dtype).t(), *shape, bias)
    _check(ops.linear_grad_x.default, weights(3, 128, dtype=dtype).requires_grad_(), *shape)
    _check(ops.decompress.default, *shape)
    _check(ops.decompress_rows.default, *shape, 5, 77)
    _check(ops.decompress_out.default, *shape, 5, torch.zeros(64, 192, dtype=dtype))
    _check(ops.compress.default, weight)
    ids = torch.tensor([[0, 127, 64], [5, 5, 7]])
    _check(ops.embedding.default, ids, *shape)
    _check(ops.embedding.default, ids.int()[:, ::2], *shape)


def test_fake_kernels_give_shapes_without_reading() -> None:
    with FakeTensorMode():
        x = torch.empty(2, 3, 192, dtype=torch.bfloat16)
        blob = torch.empty(17, dtype=torch.uint8)
        assert ops.linear(x, blob, 128, 192, 1, None).shape == (2, 3, 128)
        assert ops.linear_grad_x(torch.empty(2, 128, dtype=torch.bfloat16), blob, 128, 192, 1).shape == (2, 192)
        assert ops.decompress(blob, 128, 192, 2).dtype == torch.float16
        assert ops.decompress_rows(blob, 128, 192, 1, 3, 10).shape == (7, 192)
        assert ops.embedding(torch.empty(2, 3, dtype=torch.long), blob, 128, 192, 2).shape == (2, 3, 192)


def test_a_direct_call_with_a_wrong_blob_is_refused() -> None:
    weight, z = compressed(190, 250)
    x = weights(1, 250)
    for m, k, code in [(191, 250, 1), (190, 249, 1), (250, 190, 1), (190, 250, 2)]:
        x = weights(1, k, dtype=torch.float16 if code == 2 else torch.bfloat16)
        with pytest.raises(ValueError, match="the blob holds 190 x 250"):
            ops.linear(x, z.blob, m, k, code, None)
        with pytest.raises(ValueError, match="the blob holds"):
            ops.decompress(z.blob, m, k, code)
    with pytest.raises(ValueError, match="no compressed weight"):
        ops.linear(x, z.blob[:5], 190, 250, 1, None)
    with pytest.raises(TypeError, match="uint8"):
        ops.decompress(weight, 190, 250, 1)
    for at in (0, 20, 60, 128 + 3):
        with pytest.raises(zipserv.Error):
            ops.decompress(flipped(z.blob, at), 190, 250, 1)
    with pytest.raises(zipserv.Error):
        ops.decompress(z.blob[:-16].contiguous(), 190, 250, 1)
    with pytest.raises(ValueError, match="rows"):
        ops.decompress_rows(z.blob, 190, 250, 1, 100, 191)
    with pytest.raises(ValueError, match="rows"):
        ops.decompress_out(z.blob, 190, 250, 1, 180, torch.empty(11, 250, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"\(rows, 250\)"):
        ops.decompress_out(z.blob, 190, 250, 1, 0, torch.empty(11, 251, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="contiguous"):
        ops.decompress_out(z.blob, 190, 250, 1, 0, torch.empty(250, 11, dtype=torch.bfloat16).t())
    with pytest.raises(TypeError, match="float32"):
        ops.decompress_out(z.blob, 190, 250, 1, 0, torch.empty(11, 250))


def test_a_direct_call_with_a_wrong_input_is_refused() -> None:
    _, z = compressed(190, 250)
    with pytest.raises(ValueError, match="should be 250"):
        ops.linear(weights(2, 500), z.blob, 190, 250, 1, None)
    with pytest.raises(TypeError, match="float32"):
        ops.linear(torch.zeros(2, 250), z.blob, 190, 250, 1, None)
    with pytest.raises(ValueError, match=r"should be \(190,\)"):
        ops.linear(weights(2, 250), z.blob, 190, 250, 1, weights(19))
    with pytest.raises(ValueError, match="should be 190"):
        ops.linear_grad_x(weights(2, 250), z.blob, 190, 250, 1)


def test_compile_fullgraph_forward_and_backward() -> None:
    weight, z = compressed(190, 250)
    bias = weights(190)

    def run(x: torch.Tensor) -> torch.Tensor:
        return F.relu(zipserv.linear(x * 2, z, bias)) + 1

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for n in (1, 4):
        x = weights(n, 250, sigma=1)
        assert torch.equal(bits(compiled(x)), bits(run(x)))
    a, b = (weights(3, 250, sigma=1).requires_grad_() for _ in range(2))
    b.data.copy_(a.data)
    run(a).sum().backward()
    compiled(b).sum().backward()
    assert a.grad is not None and b.grad is not None
    assert torch.allclose(a.grad.float(), b.grad.float(), rtol=1e-2, atol=1e-3)


def test_compile_of_decompress_and_compress() -> None:
    weight, z = compressed(190, 250)

    def there_and_back(w: torch.Tensor) -> torch.Tensor:
        blob = ops.compress(w)
        return ops.decompress(blob, 190, 250, 1)

    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(weight), weight)

    def fill(out: torch.Tensor) -> torch.Tensor:
        ops.decompress_out(z.blob, 190, 250, 1, 0, out)
        return out + 0

    out = torch.zeros_like(weight)
    torch.compile(fill, fullgraph=True, backend="aot_eager")(out)
    assert_same_bits(out, weight)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a C++ compiler on the CPU")
def test_compile_with_inductor() -> None:
    _, z = compressed(190, 250)
    run = torch.compile(lambda x: zipserv.linear(x.sin(), z).cos(), fullgraph=True)
    x = weights(4, 250, sigma=1)
    assert torch.allclose(run(x).float(), zipserv.linear(x.sin(), z).cos().float(), rtol=2e-2, atol=2e-2)


def test_export() -> None:
    layer = zipserv.ZipLinear.from_ziptensor(compressed(190, 250)[1], weights(190))
    x = weights(4, 250)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2, max=64)},))
    y = weights(9, 250)
    assert torch.equal(program.module()(y), layer(y))
