# SPDX-License-Identifier: Apache-2.0
"""Lookups on the device: the bits of the decompressed table, one kernel a call, streams, graphs, torch.compile, wrong numbers."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from gpu_cases import KINDS, SHAPES, escapes, gaussian, islands, on_gpu, same_bits, trained
from torch import nn

import zipserv
from zipserv.embedding import ZipEmbedding


def lookup(ids: torch.Tensor, z: zipserv.ZipTensor) -> torch.Tensor:
    code = 1 if z.dtype == torch.bfloat16 else 2
    rows: torch.Tensor = torch.ops.zipserv.embedding(ids, z.blob, z.m, z.k, code)
    return rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_bit_exact(kind: str, shape: tuple[int, int]) -> None:
    """Against the decompressed table, and against the weights: every row once, and some again."""
    w = KINDS[kind](*shape)
    z = on_gpu(w)
    table = z.decompress()
    for ids in (torch.randperm(shape[0]), torch.randint(shape[0], (3, 50)), torch.randint(shape[0], (1,)), torch.tensor(shape[0] - 1)):
        for on_device in (ids.cuda(), ids.cuda().int()):
            rows = lookup(on_device, z)
            assert rows.dtype == w.dtype and same_bits(rows, F.embedding(on_device, table)) and same_bits(rows, w[ids])


def test_every_pattern_of_16_bits() -> None:
    w = gaussian(2048, 2048)
    flat = w.view(-1)
    flat[torch.randperm(flat.numel())[: 1 << 16]] = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    z = on_gpu(w)
    assert not z.is_raw
    assert same_bits(lookup(torch.arange(2048, device="cuda"), z), w)


@pytest.mark.parametrize("shape", [(256, 192), (250, 316)])
def test_fp16(shape: tuple[int, int]) -> None:
    w = (torch.randn(*shape) * 0.02).half()
    w[:64, :64] = torch.randint(-(2**15), 2**15, (64, 64), dtype=torch.int16).view(torch.float16)
    z = on_gpu(w)
    assert not z.is_raw
    ids = torch.randint(shape[0], (300,))
    assert same_bits(lookup(ids.cuda(), z), w[ids])


def test_a_large_table() -> None:
    """Offsets beyond 32 bits, and more rows than any decode step asks for."""
    w = trained(128256, 4096)
    z = on_gpu(w)
    ids = torch.randint(128256, (8192,))
    ids[:2] = torch.tensor([0, 128255])
    assert same_bits(lookup(ids.cuda(), z), w[ids])


def test_an_unaligned_blob_and_numbers_that_lie_apart() -> None:
    w = escapes(300, 200)
    z = on_gpu(w)
    memory = torch.empty(z.nbytes + 3, dtype=torch.uint8, device="cuda")
    memory[3:] = z.blob
    ids = torch.randint(300, (7, 6), device="cuda")[:, ::2]
    assert same_bits(torch.ops.zipserv.embedding(ids, memory[3:], 300, 200, 1), w[ids.cpu()])
    assert lookup(ids[:0], z).shape == (0, 3, 200)


@pytest.mark.parametrize("n", [1, 32, 8192])
def test_one_call_is_one_kernel(n: int) -> None:
    layer = ZipEmbedding.from_ziptensor(on_gpu(gaussian(4096, 1536)))
    ids = torch.randint(4096, (n,), device="cuda")
    layer(ids)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        layer(ids)
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert kernels == ["zs_gather"], kernels
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before + 1, "the output is all that it allocates"


def test_work_goes_to_the_current_stream() -> None:
    w = trained(2048, 1024)
    z = on_gpu(w)
    ids = torch.arange(64, device="cuda")
    lookup(ids.add_(0), z)  # a first call compiles or loads a kernel, which may take longer than the sleep
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        ids.add_(100)
        rows = lookup(ids, z)
        done = torch.cuda.Event()
        done.record()
        assert not done.query(), "the call waited for the device, or its work did not queue behind the sleep"
    stream.synchronize()
    assert same_bits(rows, w[100:164])


def test_it_waits_for_numbers_and_table() -> None:
    """It is launched early, also at a table's first use; what the kernel ahead writes must be there all the same."""
    w = islands(512, 8192)
    source = on_gpu(w).blob
    ids = torch.zeros(256, dtype=torch.long, device="cuda")
    for i in range(50):
        blob = torch.zeros_like(source)
        blob.copy_(source)
        ids.copy_((torch.arange(256, device="cuda") * (2 * i + 1)) % 512)
        rows = torch.ops.zipserv.embedding(ids, blob, 512, 8192, 1)
        after = rows.clone()
        assert same_bits(after, w[ids.cpu()])


