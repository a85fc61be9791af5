# SPDX-License-Identifier: Apache-2.0
"""Streams, CUDA graphs, several devices, torch.compile, autograd: where the work goes and what it may not disturb."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import assert_like_cublas, gaussian, on_gpu, same_bits, trained

import zipserv
import zipserv.cuda


def test_work_goes_to_the_current_stream() -> None:
    z = on_gpu(trained(2048, 2048))
    x = torch.ones(4, 2048, device="cuda").bfloat16()
    zipserv.linear(x, z)  # a first call compiles, which may take longer than the sleep
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        y = zipserv.linear(x, z)
        done = torch.cuda.Event()
        done.record()
        assert not done.query(), "the call waited for the device, or its work did not queue behind the sleep"
    stream.synchronize()
    torch.cuda.synchronize()
    assert same_bits(y, zipserv.linear(torch.ones(4, 2048, device="cuda").bfloat16(), z))


def test_streams_do_not_share_partial_sums() -> None:
    """Launches that overlap on many streams each give the result they give alone."""
    zs = [on_gpu(trained(512, 4096)) for _ in range(4)]
    x = torch.randn(64, 4096, device="cuda").bfloat16()
    want = [zipserv.linear(x, z) for z in zs]
    streams = [torch.cuda.Stream() for _ in zs]
    torch.cuda.synchronize()
    for _ in range(30):
        got = []
        for s, z in zip(streams, zs, strict=True):
            with torch.cuda.stream(s):
                got.append(zipserv.linear(x, z))
        torch.cuda.synchronize()
        for a, b in zip(got, want, strict=True):
            assert same_bits(a, b)


@pytest.mark.parametrize("n", [1, 17, 64, 300])
@pytest.mark.parametrize("warm", [True, False])
def test_cuda_graph(n: int, warm: bool) -> None:
    """Captures with and without a first call outside; replays with new inputs."""
    m, k = (768, 1024) if warm else (768 + 64 * n, 1024)
    w = trained(m, k)
    z = on_gpu(w)
    x = torch.randn(n, k, device="cuda").bfloat16()
    if warm:
        zipserv.linear(x, z)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = zipserv.linear(x, z)
        y = zipserv.linear(x, z) + 0 * y
    for _ in range(3):
        x.copy_(torch.randn(n, k, device="cuda").bfloat16())
        graph.replay()
        torch.cuda.synchronize()
        assert_like_cublas(y, x, w.cuda(), None)


def test_graphs_replay_beside_eager_work_and_each_other() -> None:
    """Each graph has partial sums of its own, so replays on several streams and eager calls may overlap."""
    z = on_gpu(trained(512, 8192))
    x = torch.randn(48, 8192, device="cuda").bfloat16()
    want = zipserv.linear(x, z)
    graphs, outs = [], []
    for _ in range(3):
        g = torch.cuda.CUDAGraph()
        with torch.cuda.graph(g):
            outs.append(zipserv.linear(x, z))
        graphs.append(g)
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(30):
        torch.cuda.synchronize()
        for s, g in zip(streams, graphs, strict=True):
            with torch.cuda.stream(s):
                g.replay()
        eager = zipserv.linear(x, z)
        torch.cuda.synchronize()
        for y in [*outs, eager]:
            assert same_bits(y, want)


def test_graphs_give_their_workspace_back() -> None:
    z = on_gpu(trained(512, 4096))
    x = torch.randn(8, 4096, device="cuda").bfloat16()
    zipserv.linear(x, z)

    def capture() -> None:
        g = torch.cuda.CUDAGraph()
        with torch.cuda.graph(g):
            zipserv.linear(x, z)
        g.replay()
        torch.cuda.synchronize()
        g.reset()

    for _ in range(3):
        capture()
    before = torch.cuda.mem_get_info()[0]
    for _ in range(40):
        capture()
    assert before - torch.cuda.mem_get_info()[0] < 32 << 20


def test_a_chain_of_products_in_one_stream() -> None:
    """Each product starts early, while the one that makes its activations still runs: it must not read them before they are there."""
    torch.manual_seed(3)
    zs = [on_gpu((torch.randn(2048, 2048) * 2048**-0.5).bfloat16()) for _ in range(6)]
    x = torch.randn(4, 2048, device="cuda").bfloat16()

    def chain(slow: bool) -> torch.Tensor:
        y = x
        for z in zs:
            y = zipserv.linear(y, z)
            if slow:
                torch.cuda.synchronize()
        return y

    want = chain(slow=True)
    for _ in range(100):
        assert same_bits(chain(slow=False), want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(slow=False)
    for _ in range(50):
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(y, want)


def test_a_blob_that_was_just_made() -> None:
    """The first product with a blob waits for the kernels that write it, also at an address that another blob had before."""
    x = torch.eye(64, 1024, device="cuda").bfloat16()
    for i in range(30):
        w = (torch.randn(1024, 1024, device="cuda") * 0.02 * (i + 1)).bfloat16()
        y = zipserv.linear(x, zipserv.compress(w))
        assert torch.equal(y, w.T[:64] + 0.0)


def test_a_blob_that_was_overwritten() -> None:
    w = [gaussian(1024, 1024) for _ in range(2)]
    blobs = [zipserv.compress(v.cuda()).blob for v in w]
    room = torch.empty(max(b.numel() for b in blobs), dtype=torch.uint8, device="cuda")
    x = torch.eye(64, 1024, device="cuda").bfloat16()
    for i in range(30):
        blob = room[: blobs[i % 2].numel()]
        blob.copy_(blobs[i % 2])
        zipserv.cuda.changed(blob)
        assert torch.equal(torch.ops.zipserv.linear(x, blob, 1024, 1024, 1, None), w[i % 2].T[:64].cuda() + 0.0)


def test_decompress_in_a_graph() -> None:
    w = trained(300, 520)
    z = on_gpu(w)
    out = torch.zeros(300, 520, dtype=torch.bfloat16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.zipserv.decompress_out(z.blob, 300, 520, 1, 0, out)
    out.zero_()
    graph.replay()
    assert same_bits(out, w)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_torch_compile(mode: str) -> None:
    layer = zipserv.ZipLinear.from_linear(torch.nn.Linear(512, 384).bfloat16()).cuda()

    def forward(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(layer(x)) + 1

    compiled = torch.compile(forward, fullgraph=True, mode=mode)
    with torch.no_grad():
        for n in (1, 1, 1, 16, 16, 16):
            x = torch.randn(n, 512, device="cuda").bfloat16()
            torch.testing.assert_close(compiled(x).clone(), forward(x), rtol=2e-2, atol=2e-2)


def test_gradient_of_x() -> None:
    w = trained(320, 256)
    z = on_gpu(w)
    x = torch.randn(6, 256, device="cuda").bfloat16().requires_grad_()
    zipserv.linear(x, z).float().pow(2).sum().backward()
    y = x.detach().float() @ w.cuda().float().T
    want = 2 * y.bfloat16().float() @ w.cuda().float()
    torch.testing.assert_close(x.grad.float(), want, rtol=3e-2, atol=3e-2 * want.abs().max().item())


def test_opcheck() -> None:
    z = on_gpu(gaussian(128, 192))
    x = torch.randn(3, 192, device="cuda").bfloat16().requires_grad_()
    bias = torch.randn(128, device="cuda").bfloat16()
    torch.library.opcheck(torch.ops.zipserv.linear.default, (x, z.blob, 128, 192, 1, bias))
    torch.library.opcheck(torch.ops.zipserv.decompress.default, (z.blob, 128, 192, 1))
    torch.library.opcheck(torch.ops.zipserv.compress.default, (gaussian(128, 192).cuda(),))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_weight_counts() -> None:
    w = trained(512, 512)
    z = zipserv.compress(w).to("cuda:1")
    x = torch.randn(5, 512, device="cuda:1").bfloat16()
    with torch.cuda.device(0):
        y = zipserv.linear(x, z)
        assert y.device == torch.device("cuda:1")
        assert_like_cublas(y, x, w.to("cuda:1"), None)
        with pytest.raises(ValueError):
            zipserv.linear(x.to("cuda:0"), z)
