# SPDX-License-Identifier: Apache-2.0
"""What the compressed methods share: parameters that load piece by piece, and the blob that takes their place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm import envs
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from zipserv import cpu, cuda
from zipserv.format import DTYPE_CODES, HEADER_BYTES, raw_nbytes
from zipserv.tensor import linear_blob

from .collect import Collector, record

logger = init_logger("vllm.zipserv")

DUMMY_SCALE = 0.02


def dummy_weights() -> bool:
    """True under `--load-format dummy`, where no loader is ever called."""
    config = get_current_vllm_config_or_none()
    return config is not None and config.load_config.load_format == "dummy"


def follow_batch_invariance() -> None:
    """Under `VLLM_BATCH_INVARIANT=1` the products are batch-invariant, on a GPU and on a CPU.

    vLLM has no flag by which a quantization method declares that it can be: it asks attention backends and its own expert kernels, and
    leaves the linear methods to look at the variable themselves. It may be set from Python, after the native library has read its
    environment, so it is looked at in each process that builds layers.
    """
    if envs.VLLM_BATCH_INVARIANT:
        cuda.set_batch_invariant(True)
        cpu.set_cpu_linear("fused")


def is_raw(blob: torch.Tensor, m: int, k: int) -> bool:
    return blob.numel() == raw_nbytes(m, k)


def raw_matrix(blob: torch.Tensor, m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    return blob[HEADER_BYTES:].view(dtype).view(m, k)


def finish(collector: Collector) -> torch.Tensor:
    """The blob of a collector that gets no more pieces."""
    if not collector.started:
        if not dummy_weights():
            raise RuntimeError(f"{collector}: the checkpoint holds no weight for this layer")
        noise = torch.randn(collector.rows, collector.cols, dtype=torch.float32, device=collector.device) * DUMMY_SCALE
        collector.put((0, collector.rows, 0, collector.cols), noise.to(collector.dtype))
    return collector.finish()


def attach(param: torch.Tensor, collectors: Sequence[Collector], ready: Callable[[], None]) -> Callable[..., Any]:
    """Let the loader of the meta parameter `param` feed the collectors; `ready` is called once, when all are complete.

    Gives the loader back, for the parameter that comes after.
    """
    loader = param.weight_loader  # type: ignore[attr-defined]
    called = False

    def after() -> None:
        nonlocal called
        if not called and all(collector.complete for collector in collectors):
            called = True
            ready()

    made = record(loader, param, list(collectors), after)
    param.weight_loader = made  # type: ignore[attr-defined]
    return made


def loaded_parameter(weight: torch.Tensor, loader: Callable[..., Any]) -> torch.nn.Parameter:
    param = torch.nn.Parameter(weight, requires_grad=False)
    param.weight_loader = loader  # type: ignore[attr-defined]
    return param


class ZipWeight:
    """The one compressed matrix of a layer: `layer.weight` from meta parameter to blob.

    After loading `layer.weight` is the blob (uint8, one dimension). A matrix that would not shrink becomes an ordinary
    weight again, and the layer is handled by vLLM's own method for uncompressed layers.
    """

    def __init__(self, layer: Any, prefix: str, param: torch.nn.Parameter) -> None:
        follow_batch_invariance()
        self.m, self.k = param.shape
        self.dtype = param.dtype
        self.code = DTYPE_CODES[param.dtype]
        self.layers = [layer]
        self.plain: UnquantizedLinearMethod | None = None
        self.collector: Collector | None = Collector(f"{prefix}.weight", self.m, self.k, param.dtype, torch.get_default_device())
        self.loader = attach(param, [self.collector], self.settle)

    def settle(self) -> None:
        """Put the blob in place. Called when the last piece has come, or at the latest after loading."""
        if self.collector is None:
            return
        collector, self.collector = self.collector, None
        self.place(finish(collector))

    def place(self, blob: torch.Tensor) -> None:
        weight = blob
        if is_raw(blob, self.m, self.k):
            logger.info("%s stays uncompressed: it would not shrink", self.layers[0].prefix or "a layer without a name")
            self.plain = UnquantizedLinearMethod()
            weight = raw_matrix(blob, self.m, self.k, self.dtype).clone()
        elif blob.is_cuda:
            cuda.changed(blob)  # its memory may have held another blob
        param = loaded_parameter(weight, self.loader)
        for layer in self.layers:
            layer.weight = param
            if self.plain is not None:
                self.plain.process_weights_after_loading(layer)

    def linear(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.plain is not None:
            y: torch.Tensor = self.plain.apply(layer, x, bias)
            return y
        return linear_blob(x, layer.weight, self.m, self.k, self.dtype, bias)