@pytest.mark.parametrize("first", [True, False])
def test_cuda_graph(first: bool) -> None:
    w = escapes(1000, 777)
    layer = ZipEmbedding.from_ziptensor(on_gpu(w))
    ids = torch.randint(1000, (33,), device="cuda")
    if not first:
        layer(ids)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = layer(ids)
    for _ in range(3):
        ids.copy_(torch.randint(1000, (33,), device="cuda"))
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(rows, w[ids.cpu()])


def test_a_product_follows_early() -> None:
    """Lookup and product in one stream, both started early: the product reads rows only when they are there."""
    w = trained(1024, 1024)
    z, table = on_gpu(w), w.cuda()
    ids = torch.randint(1024, (16,), device="cuda")
    want = zipserv.linear(table[ids], z)
    for _ in range(200):
        assert same_bits(zipserv.linear(lookup(ids, z), z), want)


def test_torch_compile() -> None:
    w = gaussian(1000, 256)
    layer = ZipEmbedding.from_ziptensor(on_gpu(w))
    compiled = torch.compile(layer, fullgraph=True)
    for n in (1, 5, 40):
        ids = torch.randint(1000, (2, n), device="cuda")
        assert same_bits(compiled(ids), w[ids.cpu()])


def test_it_is_an_embedding() -> None:
    plain = nn.Embedding(1000, 256, padding_idx=3, device="cuda", dtype=torch.bfloat16)
    layer = ZipEmbedding.from_embedding(plain)
    ids = torch.randint(1000, (4, 9), device="cuda")
    assert same_bits(layer(ids), plain(ids))
    torch.library.opcheck(torch.ops.zipserv.embedding.default, (ids, layer.weight_zipserv, 1000, 256, 1))
    with pytest.raises(ValueError, match="the row numbers are on cpu"):
        torch.ops.zipserv.embedding(ids.cpu(), layer.weight_zipserv, 1000, 256, 1)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_table_on_another_device() -> None:
    w = trained(300, 200)
    z = zipserv.compress(w).to("cuda:1")
    ids = torch.randint(300, (20,), device="cuda:1")
    assert torch.cuda.current_device() == 0
    rows = lookup(ids, z)
    assert rows.device == ids.device and same_bits(rows, w[ids.cpu()])


WRONG = """
import torch, zipserv
table = zipserv.compress((torch.randn(256, 192) * 0.02).bfloat16()).cuda()
layer = zipserv.ZipEmbedding.from_ziptensor(table)
ids = torch.tensor([3, {wrong}, 5], device="cuda")
try:
    layer(ids)
    torch.cuda.synchronize()
except Exception as error:
    print("ERROR", type(error).__name__, error)
"""


@pytest.mark.parametrize("wrong", [-1, 256, 1 << 40])
def test_a_number_that_is_no_row_is_an_assertion_as_of_nn_embedding(wrong: int) -> None:
    done = subprocess.run([sys.executable, "-c", WRONG.format(wrong=wrong)], capture_output=True, text=True, timeout=300)
    assert "ERROR" in done.stdout and "device-side assert" in done.stdout, done.stdout + done.stderr
    assert "an index is not a row of the table" in done.stdout + done.stderr
