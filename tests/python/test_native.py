# SPDX-License-Identifier: Apache-2.0
"""The native module itself: threads, the GIL, Ctrl-C, forked and spawned processes, bad arguments."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import zipserv
from native_helpers import BF16, FP16, compress, decompress, weights
from zipserv import _zipserv


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("shape", [(1, 1), (64, 64), (65, 1), (3, 300), (257, 129)])
def test_round_trip_and_info(shape: tuple[int, int], dtype: int) -> None:
    w = weights(*shape) if dtype == BF16 else (np.random.default_rng(1).standard_normal(shape) * 0.02).astype(np.float16).view(np.uint16)
    blob = compress(w, dtype)
    assert np.array_equal(decompress(blob), w)
    info = _zipserv.info(blob.ctypes.data, blob.nbytes)
    assert (info["dtype"], info["m"], info["k"], info["shape"], info["nbytes"]) == (dtype, *shape, shape, blob.nbytes)
    assert info["checksum"] == _zipserv.checksum(w.ctypes.data, *shape)
    head = _zipserv.header(blob.ctypes.data, 128)
    counters = {"tiles": 0, "dense_tiles": 0, "escapes": 0, "literals": 0}
    assert head == {**info, **counters}
    _zipserv.check(blob.ctypes.data, blob.nbytes, False)
    _zipserv.check(blob.ctypes.data, blob.nbytes, True)


def test_histogram_counts_exponents() -> None:
    w = weights(50, 77)
    counts = _zipserv.histogram(w.ctypes.data, w.size, BF16)
    assert counts == np.bincount((w.ravel() >> 7) & 255, minlength=256).tolist()
    assert sum(_zipserv.histogram(w.ctypes.data, w.size, FP16)) == w.size
    assert sum(_zipserv.histogram(0, 0, BF16)) == 0


def test_wrong_arguments_are_refused() -> None:
    w = weights(4, 4)
    p = w.ctypes.data
    for error, call, word in [
        (TypeError, lambda: _zipserv.plan(1, 2), "takes 5 arguments"),
        (TypeError, lambda: _zipserv.plan("p", BF16, 4, 4, (4, 4)), "ptr must be an int"),
        (TypeError, lambda: _zipserv.plan(p, BF16, 4, 4, [4, 4]), "shape must be a tuple"),
        (TypeError, lambda: _zipserv.plan(p, BF16, 4, 4, (4, "4")), "dimension"),
        (ValueError, lambda: _zipserv.plan(-1, BF16, 4, 4, (4, 4)), "ptr"),
        (ValueError, lambda: _zipserv.plan(2**64, BF16, 4, 4, (4, 4)), "ptr"),
        (ValueError, lambda: _zipserv.plan(0, BF16, 4, 4, (4, 4)), "NULL"),
        (ValueError, lambda: _zipserv.plan(p, 3, 4, 4, (4, 4)), "dtype"),
        (ValueError, lambda: _zipserv.plan(p, 2**40 + 1, 4, 4, (4, 4)), "dtype"),
        (ValueError, lambda: _zipserv.plan(p, BF16, 4, 0, (4, 0)), "rows and columns"),
        (ValueError, lambda: _zipserv.plan(p, BF16, 4, 4, (4, 5)), "20 elements"),
        (ValueError, lambda: _zipserv.plan(p, BF16, 4, 4, ()), "1 to 8 dimensions"),
        (ValueError, lambda: _zipserv.plan(p, BF16, 4, 4, (4, 4, *[1] * 7)), "1 to 8 dimensions"),
        (ValueError, lambda: _zipserv.plan(p, BF16, 2**40, 2**40, (2**40, 2**40)), "rows and columns"),
        (ValueError, lambda: _zipserv.encode(10**9, p, 32), "not known"),
        (ValueError, lambda: _zipserv.free_plan(10**9), "not known"),
        (ValueError, lambda: _zipserv.histogram(p, 2**63, BF16), "addressed"),
        (zipserv.Error, lambda: _zipserv.info(p, 32), "32 bytes"),
        (zipserv.Error, lambda: _zipserv.header(p, 32), "32 bytes"),
        (zipserv.Error, lambda: _zipserv.check(p, 32, True), "32 bytes"),
    ]:
        with pytest.raises(error, match=word):
            call()


def test_a_plan_can_be_encoded_often_but_freed_once() -> None:
    w = weights(70, 70)
    handle, size = _zipserv.plan(w.ctypes.data, BF16, 70, 70, (70, 70))
    blobs = [np.empty(size, np.uint8) for _ in range(3)]
    for blob in blobs:
        _zipserv.encode(handle, blob.ctypes.data, size)
    assert all(np.array_equal(blob, blobs[0]) for blob in blobs)
    with pytest.raises(ValueError, match=str(size)):
        _zipserv.encode(handle, blobs[0].ctypes.data, size - 1)
    _zipserv.free_plan(handle)
    with pytest.raises(ValueError):
        _zipserv.free_plan(handle)


def test_error_is_one_class() -> None:
    assert zipserv.Error is _zipserv.Error
    assert issubclass(zipserv.Error, RuntimeError)
    assert (zipserv.Error.__module__, zipserv.Error.__qualname__) == ("zipserv", "Error")


def test_many_threads_at_once() -> None:
    def work(seed: int) -> bool:
        w = weights(200 + seed, 150, seed)
        good = all(np.array_equal(decompress(compress(w)), w) for _ in range(5))
        with pytest.raises(zipserv.Error, match=f"{seed} bytes"):  # each thread reads its own message
            _zipserv.info(w.ctypes.data, seed)
        return good

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(work, range(1, 65)))


def test_the_gil_is_free_during_long_work() -> None:
    w = weights(4096, 4096)
    big = np.concatenate([w] * 4)  # 128 MiB: long enough on any machine to see the other thread run
    started, done = threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        for _ in range(3):
            _zipserv.checksum(big.ctypes.data, *big.shape)
            compress(big)
        done.set()

    thread = threading.Thread(target=work)
    began = time.perf_counter()
    thread.start()
    started.wait()
    ticks, longest, last = 0, 0.0, time.perf_counter()
    while not done.is_set():
        time.sleep(0.001)
        now = time.perf_counter()
        longest, last, ticks = max(longest, now - last), now, ticks + 1
    thread.join()
    elapsed = time.perf_counter() - began
    # With the GIL held, this loop would have stood still for each of the six calls.
    assert ticks > 10
    assert longest < max(0.5 * elapsed, 0.05), (longest, elapsed)


def run(code: str, timeout: float = 120, **options: object) -> subprocess.CompletedProcess[str]:
    """Runs a program of its own, with the helpers above as the module `h`."""
    prelude = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    return subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", prelude + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=timeout,
        **options,  # type: ignore[call-overload]
    )


@pytest.mark.parametrize("step", ["plan", "encode", "check", "decode"])
def test_ctrl_c_stops_long_work(step: str) -> None:
    """A real SIGINT during each long call, again and again until one was seen to leave its work undone: Python alone would raise
    KeyboardInterrupt after the call, with the work done."""
    program = f"""
        import os, signal, threading, time
        import numpy as np
        import native_helpers as h
        z = h.z
        w = np.tile(h.weights(1024, 1024), (128, 1))  # 256 MiB: longer than the library waits between two looks
        handle, size = z.plan(w.ctypes.data, 1, *w.shape, w.shape)
        blob, target = np.empty(size, np.uint8), np.empty(size, np.uint8)
        z.encode(handle, blob.ctypes.data, size)
        out = np.empty_like(w)
        def plan():
            z.free_plan(z.plan(w.ctypes.data, 1, *w.shape, w.shape)[0])
        def encode():
            z.encode(handle, target.ctypes.data, size)
        def check():
            z.check(blob.ctypes.data, size, True)
        def decode():
            z.decode_rows(blob.ctypes.data, size, 0, w.shape[0], out.ctypes.data, out.nbytes, w.shape[1])
        def handles():  # handles are counted up, so their numbers tell how many plans were finished
            tiny = z.plan(w.ctypes.data, 1, 1, 1, (1,))[0]
            z.free_plan(tiny)
            return tiny
        undone = {{
            "plan": lambda: handles() == before + 1,
            "encode": lambda: not np.array_equal(target, blob),
            "check": lambda: True,  # leaves nothing behind to tell by
            "decode": lambda: not np.array_equal(out, w),
        }}["{step}"]
        call = {step}
        duration = 9.0
        for _ in range(3):  # the first call meets fresh pages and takes longer
            started = time.perf_counter()
            call()
            duration = min(duration, time.perf_counter() - started)
        stopped, slowest = False, 0.0
        for attempt in range(40):
            target[:], out[:] = 0, 0
            before, sent = handles(), 0.0
            def send():
                global sent
                sent = time.perf_counter()
                os.kill(os.getpid(), signal.SIGINT)
            timer = threading.Timer(duration * (0.05 + 0.05 * (attempt % 10)), send)
            try:
                timer.start()
                call()
                timer.join()
                time.sleep(60)  # it came too late, and interrupts this
            except KeyboardInterrupt:
                slowest = max(slowest, time.perf_counter() - sent)
            timer.join()
            stopped = undone()
            if stopped:
                break
        print(int(stopped), slowest)
        # The library goes on working afterwards.
        z.encode(handle, blob.ctypes.data, size)
        z.check(blob.ctypes.data, size, True)
        z.free_plan(handle)
        print("fine")
    """
    done = run(program, env=dict(os.environ, GOMAXPROCS="1"))
    assert done.stdout.endswith("\nfine\n"), done.stdout + done.stderr
    stopped, slowest = map(float, done.stdout.split()[:2])
    assert stopped
    assert slowest < 2.0  # 20 ms by design; the rest is a busy machine


def test_a_signal_handler_that_returns_does_not_stop_the_work() -> None:
    program = """
        import signal, threading, os
        import numpy as np
        import native_helpers as h
        seen = []
        def handler(*_):
            seen.append(len(h.compress(h.weights(200, 200))))  # a handler may itself call the library
        signal.signal(signal.SIGUSR1, handler)
        w = np.tile(h.weights(1024, 1024), (64, 1))
        threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGUSR1)).start()
        while not seen:
            blob = h.compress(w)
        assert np.array_equal(h.decompress(blob), w)
        print("fine")
    """
    done = run(program)
    assert done.stdout == "fine\n", done.stderr


def test_a_fault_in_memory_is_an_error_not_a_crash(tmp_path: Path) -> None:
    """A mapped file that is cut short while in use: the kernel sends SIGBUS for its missing pages."""
    program = f"""
        import mmap, os
        import numpy as np
        import native_helpers as h
        path = {str(tmp_path / "blob")!r}
        h.compress(h.weights(2048, 2048)).tofile(path)
        blob = np.memmap(path, np.uint8, "r")
        os.truncate(path, 4096)
        try:
            h.decompress(blob)
        except h.z.Error as error:
            print(error)
    """
    done = run(program)
    assert done.returncode == 0, done.stderr
    assert "cannot be read" in done.stdout


def test_os_fork() -> None:
    program = """
        import os, sys
        import native_helpers as h
        w = h.weights(300, 300)
        blob = h.compress(w)
        pid = os.fork()
        if pid == 0:
            good = 0
            for call in (lambda: h.compress(w), lambda: h.decompress(blob), lambda: h.z.version()):
                try:
                    call()
                except h.z.Error as error:
                    good += "spawn" in str(error)
            os._exit(10 + good)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        assert (h.decompress(blob) == w).all()  # the parent is as before
        print("fine")
    """
    done = run(program, timeout=60)
    assert done.stdout == "12\nfine\n", done.stderr  # compress and decompress refuse; version() enters no Go and may answer


MULTIPROCESSING = """
    import multiprocessing as mp
    import native_helpers as h
    def work(seed):
        try:
            w = h.weights(100, 100, seed)
            return bool((h.decompress(h.compress(w)) == w).all())
        except h.z.Error as error:
            return str(error)
    if __name__ == "__main__":
        h.compress(h.weights(300, 300))  # the parent has used the library
        with mp.get_context("{method}").Pool(2) as pool:
            print(pool.map(work, range(4)))
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(method: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    prelude = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    script.write_text(prelude + textwrap.dedent(MULTIPROCESSING.replace("{method}", method)))
    done = subprocess.run([sys.executable, "-W", "ignore::DeprecationWarning", str(script)], capture_output=True, text=True, timeout=180)
    if method == "fork":
        assert done.stdout.count("spawn") >= 4, done.stderr
    else:
        assert done.stdout == "[True, True, True, True]\n", done.stderr


DATA_LOADER = """
    import torch, zipserv
    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 8
        def __getitem__(self, i):
            import zipserv.errors  # a worker that has the package, as most do, but does not compute with it
            return torch.full((3,), i)
    if __name__ == "__main__":
        layer = zipserv.compress(torch.randn(128, 128, dtype=torch.bfloat16))
        loader = torch.utils.data.DataLoader(Data(), batch_size=2, num_workers=2)
        print(sum(int(batch.sum()) for batch in loader), layer.decompress().shape)
"""


def test_data_loader_workers_that_only_import(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(DATA_LOADER))
    done = subprocess.run([sys.executable, "-W", "ignore::DeprecationWarning", str(script)], capture_output=True, text=True, timeout=180)
    assert done.stdout == "84 torch.Size([128, 128])\n", done.stderr


def test_a_fork_before_the_first_use_is_fine_after_exec() -> None:
    """subprocess forks and executes; a child that executes something has a fresh library."""
    compress(weights(64, 64))
    done = run("import native_helpers as h; print(h.compress(h.weights(64, 64)).nbytes > 0)")
    assert done.stdout == "True\n", done.stderr


def test_python_keeps_its_signal_handlers() -> None:
    """The run time inside the library must leave SIGINT and SIGTERM to Python, and its own crash handler must not hide Python's."""
    before = signal.getsignal(signal.SIGINT)
    compress(weights(64, 64))
    assert signal.getsignal(signal.SIGINT) is before
    crash = "h.compress(h.weights(64, 64)); import ctypes; ctypes.string_at(1)"
    done = run(f"import faulthandler; faulthandler.enable(); import native_helpers as h; {crash}")
    assert done.returncode == -signal.SIGSEGV
    assert "Segmentation fault" in done.stderr and "string_at" in done.stderr


def test_threads_end_and_start_without_growth() -> None:
    """A thread's message and poll function are freed with the thread."""
    few = weights(1, 1)

    def work() -> None:
        with pytest.raises(zipserv.Error):
            _zipserv.header(few.ctypes.data, 2)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def burst() -> None:
        for _ in range(1000):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()

    burst()
    before = resident()
    burst()
    burst()
    assert resident() - before < 8 << 20
