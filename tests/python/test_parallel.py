# SPDX-License-Identifier: Apache-2.0
"""Compressed layers among threads, processes and sharded modules."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import zipserv
from helpers import assert_same_bits, bits, compressed, weights


def test_many_threads_at_once() -> None:
    weight, z = compressed(320, 500)
    xs = [weights(3, 500, sigma=1) for _ in range(16)]
    expected = [zipserv.linear(x, z) for x in xs]

    def work(i: int) -> bool:
        other = zipserv.compress(weight)
        return torch.equal(other.blob, z.blob) and torch.equal(bits(zipserv.linear(xs[i], other)), bits(expected[i]))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(16)))


def _in_spawned(z: zipserv.ZipTensor, queue: multiprocessing.Queue[bool]) -> None:
    queue.put(torch.equal(bits(zipserv.compress(z.decompress()).blob.view(torch.bfloat16)), bits(z.blob.view(torch.bfloat16))))


@pytest.mark.slow
def test_a_spawned_process_gets_a_compressed_tensor() -> None:
    _, z = compressed(128, 192)
    context = multiprocessing.get_context("spawn")
    queue: multiprocessing.Queue[bool] = context.Queue()
    process = context.Process(target=_in_spawned, args=(z, queue))
    process.start()
    assert queue.get(timeout=120)
    process.join(30)


def test_a_forked_child_is_told_to_spawn() -> None:
    _, z = compressed(128, 192)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            z.decompress()
            text = "no error"
        except zipserv.Error as error:
            text = str(error)
        except BaseException as error:
            text = f"another error: {error!r}"
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    assert "spawn" in text


SHARDED = """
import os, socket
import torch, zipserv
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", WORLD_SIZE="1")
dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.ReLU(), torch.nn.Linear(128, 128)).bfloat16()
zipserv.compress_model(model)
x = torch.randn(2, 128).bfloat16().requires_grad_()
expected = model(x)
fully_shard(model[0])
fully_shard(model)
found = model(x)
found.sum().backward()
assert torch.equal(found, expected) and x.grad is not None
# Parameters (the biases) are sharded; compressed bytes are buffers and stay whole on each rank.
assert all(type(p).__name__ == "DTensor" for p in model.parameters())
assert all(type(b) is torch.Tensor for b in model.buffers())
dist.destroy_process_group()
print("sharded")
"""


@pytest.mark.slow
def test_fully_sharded_modules() -> None:
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", SHARDED], capture_output=True, text=True, timeout=300)
    assert "sharded" in run.stdout, run.stderr


def test_shared_memory() -> None:
    weight, z = compressed(128, 192)
    layer = zipserv.ZipLinear.from_ziptensor(z)
    layer.share_memory()
    assert layer.weight_zipserv.is_shared()
    assert_same_bits(layer.to_linear().weight, weight)
