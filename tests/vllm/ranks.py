# SPDX-License-Identifier: Apache-2.0
"""Processes for the ranks, forked from one that has imported vLLM once and holds nothing else: an import takes longer than a test."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The zipserv library is not among them: it works in no forked child of a process that has loaded it.
_PRELOAD = [
    "compressed_tensors",
    "torch",
    "transformers",
    "vllm.engine.arg_utils",
    "vllm.model_executor.model_loader",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.models.mixtral",
    "vllm.model_executor.models.qwen2",
    "vllm.v1.attention.backends.cpu_attn",
]

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(_PRELOAD)


def _guarded(main: Callable[..., None], arguments: tuple[Any, ...], failure: Path) -> None:
    try:
        main(*arguments)
    except BaseException:
        failure.write_text(traceback.format_exc())
        raise


def run(jobs: list[tuple[Callable[..., None], tuple[Any, ...]]], folder: Path, timeout: float = 400) -> None:
    """Runs all at once, each in a process of its own. AssertionError with their tracebacks where one fails, or takes too long."""
    failures = [folder / f"failure.{number}" for number in range(len(jobs))]
    processes = [
        _CONTEXT.Process(target=_guarded, args=(main, arguments, failure)) for (main, arguments), failure in zip(jobs, failures, strict=True)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + timeout
    try:
        while any(process.is_alive() for process in processes) and time.monotonic() < end:
            if any(process.exitcode for process in processes):  # the others wait for it in vain
                time.sleep(2)
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.join()
    texts = "\n".join(f.read_text()[-3000:] for f in failures if f.exists())
    assert all(process.exitcode == 0 for process in processes), f"exit codes {[process.exitcode for process in processes]}\n{texts}"
