# SPDX-License-Identifier: Apache-2.0
"""The whole way of a CUDA call, from tensors to the driver, over a driver that only pretends (core/cuda/driver/testdata/fakecuda.c).

NVRTC compiles the real kernels; nothing runs them. Each test is a process of its own: a process opens one driver.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Without torch, which takes seconds to import.
NATIVE = """
import ctypes, os, zipserv
from zipserv import _zipserv
_zipserv.cuda_set_dirs(os.environ["TEST_NVRTC_DIRS"])
fake = ctypes.CDLL(os.environ["ZIPSERV_LIBCUDA"])
fake.fake_log.restype = ctypes.c_char_p
def log(): return fake.fake_log().decode().splitlines()
def launches(): return [line for line in log() if line.startswith("launch")]
def raises(kind, words, call, *args):
    try: call(*args)
    except kind as error: assert all(w in str(error) for w in words), str(error)
    else: raise AssertionError(f"no {kind}")
"""

TENSORS = NATIVE + """
import torch, zipserv.cuda as cuda
class OnDevice(torch.Tensor):  # host memory that says it is on device 0, where the driver that pretends keeps its memory too
    def get_device(self): return 0
def on_device(t): return t.as_subclass(OnDevice)
cuda._stream = lambda index: 0x77
"""
# Within `watched`, what torch.empty was asked for is in `asked`.
ALLOCATIONS = TENSORS + """
import unittest.mock
asked = []
real = torch.empty
def empty(*shape, **options):
    asked.append(shape[0])
    return on_device(real(*shape, dtype=options["dtype"]))
watched = unittest.mock.patch.object(torch, "empty", empty)
"""


@pytest.fixture(scope="session")
def kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def run(fake_driver: Path, kernel_cache: Path):
    from zipserv.cuda import _compiler_dirs

    here = {"ZIPSERV_LIBCUDA": str(fake_driver), "ZIPSERV_CACHE_DIR": str(kernel_cache), "TEST_NVRTC_DIRS": os.pathsep.join(_compiler_dirs())}

    def run(code: str, prelude: str = NATIVE, **env: str) -> str:
        full = {**os.environ, **here, **env}
        done = subprocess.run([sys.executable, "-c", prelude + code], env=full, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_products(run) -> None:
    run("""
blob = on_device(zipserv.compress((torch.randn(256, 192) * 0.02).bfloat16()).blob)
x = on_device(torch.randn(2, 3, 192).bfloat16())
bias = on_device(torch.randn(256).bfloat16())
y = cuda.linear(x, blob, 256, 192, 1, bias)
assert y.shape == (2, 3, 256) and len(launches()) == 1, log()
words = launches()[0].split()
assert words[2] == "zs_zipgemm_wgmma" and "stream 77" in launches()[0]
assert words[-4:] == [f"{v:x}" for v in (blob.data_ptr(), x.data_ptr(), 192, bias.data_ptr())], words
cuda.linear(x[0, :, :].T.contiguous().T, blob, 256, 192, 1)   # columns lie apart: a copy
wide = on_device(torch.randn(5, 400).bfloat16())
cuda.linear(wide[:, 8:200], blob, 256, 192, 1)                # rows lie apart: no copy
assert launches()[2].split()[-3:-1] == [f"{wide.data_ptr() + 16:x}", f"{400:x}"], launches()
moved = torch.empty(blob.numel() + 1, dtype=torch.uint8)[1:].copy_(blob)
cuda.linear(x, on_device(moved), 256, 192, 1)                 # a blob at an odd address: a copy of it
assert int(launches()[3].split()[-4], 16) % 16 == 0
assert sum(line.startswith("alloc") for line in log()) == 1, log()
raises(TypeError, ["x is torch.float32", "the weight is torch.bfloat16"], cuda.linear, on_device(x.float()), blob, 256, 192, 1)
raises(ValueError, ["x has the shape", "(..., 192)"], cuda.linear, x[..., :100], blob, 256, 192, 1)
raises(ValueError, ["bias has the shape", "(256,)"], cuda.linear, x, blob, 256, 192, 1, bias[:255])
raises(TypeError, ["bias is torch.float32"], cuda.linear, x, blob, 256, 192, 1, on_device(bias.float()))
fake.fake_fail(b"cuLaunchKernelEx", 700, 0)
raises(zipserv.Error, ["cuLaunchKernelEx", "700"], cuda.linear, x, blob, 256, 192, 1)
""", TENSORS)


def test_many_tokens_and_batch_invariance(run) -> None:
    run("""
