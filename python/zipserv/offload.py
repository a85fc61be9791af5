# SPDX-License-Identifier: Apache-2.0
"""Models larger than the GPU: weights wait in pinned host memory and stream in one block ahead of the computation.

The bus is the limit there, and compressed weights are 30 % fewer bytes on it. A *block* is one entry of the model's
``ModuleList`` (a transformer layer), or a large layer outside one (the output head). The GPU holds two: the one that
computes and the next one, which a stream of its own copies meanwhile. Small tensors (norms, biases) stay on the GPU,
and embedding tables on the CPU, where looking a few rows up costs less than moving the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from . import devices
from .errors import Error
from .experts import ZipExperts
from .pinned import pinned_empty
from .streams import copy_stream, forget

__all__ = ["Offload", "apply"]

#: Tensors below this stay on the device.
SMALL_BYTES = 64 << 10
ALIGNMENT = 256
SLOTS = 2
_CUDA: Any = torch.cuda  # torch's streams and events are not typed


@dataclass
class _Weight:
    """One streamed tensor: its places in modules, and where it lies in its block's bytes."""

    host: torch.Tensor
    offset: int
    places: list[tuple[nn.Module, str]]

    def put(self, tensor: torch.Tensor) -> None:
        for module, name in self.places:
            parameter = module._parameters.get(name)
            if parameter is not None:
                parameter.data = tensor
            else:
                module._buffers[name] = tensor

    def blobs(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """What products know by its address: the tensor in this one's place, or its parts."""
        holder = next((module for module, _ in self.places if isinstance(module, ZipExperts)), None)
        return [tensor] if holder is None or holder.together() is None else holder.parts(tensor)

    def view(self, data: torch.Tensor) -> torch.Tensor:
        """This tensor within the bytes ``data`` of its block."""
        host = self.host
        part = data[self.offset : self.offset + _nbytes(host)]
        return part.view(host.dtype).view(host.shape)


@dataclass
class _Block:
    name: str
    module: nn.Module
    weights: list[_Weight] = field(default_factory=list)
    nbytes: int = 0
    data: torch.Tensor | None = None


class Offload:
    """A model whose weights stream from host memory; made by :func:`apply`.

    Attributes:
        device: where the model computes.
        blocks: names of the streamed blocks, in the order in which they are expected to run.
        host_bytes: bytes that wait in host memory.
        device_bytes: bytes of the buffers on the device into which they are streamed (0 where nothing is).
    """

    def __init__(self, model: nn.Module, device: torch.device, stage: bool) -> None:
        self.device = device
        self._handles: list[Any] = []
        self._blocks = _find_blocks(model)
        self._lookups = [m for m in model.modules() if _is_table(m)]
        self.host_bytes = sum(block.nbytes for block in self._blocks)
        self.device_bytes = 0
        self._pool: _Pool | None = None
        if stage:
            self._stage(model)

    @property
    def blocks(self) -> list[str]:
        return [block.name for block in self._blocks]

    def remove(self) -> None:
        """Stop streaming: hooks go, and the weights stay where they wait, in host memory."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._pool is not None:
            self._pool.finish()
        for block in self._blocks:
            for weight in block.weights:
                weight.put(weight.host)
        self.device_bytes = 0
        self._pool = None

    def _stage(self, model: nn.Module) -> None:
        pinned = self.device.type == "cuda"
        streamed: dict[int, torch.Tensor] = {}
        for block in self._blocks:
            block.data = pinned_empty(block.nbytes, self.device) if pinned else torch.empty(block.nbytes, dtype=torch.uint8)
            for weight in block.weights:
                host = weight.view(block.data)
                host.copy_(weight.host.detach())
                streamed[id(weight.host)] = host
                weight.host = host
                weight.put(host)
        _settle(model, self.device, {id(w.host) for b in self._blocks for w in b.weights}, streamed)
        if not self._blocks:
            return
        capacity = max(block.nbytes for block in self._blocks)
        self._pool = (_CudaPool if pinned else _Pool)(self._blocks, self.device, capacity)
        self.device_bytes = capacity * SLOTS
        for index, block in enumerate(self._blocks):
            self._hook(block.module, *self._pool.hooks(index))
        for module in self._lookups:
            self._hook(module, _to("cpu"), lambda module, args, output: output.to(self.device, non_blocking=True))
        self._handles.append(model.register_forward_pre_hook(_to_with_kwargs(self.device), with_kwargs=True))

    def _hook(self, module: nn.Module, before: Callable[..., Any], after: Callable[..., Any]) -> None:
        # torch.compile runs the hooks as they are, between its graphs: they queue copies and put weights in place.
        self._handles.append(module.register_forward_pre_hook(_eager(before)))
        self._handles.append(module.register_forward_hook(_eager(after), always_call=True))

    def __repr__(self) -> str:
        return (
            f"Offload(device={str(self.device)!r}, blocks={len(self._blocks)}, host_bytes={self.host_bytes}, "
            f"device_bytes={self.device_bytes})"
        )


def apply(model: nn.Module, device: torch.device | str | int | None = None, *, stage: bool | None = None) -> Offload:
    """Keep a model's weights in host memory and stream them to ``device``, one block ahead of the computation.

    Works for compressed and plain layers alike (what a comparison needs). Without a GPU the model stays as it is and
    computes on the CPU, so that the same program runs anywhere.

    For inference: the backward pass would need weights that are gone by then, and raises.

    Args:
        model: on the CPU, weights loaded; changed in place.
        device: where to compute: by default the current CUDA device where there is one, else the CPU.
        stage: whether to stream through buffers: by default on a GPU only. True on the CPU is for tests.

    A CUDA graph of such a model is refused (:class:`zipserv.Error`), for its weights change place.

    Returns:
        A handle that tells sizes and can undo it. The model keeps all it needs without it.

    Raises:
        TypeError: not a module, no device.
        ValueError: weights are on the meta device or not on the CPU, or are sharded; no such device.
        Error: the model is under the hooks of accelerate, which moves weights too; host memory can't be pinned.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, not {type(model).__name__}")
    where = devices.named(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if where.type == "meta":
        raise ValueError("device is a CUDA device or the CPU, not meta")
    for name, module in model.named_modules():
        if hasattr(module, "_hf_hook"):
            raise Error(f"accelerate's hooks are on {name or 'the model'}: load it without device_map, or remove the hooks")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if type(tensor).__name__ == "DTensor" or type(tensor.data).__name__ == "DTensor":
            raise ValueError(f"{name} is sharded (DTensor): offload each rank's own model before sharding, or do not shard it")
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} is on {tensor.device}: load the model on the CPU first")
    return Offload(model, where, stage if stage is not None else where.type == "cuda")


class _Pool:
    """Buffers for two blocks on the CPU, filled when asked: the order of events of a GPU, without its streams."""

    def __init__(self, blocks: list[_Block], device: torch.device, capacity: int) -> None:
        self.blocks = blocks
        self.slots = [torch.empty(capacity, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        self.holds: list[int | None] = [None] * SLOTS
        self.inside: set[int] = set()  # blocks that compute now
        self.fetches = 0

    def hooks(self, index: int) -> tuple[Callable[..., None], Callable[..., None]]:
        return (lambda module, args: self.enter(index)), (lambda module, args, output: self.leave(index))

    def enter(self, index: int) -> None:
        """Before block ``index`` computes: have it here, and let the next one come."""
        if index not in self.holds:
            self.fetch(index, self._free_slot(None))
        slot = self.holds.index(index)
        self.await_copy(slot)
        views = [weight.view(self.slots[slot]) for weight in self.blocks[index].weights]
        for weight, view in zip(self.blocks[index].weights, views, strict=True):
            forget(weight.blobs(view))  # products fetch first weights of a blob they know before the work ahead of them has ended: this one is new
            weight.put(view)
        self.inside.add(index)
        following = (index + 1) % len(self.blocks)
        if following not in self.holds:
            self.fetch(following, self._free_slot(slot))

    def leave(self, index: int) -> None:
        """After block ``index`` was computed (on a GPU: queued): its buffer may be filled again."""
        if index not in self.inside:  # it was refused: torch calls this all the same
            return
        self.inside.remove(index)
        self.mark_done(self.holds.index(index))
        for weight in self.blocks[index].weights:
            weight.put(weight.host)

    def _free_slot(self, busy: int | None) -> int:
        return next(slot for slot in range(SLOTS) if slot != busy)

    def fetch(self, index: int, slot: int) -> None:
        self.holds[slot] = index
        self.fetches += 1
        self.copy(index, slot)

    def copy(self, index: int, slot: int) -> None:
        block = self.blocks[index]
        assert block.data is not None
        self.slots[slot][: block.nbytes].copy_(block.data, non_blocking=True)

    def await_copy(self, slot: int) -> None:
        """The computation waits for the copy into this slot."""

    def mark_done(self, slot: int) -> None:
        """A later copy into this slot waits for the computation until here."""

    def finish(self) -> None:
        """Wait until nothing uses the slots any more."""


class _CudaPool(_Pool):
    """The same with a stream of the engine's for the copies. Nothing waits on the host."""

    def __init__(self, blocks: list[_Block], device: torch.device, capacity: int) -> None:
        super().__init__(blocks, device, capacity)
        with torch.cuda.device(device):
            self.stream = copy_stream(device)
            self.copied = [_CUDA.Event() for _ in range(SLOTS)]
            self.used = [_CUDA.Event() for _ in range(SLOTS)]
            self.stream.wait_stream(torch.cuda.current_stream(device))

    def enter(self, index: int) -> None:
        if _is_capturing(self.slots[0].device):
            raise Error("a model whose weights stream from host memory can't be captured in a CUDA graph: its weights change place; run it eagerly")
        super().enter(index)

    def copy(self, index: int, slot: int) -> None:
        self.stream.wait_event(self.used[slot])  # returns at once for an event that was never recorded
        with torch.cuda.stream(self.stream):
            super().copy(index, slot)
            self.copied[slot].record(self.stream)

    def await_copy(self, slot: int) -> None:
        torch.cuda.current_stream(self.slots[slot].device).wait_event(self.copied[slot])

    def mark_done(self, slot: int) -> None:
        self.used[slot].record(torch.cuda.current_stream(self.slots[slot].device))

    def finish(self) -> None:
        torch.cuda.synchronize(self.slots[0].device)


def _is_capturing(device: torch.device) -> bool:
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _eager(hook: Callable[..., Any]) -> Callable[..., Any]:
    disable: Any = torch.compiler.disable
    wrapped: Callable[..., Any] = disable(hook)
    return wrapped


def _find_blocks(model: nn.Module) -> list[_Block]:
    """Entries of ``ModuleList``s, and large layers outside of them; embedding tables are none.

    Large parameters of a module that has children stay on the device: there is no moment at which it alone runs.
    """
    blocks: list[_Block] = []
    for name, module in _walk(model, "", in_list=False):
        block = _Block(name, module)
        by_id: dict[int, _Weight] = {}
        for _, part in module.named_modules():
            if _is_table(part):
                continue
            for key, tensor in [*part._parameters.items(), *part._buffers.items()]:
                if tensor is None or _nbytes(tensor) < SMALL_BYTES:
                    continue
                if id(tensor) not in by_id:
                    by_id[id(tensor)] = _Weight(tensor, block.nbytes, [])
                    block.nbytes += -(-_nbytes(tensor) // ALIGNMENT) * ALIGNMENT
                by_id[id(tensor)].places.append((part, key))
        block.weights = list(by_id.values())
        if block.weights:
            blocks.append(block)
    return blocks


def _walk(module: nn.Module, name: str, *, in_list: bool) -> Iterator[tuple[str, nn.Module]]:
    if in_list or not any(True for _ in module.children()):
        yield name, module
        return
    for key, child in module.named_children():
        path = f"{name}.{key}" if name else key
        yield from _walk(child, path, in_list=isinstance(module, nn.ModuleList))


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _is_table(module: nn.Module) -> bool:
    """True for an embedding whose table is not small; a lookup of rows goes to where it lies."""
    tensors = [*module._parameters.values(), *module._buffers.values()]
    return isinstance(module, nn.Embedding) and any(t is not None and _nbytes(t) >= SMALL_BYTES for t in tensors)


def _settle(model: nn.Module, device: torch.device, hosted: set[int], moved: dict[int, torch.Tensor]) -> None:
    """Everything that does not stream goes to the device, but embedding tables, which stay."""
    for module in model.modules():
        table = _is_table(module)
        for parameter in module._parameters.values():
            if parameter is None or id(parameter) in moved:
                continue
            if not table:
                parameter.data = parameter.data.to(device)
        for key, buffer in module._buffers.items():
            if buffer is None or id(buffer) in hosted:
                continue
            if id(buffer) in moved:  # an embedding table that the output head streams: one copy in host memory
                module._buffers[key] = moved[id(buffer)]
            elif not table:
                module._buffers[key] = buffer.to(device)


def _to(device: torch.device | str) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
        return tree_map(lambda value: value.to(device) if isinstance(value, torch.Tensor) else value, args)

    return hook


def _to_with_kwargs(device: torch.device) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return tree_map(lambda value: value.to(device) if isinstance(value, torch.Tensor) else value, (args, kwargs))

    return hook