job = (0, 0x77, 0x1000, 256, 192, 0x2000, 5000, 192, 0, 0x3000, 256, 0, 0)
EXPAND = 1
assert _zipserv.cuda_linear(*job) == EXPAND and not launches()
zipserv.set_batch_invariant(True)
assert _zipserv.cuda_linear(*job) == 0 and len(launches()) == 40, len(launches())
zipserv.set_batch_invariant(False)
assert _zipserv.cuda_linear(*job) == EXPAND
""")
    run("assert _zipserv.cuda_linear(0, 0, 0x1000, 256, 192, 0x2000, 5000, 192, 0, 0x3000, 256, 0, 0) == 0", VLLM_BATCH_INVARIANT="1")


def test_scratch_memory_is_torch_s_for_the_time_of_a_product(run) -> None:
    """Beside what the engine asks for nothing is allocated, and the product is queued with it."""
    run("""
m, k = 4096, 4096
blob, x = on_device(torch.zeros(128 + 1024, dtype=torch.uint8)), on_device(torch.zeros(8192, k).bfloat16())
with watched:
    y = cuda.linear(x, blob, m, k, 1)
assert y.shape == (8192, m) and asked == [2 * m * k], asked
assert len(launches()) == 1 and "zs_zipgemm_relay" in launches()[0], launches()
""", ALLOCATIONS)


def test_some_rows_of_many_tokens(run) -> None:
    """Scratch memory and result are of these rows; what no kernel takes by rows is decompressed by rows."""
    run("""
m, k = 6144, 4096
blob, x = on_device(torch.zeros(128 + 1024, dtype=torch.uint8)), on_device(torch.zeros(8192, k).bfloat16())
with watched:
    y = cuda.linear(x, blob, m, k, 1, None, (1024, 5120))
    assert y.shape == (8192, 4096) and asked == [2 * 4096 * k], asked
    args = launches()[0].split(" args ")[1].split()
    assert "zs_zipgemm_relay" in launches()[0] and int(args[0], 16) == blob.data_ptr() + 128 + 8 * 64 * 16, launches()
    del asked[:]
    few = cuda.linear(x[:100], blob, m, k, 1, None, (1024, 5120))
    assert few.shape == (100, 4096) and asked == [(4096, k)], asked
assert "zs_decompress" in launches()[1], launches()
raises(ValueError, ["bias has the shape", "(4096,)"], cuda.linear, x, blob, m, k, 1, on_device(torch.zeros(m).bfloat16()), (1024, 5120))
raises(ValueError, ["multiple of 64"], cuda.linear, x, blob, m, k, 1, None, (1000, 5000))
raises(ValueError, ["rows"], cuda.linear, x, blob, m, k, 1, None, (6080, 6200))
from zipserv import rows
before = len(launches())
assert rows._linear_rows_cuda(x, blob, m, k, 1, 64, 64, None).shape == (8192, 0) and len(launches()) == before
raises(ValueError, ["rows"], rows._linear_rows_cuda, x, blob, m, k, 1, 6080, 6200, None)
""", ALLOCATIONS)


def test_results_of_several_layers(run) -> None:
    """One launch where a kernel writes them apart; nothing elsewhere, nor where something needs torch's dispatcher."""
    run("""
m, k = 6144, 4096
blob, x = on_device(torch.zeros(128 + 1024, dtype=torch.uint8)), on_device(torch.zeros(2, 256, k).bfloat16())
bias = on_device(torch.zeros(m).bfloat16())
with watched:
    made = cuda.linear_parts(x, blob, m, k, 1, bias, 3)
assert [(y.shape, y.is_contiguous()) for y in made] == [((2, 256, 2048), True)] * 3 and not asked, asked
assert len(launches()) == 1 and "3 of tensor 512x2048 ld 2048 box 256x64" in log(), log()
assert [y.data_ptr() - made[0].data_ptr() for y in made] == [0, 2 * 512 * 2048, 4 * 512 * 2048]
assert cuda.linear_parts(x[0, :128], blob, m, k, 1, None, 3) is None, "few tokens"
assert cuda.linear_parts(x.half(), blob, m, k, 2, None, 3) is None, "there are kernels for BF16 alone"
assert cuda.eager_parts(x, blob, m, k, 1, None, 3) is None and len(launches()) == 1, "a tensor subclass"
""", ALLOCATIONS)


def test_decompress_and_raw_weights(run) -> None:
    run("""
w = (torch.randn(128, 192) * 0.02).bfloat16()
z = zipserv.compress(w)
out = on_device(torch.zeros(128, 200, dtype=torch.bfloat16))
cuda.decompress(on_device(z.blob), 128, 192, 1, 0, out[:, :192])
assert launches()[0].split()[-4:-1] == [f"{v:x}" for v in (z.blob.data_ptr(), out.data_ptr(), 200)], launches()
noise = torch.randint(-32768, 32768, (64, 64), dtype=torch.int16).view(torch.bfloat16)
raw = zipserv.compress(noise)
assert raw.is_raw
out = on_device(torch.zeros(10, 64, dtype=torch.bfloat16))
cuda.decompress(on_device(raw.blob), 64, 64, 1, 5, out)
assert torch.equal(out.view(torch.int16), noise[5:15].view(torch.int16)) and len(launches()) == 1
raises(ValueError, ["rows 60 .. 70 of a matrix of 64 rows"], cuda.decompress, on_device(raw.blob), 64, 64, 1, 60, out)
""", TENSORS)


COMPRESS = TENSORS + """
real = torch.empty
made = []
def empty(*a, device=None, **k):
    made.append(on_device(real(*a, **k)))
    return made[-1]
torch.empty = empty
def tell(*results):
    # The fake kernels write nothing and send what stands in the scratch memory: a number of list units, and a checksum.
    results = iter(results)
    def telling(call):
        def told(*job):
            ctypes.memmove(job[7], struct.pack("<II", next(results), 0xC0FFEE), 8)
            return call(*job)
        return told
    _zipserv.cuda_compress_plan, _zipserv.cuda_compress_write = telling(plan), telling(write)
import struct
plan, write = _zipserv.cuda_compress_plan, _zipserv.cuda_compress_write
def kernels(): return [line.split()[2].removeprefix("zs_compress") for line in launches()]
w = on_device((torch.randn(64, 8, 24) * 0.02).bfloat16())
fixed = 128 + 128 + 3 * 5632
def check(blob, told, units):
    # The kernel gets a header without size and checksum, and fills them in.
    args = [int(word, 16) for word in launches()[-1].split(" args ")[1].split()]
    given = (ctypes.c_uint64 * 16)(*args[9:])
    header = _zipserv.header(blob.data_ptr() if units is None else ctypes.addressof(given), 128)
    assert (told.m, told.k, told.shape, told.nbytes, told.checksum, told.raw) == (64, 192, (64, 8, 24), blob.numel(), 0xC0FFEE, units is None)
    assert (header["m"], header["k"], header["shape"], header["checksum"]) == (64, 192, (64, 8, 24), 0xC0FFEE if units is None else 0)
    assert blob.numel() == (128 + 2 * 64 * 192 if units is None else fixed + 16 * units)
"""


def test_compress(run) -> None:
    run("""
tell(50, 50)
check(*cuda.compress(w, 64, 192, (64, 8, 24)), 50)
assert kernels() == ["_sample", ""], log()
assert [t.numel() for t in made[1:]] == [fixed + 800]
""", COMPRESS)


def test_a_result_may_be_shorter_than_its_memory(run) -> None:
    run("""
tell(50, 40)
blob, told = cuda.compress(w, 64, 192, (64, 8, 24))
check(blob, told, 40)
assert blob.data_ptr() == made[1].data_ptr() and made[1].numel() == fixed + 800
""", COMPRESS)


def test_a_result_much_shorter_than_its_memory_is_copied(run) -> None:
    run("""
tell(100, 40)
blob, told = cuda.compress(w, 64, 192, (64, 8, 24))
check(blob, told, 40)
assert blob.untyped_storage().nbytes() == blob.numel()
""", COMPRESS)


def test_a_guess_that_is_too_small(run) -> None:
    run("""
tell(50, 51, 51, 51)
check(*cuda.compress(w, 64, 192, (64, 8, 24)), 51)
assert kernels() == ["_sample", "", "_sample", ""], log()
""", COMPRESS)


def test_weights_that_may_not_shrink_are_counted_first(run) -> None:
    run("""
tell(1 << 20, 50, 1 << 20, 50)
check(*cuda.compress(w, 64, 192, (64, 8, 24)), 50)
assert [t.numel() for t in made[1:]] == [0, fixed + 800]
tell(1 << 20, 1 << 20)
blob, told = cuda.compress(w, 64, 192, (64, 8, 24))
check(blob, told, None)
assert torch.equal(blob[128:].view(torch.int16), w.view(-1).view(torch.int16))
assert kernels() == ["_sample", "", "_sample", "", "_sample", ""], log()
""", COMPRESS)


def test_warm_and_report(run) -> None:
    out = run("""
cuda.warm(on_device(torch.zeros(1)), 256, 192, 8)
raises(ValueError, ["multiple of 128"], cuda.warm, on_device(torch.zeros(1)), 192, 192, 8, True)
before = len(log())
_zipserv.cuda_linear(0, 0, 0x1000, 256, 192, 0x2000, 5, 192, 0, 0x3000, 256, 0, 0)
assert [line.split()[0] for line in log()[before:]] == ["tensor", "launch"], log()
facts = cuda.describe()
assert facts["driver"]["cuda"] == "13.0" and len(facts["devices"]) == 2 and facts["cache"]["files"] >= 1
for key, value in cuda.report().items(): print(key, "=", value)
""", TENSORS)
    assert "device 0 = Fake GPU 0, compute capability 9.0, compiles for sm_90a" in out


def test_errors_of_the_machine(run, tmp_path: Path) -> None:
    call = "_zipserv.cuda_linear, 0, 0, 0x1000, 256, 192, 0x2000, 5, 192, 0, 0x3000, 256, 0, 0"
    run(f"raises(zipserv.Error, ['too old', 'CUDA 11.4', '12.0'], {call})", FAKECUDA_VERSION="11040")
    run(f"raises(zipserv.Error, ['compute capability 7.5', '8.0'], {call})", FAKECUDA_CC="75")
    run(f"raises(ValueError, ['no CUDA device 0', 'shows 0'], {call})", FAKECUDA_DEVICES="0")
    run(f"raises(zipserv.Error, ['NVRTC', 'ZIPSERV_NVRTC'], {call})", ZIPSERV_NVRTC=str(tmp_path / "none.so"))
    missing = f"""
import zipserv
from zipserv import _zipserv
try: _zipserv.cuda_linear({call.split(",", 1)[1]})
except zipserv.Error as error: assert "no NVIDIA driver" in str(error) and "ZIPSERV_LIBCUDA" in str(error)
else: raise SystemExit("no error")
assert "no NVIDIA driver" in _zipserv.cuda_describe()
"""
    env = dict(os.environ, ZIPSERV_LIBCUDA=str(tmp_path / "libcuda.so.1"))
    subprocess.run([sys.executable, "-c", missing], env=env, check=True)


def test_lookups(run) -> None:
    run("""
w = (torch.randn(256, 200) * 0.02).bfloat16()
blob = on_device(zipserv.compress(w).blob)
ids = on_device(torch.randint(0, 256, (3, 8)))
rows = cuda.embedding(ids, blob, 256, 200, 1)
assert rows.shape == (3, 8, 200) and rows.dtype == torch.bfloat16 and len(launches()) == 1, log()
words = launches()[0].split()
assert words[2:5] == ["zs_gather", "grid", "3,1,1"] and "stream 77" in launches()[0]  # 24 x 4 pieces, 32 a block
assert words[-4:] == [f"{v:x}" for v in (blob.data_ptr(), ids.data_ptr(), 8, rows.data_ptr())], words
assert not any(line.split()[0] in ("alloc", "synchronize") for line in log()), log()
few = on_device(ids.int())
cuda.embedding(few, blob, 256, 200, 1)
assert launches()[1].split()[-3:-1] == [f"{few.data_ptr():x}", "4"]
cuda.embedding(ids[:, ::2], blob, 256, 200, 1)                 # a copy of the numbers, which lie apart
cuda.embedding(on_device(ids.to(torch.uint8)), blob, 256, 200, 1)
assert [line.split()[-2] for line in launches()] == ["8", "4", "8", "8"]
assert cuda.embedding(ids[:0], blob, 256, 200, 1).shape == (0, 8, 200) and len(launches()) == 4
half = on_device(zipserv.compress(w[:, :192].half()).blob)
assert cuda.embedding(ids, half, 256, 192, 2).dtype == torch.float16 and len(launches()) == 5
moved = torch.empty(blob.numel() + 1, dtype=torch.uint8)[1:].copy_(blob)
cuda.embedding(ids, on_device(moved), 256, 200, 1)             # a blob at an odd address: a copy of it
assert int(launches()[5].split()[-4], 16) % 16 == 0
noise = torch.randint(-32768, 32768, (64, 64), dtype=torch.int16).view(torch.bfloat16)
raw = zipserv.compress(noise)
got = cuda.embedding(ids % 64, on_device(raw.blob), 64, 64, 1)
assert raw.is_raw and torch.equal(got.view(torch.int16).as_subclass(torch.Tensor), noise[ids.as_subclass(torch.Tensor) % 64].view(torch.int16))
assert len(launches()) == 6, "a raw table is indexed by torch"
raises(TypeError, ["torch.float32", "torch.int64"], cuda.embedding, on_device(ids.float()), blob, 256, 200, 1)
raises(ValueError, ["the table on"], cuda.embedding, ids.as_subclass(torch.Tensor), blob, 256, 200, 1)
raises(ValueError, ["4 or 8 bytes"], _zipserv.cuda_gather, 0, 0, 16, 1, 64, 64, 0x2000, 2, 1, 0x3000)
raises(ValueError, ["BF16 nor FP16"], _zipserv.cuda_gather, 0, 0, 16, 3, 64, 64, 0x2000, 8, 1, 0x3000)
""", TENSORS)


def test_experts(run) -> None:
    run("""
from zipserv import grouped
w = (torch.randn(4, 256, 128) * 0.02).bfloat16()
made = [zipserv.compress(e).blob for e in w]
step = -(-max(b.numel() for b in made) // 256) * 256
blobs = torch.zeros(4 * step, dtype=torch.uint8)
for i, b in enumerate(made): blobs[i * step : i * step + b.numel()] = b
blobs = on_device(blobs)
ids = on_device(torch.randint(0, 4, (3, 2)))
words = cuda.moe_route(ids, 4, 8)
assert words.shape == (4 + 6 * 6,) and words.dtype == torch.int32
assert launches()[0].split()[2:5] == ["zs_moe_route", "grid", "1,1,1"] and "stream 77" in launches()[0], log()
assert launches()[0].split()[-4:] == ["2", "4", "8", f"{words.data_ptr():x}"], launches()[0]
x = on_device(torch.randn(3, 128).bfloat16())
y = cuda.moe_linear(x, blobs, step, words, 6, 8, 256, 128)
assert y.shape == (6, 256) and len(launches()) == 2, log()
assert launches()[1].split()[2] == "zs_zipgemm_grouped"
wanted = [f"{v:x}" for v in (blobs.data_ptr(), step, x.data_ptr(), 1, y.data_ptr(), 256, 128, words.data_ptr(), 6)]
assert launches()[1].split()[-10:-1] == wanted, launches()[1]
apart = on_device(torch.randn(6, 136).bfloat16()[:, :128])         # rows of pairs, which lie apart: a copy
cuda.moe_linear(apart, blobs, step, words, 6, 8, 256, 128)
assert launches()[2].split()[-7] == "0" and launches()[2].split()[-8] != f"{apart.data_ptr():x}", launches()[2]
weights = on_device(torch.rand(3, 2))
out = cuda.moe_combine(y, ids, weights, 4)
assert out.shape == (3, 256) and out.dtype == torch.bfloat16
assert launches()[3].split()[2:5] == ["zs_moe_combine", "grid", "1,3,1"], launches()[3]
none = cuda.moe_route(ids[:0], 4, 8)
assert cuda.moe_linear(x[:0], blobs, step, none, 0, 8, 256, 128).shape == (0, 256)
assert cuda.moe_combine(y[:0], ids[:0], weights[:0], 4).shape == (0, 256)
assert len(launches()) == 4
seen = len(log())
cuda.moe_linear(x, blobs, step, words, 6, 8, 256, 128)
assert len(log()) == seen + 1, log()[seen:]                       # nothing but the launch
raises(ValueError, ["4 or 8 bytes"], _zipserv.cuda_route, 0, 0, 16, 2, 6, 2, 4, 8, 0x3000)
raises(ValueError, ["1 to 1024 experts"], _zipserv.cuda_route, 0, 0, 16, 8, 6, 2, 1025, 8, 0x3000)
raises(ValueError, ["1 to 4096"], _zipserv.cuda_route, 0, 0, 16, 8, 4097, 1, 4, 8, 0x3000)
raises(ValueError, ["tokens of 4"], _zipserv.cuda_route, 0, 0, 16, 8, 6, 4, 4, 8, 0x3000)
raises(ValueError, ["pairs are multiplied"], _zipserv.cuda_grouped, 0, 0, 0x1000, 256, 64, 64, 0x2000, 0, 0x3000, 0x4000, 6, 9, 0)
raises(ValueError, ["multiple of 128"], _zipserv.cuda_grouped, 0, 0, 0x1000, 256, 64, 64, 0x2000, 0, 0x3000, 0x4000, 6, 8, 1)
assert cuda.moe_linear(x, blobs, step, words, 6, 8, 256, 128, True).shape == (6, 128)
raises(ValueError, ["16 bytes"], _zipserv.cuda_grouped, 0, 0, 0x1000, 250, 64, 64, 0x2000, 0, 0x3000, 0x4000, 6, 8, 0)
raises(ValueError, ["raw blob has 8320 bytes"], _zipserv.cuda_grouped, 0, 0, 0x1000, 8320, 64, 64, 0x2000, 0, 0x3000, 0x4000, 6, 8, 0)
raises(ValueError, ["2^31"], _zipserv.cuda_grouped, 0, 0, 0x1000, 256, 1 << 20, 1 << 20, 0x2000, 0, 0x3000, 0x4000, 600, 8, 0)
raises(ValueError, ["1 to 32 experts"], _zipserv.cuda_combine, 0, 0, 16, 16, 8, 16, 3, 33, 64, 64, 0x3000)
cuda.warm_experts(blobs, 256, 128)
""", TENSORS)


def test_a_forked_child_is_refused(run) -> None:
    run("""
import sys
_zipserv.cuda_describe()
child = os.fork()
if child == 0:
    try: _zipserv.cuda_decompress(0, 0, 0x1000, 64, 64, 0, 64, 0x2000, 64)
    except zipserv.Error as error: os._exit(0 if "spawn" in str(error) else 2)
    os._exit(1)
assert os.waitpid(child, 0)[1] == 0
""")


def test_threads(run) -> None:
    run("""
import threading
failures = []
def work():
    try:
        for _ in range(200): assert _zipserv.cuda_linear(0, 0x77, 0x1000, 256, 192, 0x2000, 5, 192, 0, 0x3000, 256, 0, 0) == 0
    except BaseException as error: failures.append(error)
threads = [threading.Thread(target=work) for _ in range(6)]
for t in threads: t.start()
for t in threads: t.join()
assert not failures, failures
assert len(launches()) == 1200
""")


def test_first_argument_errors(run) -> None:
    run("""
raises(TypeError, ["13 arguments, got 2"], _zipserv.cuda_linear, 0, 0)
raises(TypeError, ["ldx must be an int"], _zipserv.cuda_linear, 0, 0, 16, 1, 1, 0, 1, "8", 0, 0, 1, 0, 0)
raises(ValueError, ["stream must be 0"], _zipserv.cuda_linear, 0, -1, 16, 1, 1, 0, 1, 8, 0, 0, 1, 0, 0)
raises(ValueError, ["M, K and N must be"], _zipserv.cuda_linear, 0, 0, 16, 0, 1, 0, 1, 8, 0, 0, 1, 0, 0)
raises(ValueError, ["not aligned to 16"], _zipserv.cuda_decompress, 0, 0, 17, 64, 64, 0, 64, 0x2000, 64)
raises(ValueError, ["do not fit"], _zipserv.cuda_decompress, 0, 0, 16, 64, 64, 0, 64, 0x2000, 63)
raises(ValueError, ["multiple of 64"], _zipserv.cuda_decompress, 0, 0, 16, 128, 64, 1, 2, 0x2000, 64)
raises(ValueError, ["1 to 8 dimensions"], _zipserv.cuda_compress_plan, 0, 0, 16, 64, 64, 64, (1,) * 9, 16)
""")


def test_each_device_has_its_own_and_is_told_of_new_bytes(run) -> None:
    """The fake driver refuses a kernel or stream of one device in the context of another."""
    run("""
from zipserv import streams
class OnSecond(torch.Tensor):
    is_cuda = True
    def get_device(self): return 1
second = zipserv.compress((torch.randn(256, 192) * 0.02).bfloat16()).blob.as_subclass(OnSecond)
first = on_device(second.as_subclass(torch.Tensor))
x = torch.randn(3, 192).bfloat16()
def device_and_early(t, blob):
    cuda.linear(x.as_subclass(type(blob)), blob, 256, 192, 1)
    words = launches()[-1].split()
    return words[1], words[words.index("pdl") + 1]
assert device_and_early(x, second) == ("1", "0")
assert device_and_early(x, second) == ("1", "1")   # known: its first weights are fetched early
assert device_and_early(x, first) == ("0", "0") and device_and_early(x, first) == ("0", "1")
streams.forget([second, second.as_subclass(torch.Tensor)])  # the last one is host memory: nothing to tell
assert device_and_early(x, second) == ("1", "0")
assert device_and_early(x, first) == ("0", "1")
a, b = _zipserv.cuda_side_stream(0, 1), _zipserv.cuda_side_stream(1, 1)
assert a != b and a == _zipserv.cuda_side_stream(0, 1) != _zipserv.cuda_side_stream(0, 0)
_zipserv.cuda_follow(1, b, 0x77)
""", TENSORS)
