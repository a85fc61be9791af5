# SPDX-License-Identifier: Apache-2.0
"""CUDA implementations of the ops: tensors in, addresses out to the native engine, work on torch's current stream.

Imported at the first CUDA call. Nothing here waits for the device, except ``compress`` and ``compress_into``, which tell the size.
"""

from __future__ import annotations

import importlib.util
import json
import os
import warnings
from typing import Any

import torch
import torch.nn.functional as F

from . import _zipserv
from .format import DTYPE_CODES, DTYPES, HEADER_BYTES, TILE, Header, parse_header

__all__ = [
    "batch_invariant", "changed", "clear_cache", "compress", "compress_into", "decompress", "describe", "embedding", "linear", "linear_gated",
    "linear_parts", "moe_combine", "moe_linear", "moe_route", "report", "set_batch_invariant", "warm", "warm_experts",
]

_BF16 = 1
_RAW = 0
_EXPAND = 1  # ZS_EXPAND of zipserv_cuda.h
_bf16 = torch.bfloat16
_linear = _zipserv.cuda_linear
_invariant = os.environ.get("VLLM_BATCH_INVARIANT") == "1"
_grad_enabled = torch.is_grad_enabled
_mode_count = torch._C._len_torch_dispatch_stack
_transform = torch._C._functorch.peek_interpreter_stack


def _compiler_dirs() -> list[str]:
    """Folders of pip packages that may hold NVRTC: of nvidia-cuda-nvrtc (CUDA 13, then 12), then torch's own."""
    found = []
    for package, folders in (("nvidia", ("cu13/lib", "cuda_nvrtc/lib")), ("torch", ("lib",))):
        spec = importlib.util.find_spec(package)
        roots = spec.submodule_search_locations if spec else None
        found += [os.path.join(root, folder) for folder in folders for root in roots or ()]
    return [path for path in found if os.path.isdir(path)]


def _warn_about_choices() -> None:
    """What `zipserv tune` left is read by the engine, which passes over a file that it cannot trust; somebody should know."""
    try:
        files = json.loads(_zipserv.cuda_control(0, '{"do": "list"}')).get("files", ())
    except _zipserv.Error:  # no cache directory, or a forked child, which will say so itself
        return
    for file in files:
        if "error" in file:
            warnings.warn(f"the choices of `zipserv tune` in {file['path']} are not used: {file['error']}; --clear removes them", stacklevel=2)


_zipserv.cuda_set_dirs(os.pathsep.join(_compiler_dirs()))
_warn_about_choices()


def _current_stream(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


# The raw handle without a Stream object around it; present in every CUDA build of torch.
_stream = getattr(torch._C, "_cuda_getCurrentRawStream", _current_stream)


# --- linear ---------------------------------------------------------------------------------------------------------


def linear(
    x: torch.Tensor, blob: torch.Tensor, m: int, k: int, dtype_code: int, bias: torch.Tensor | None = None, rows: tuple[int, int] | None = None
) -> torch.Tensor:
    """``x @ W.T + bias`` for a compressed weight ``W (m, k)``; ``x (..., k)`` must not be empty. With ``rows`` (first, a multiple of 64, and the one
    behind the last) for these rows of it alone."""
    y = _native(x, blob, m, k, dtype_code, bias, rows)
    return _linear_expanded(x, blob, m, k, dtype_code, bias, rows) if y is None else y


def linear_parts(
    x: torch.Tensor, blob: torch.Tensor, m: int, k: int, dtype_code: int, bias: torch.Tensor | None, parts: int
) -> tuple[torch.Tensor, ...] | None:
    """:func:`linear` for the rows of several layers in one blob, ``m / parts`` each, a multiple of 64: each one's result, ``(..., m / parts)``,
    contiguous, in one allocation. None where no kernel does that."""
    y = _native(x, blob, m, k, dtype_code, bias, None, parts)
    return None if y is None else y.unbind()


def linear_gated(x: torch.Tensor, blob: torch.Tensor, m: int, k: int, dtype_code: int, bias: torch.Tensor | None) -> torch.Tensor | None:
    """For the rows of two layers in one blob, ``m / 2`` each, a multiple of 64: SiLU of the first one's result times the second one's,
    ``(..., m / 2)``, rounded where separate kernels would. None where no kernel does that."""
    return _native(x, blob, m, k, dtype_code, bias, None, gated=True)


def _native(
    x: torch.Tensor, blob: torch.Tensor, m: int, k: int, dtype_code: int, bias: torch.Tensor | None, rows: tuple[int, int] | None,
    parts: int = 1, gated: bool = False,
) -> torch.Tensor | None:
    """By the engine; None where the weight is to be decompressed for the product, or no kernel does what ``rows``, ``parts`` or ``gated`` ask for.
    With ``parts``: ``(parts, ..., m / parts)``."""
    if dtype_code != _BF16 or blob.numel() == HEADER_BYTES + 2 * m * k:
        return None
    out = m if rows is None else rows[1] - rows[0]
    width = out // 2 if gated else out // parts
    part = (0, out, out, 1) if gated else () if rows is None and parts == 1 else (rows[0] if rows else 0, out, width)
    index = blob.get_device()
    shape = x.shape
    if x.dtype is not _bf16 or shape[-1] != k or x.get_device() != index:
        _refuse(x, "x", _bf16, f"(..., {k})", blob)
    bias_ptr = 0
    if bias is not None:
        if bias.dtype is not _bf16 or bias.shape != (out,) or bias.get_device() != index:
            _refuse(bias, "bias", _bf16, f"({out},)", blob)
        if not bias.is_contiguous():
            bias = bias.contiguous()
        bias_ptr = bias.data_ptr()
    address = blob.data_ptr()
    if address % 16:
        blob = _copy_of(blob)
        address = blob.data_ptr()
    if x.is_contiguous():
        tokens, ldx = x, k
    else:
        tokens = x.reshape(-1, k)
        if k > 1 and tokens.stride(1) != 1:
            tokens = tokens.contiguous()
        ldx = tokens.stride(0)
    x_ptr = tokens.data_ptr()
    if ((x_ptr | 2 * ldx) & 15 or ldx < k) and not k & 7:
        # Rows that could begin at multiples of 16 bytes: then they shall, so that one kernel, and one order of sums, serves them all.
        # Nor may they overlap.
        tokens = tokens.clone(memory_format=torch.contiguous_format)
        x_ptr, ldx = tokens.data_ptr(), k
    y = x.new_empty((*shape[:-1], width) if parts == 1 else (parts, *shape[:-1], width))
    job = (index, _stream(index), address, m, k, x_ptr, x.numel() // k, ldx, bias_ptr, y.data_ptr(), width)
    needs = _queue(*job, 0, 0, *part)
    while needs > _EXPAND:  # again where the choice has changed in between
        scratch = torch.empty(needs, dtype=torch.uint8, device=blob.device)
        needs = _queue(*job, scratch.data_ptr(), needs, *part)
    return None if needs else y


def _queue(*job: int) -> int:
    """The engine's answer: 0 (queued), ``_EXPAND``, or the bytes of scratch memory that it needs."""
    try:
        return _linear(*job)
    except _zipserv.Error as error:
        if "OUT_OF_MEMORY" not in str(error) or torch.cuda.is_current_stream_capturing():
            raise
        torch.cuda.empty_cache()  # the engine's workspaces and code come from the memory that torch leaves
        return _linear(*job)


def eager_linear(
    x: torch.Tensor, blob: torch.Tensor, m: int, k: int, dtype_code: int, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """:func:`linear` past torch's dispatcher, which costs more than the call itself. None where something needs the dispatcher: a
    gradient, a transform, a mode, a tensor subclass, an empty batch. Not to be called while torch.compile traces."""
    return linear(x, blob, m, k, dtype_code, bias) if _is_direct(x, bias) else None


def eager_parts(
    x: torch.Tensor, blob: torch.Tensor, m: int, k: int, dtype_code: int, bias: torch.Tensor | None, parts: int
) -> tuple[torch.Tensor, ...] | None:
    """:func:`linear_parts`, as :func:`eager_linear`."""
    return linear_parts(x, blob, m, k, dtype_code, bias, parts) if _is_direct(x, bias) else None


def eager_gated(x: torch.Tensor, blob: torch.Tensor, m: int, k: int, dtype_code: int, bias: torch.Tensor | None) -> torch.Tensor | None:
    """:func:`linear_gated`, as :func:`eager_linear`."""
    return linear_gated(x, blob, m, k, dtype_code, bias) if _is_direct(x, bias) else None


def _is_direct(x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether nothing needs torch's dispatcher."""
    return not (
        (x.__class__ is not torch.Tensor and x.__class__ is not torch.nn.Parameter)
        or (_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
        or _mode_count()
        or _transform() is not None
        or x.numel() == 0
    )


def _linear_expanded(
    x: torch.Tensor, blob: torch.Tensor, m: int, k: int, dtype_code: int, bias: torch.Tensor | None, rows: tuple[int, int] | None = None
) -> torch.Tensor:
    """Decompresses the weight, or some rows of it, for the time of one product."""
    dtype = DTYPES[dtype_code]
    first, end = rows or (0, m)
    if _is_raw(blob, m, k) and blob.data_ptr() % 2 == 0:
        return F.linear(x, _raw_matrix(blob, m, k, dtype)[first:end], bias)
    weight = torch.empty((end - first, k), dtype=dtype, device=blob.device)
    decompress(blob, m, k, dtype_code, first, weight)
    return F.linear(x, weight, bias)


def _refuse(tensor: torch.Tensor, name: str, dtype: torch.dtype, shape: str, blob: torch.Tensor) -> None:
    if tensor.dtype is not dtype:
        raise TypeError(f"{name} is {tensor.dtype}, the weight is {dtype}")
    if tensor.device != blob.device:
        raise ValueError(f"{name} is on {tensor.device}, the weight on {blob.device}")
    raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, it should be {shape}")


# --- embedding ------------------------------------------------------------------------------------------------------


def embedding(ids: torch.Tensor, blob: torch.Tensor, m: int, k: int, dtype_code: int) -> torch.Tensor:
    """Rows ``ids (...)`` of a compressed table ``(m, k)``, as ``(..., k)``. A number that is no row is a device-side assertion, as it is of
    ``nn.Embedding``: it shows at a later call, and no other follows in this process."""
    if ids.get_device() != blob.get_device():
        raise ValueError(f"the row numbers are on {ids.device}, the table on {blob.device}")
    if ids.dtype is not torch.int64 and ids.dtype is not torch.int32:
        if ids.dtype not in (torch.uint8, torch.int8, torch.int16):
            raise TypeError(f"the row numbers are {ids.dtype}, they should be torch.int64 or torch.int32")
        ids = ids.long()
    dtype = DTYPES[dtype_code]
    if _is_raw(blob, m, k):
        return F.embedding(ids, _raw_matrix(blob, m, k, dtype))
    if blob.data_ptr() % 16:
        blob = _copy_of(blob)
    ids = ids.contiguous()
    index = blob.get_device()
    rows = torch.empty((*ids.shape, k), dtype=dtype, device=blob.device)
    count = ids.numel()
    if count:
        _zipserv.cuda_gather(index, _stream(index), blob.data_ptr(), dtype_code, m, k, ids.data_ptr(), ids.element_size(), count, rows.data_ptr())
    return rows


def eager_embedding(ids: torch.Tensor, blob: torch.Tensor, m: int, k: int, dtype_code: int) -> torch.Tensor | None:
    """:func:`embedding` past torch's dispatcher, as :func:`eager_linear`. Not to be called while torch.compile traces."""
    if ids.__class__ is not torch.Tensor or _mode_count() or _transform() is not None:
        return None
    return embedding(ids, blob, m, k, dtype_code)


# --- experts: zipserv.grouped checks what these are given ----------------------------------------------------------


def moe_route(ids: torch.Tensor, experts: int, tile: int) -> torch.Tensor:
    """What :func:`moe_linear` reads, of a router's choice ``ids (tokens, top)``."""
    ids = ids.contiguous()
    index, pairs = ids.get_device(), ids.numel()
    words = torch.empty(4 + 6 * pairs, dtype=torch.int32, device=ids.device)
    if pairs:
        _zipserv.cuda_route(index, _stream(index), ids.data_ptr(), ids.element_size(), pairs, ids.shape[1], experts, tile, words.data_ptr())
    return words


def moe_linear(
    x: torch.Tensor, blobs: torch.Tensor, step: int, routing: torch.Tensor, pairs: int, tile: int, m: int, k: int, gated: bool = False
) -> torch.Tensor:
    """Each pair's row by its expert, ``(pairs, m)`` or with gates ``(pairs, m / 2)``, in one launch; the experts' blobs lie ``step`` bytes apart."""
    if not (x.is_contiguous() and x.data_ptr() % 16 == 0):
        x = x.clone(memory_format=torch.contiguous_format)  # rows that begin at multiples of 16 bytes are copied eight values at a time
    y = x.new_empty((pairs, m // 2 if gated else m))
    if pairs:
        index = x.get_device()
        by_pair = int(x.shape[0] == pairs)
        rows, out, words = x.data_ptr(), y.data_ptr(), routing.data_ptr()
        _zipserv.cuda_grouped(index, _stream(index), blobs.data_ptr(), step, m, k, rows, by_pair, out, words, pairs, tile, gated)
    return y


def moe_combine(y: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: int) -> torch.Tensor:
    """Each token's weighted sum over its pairs' rows, ``(tokens, m)``, added in FP32 in the order of the experts' numbers."""
    y, ids, weights = y.contiguous(), ids.contiguous(), weights.float().contiguous()
    tokens, top = ids.shape
    out = y.new_empty((tokens, y.shape[1]))
    if tokens and top:
        index = y.get_device()
        chosen, factors = ids.data_ptr(), weights.data_ptr()
        job = (y.data_ptr(), chosen, ids.element_size(), factors, tokens, top, experts, y.shape[1], out.data_ptr())
        _zipserv.cuda_combine(index, _stream(index), *job)
    return out


# --- decompress -----------------------------------------------------------------------------------------------------


def _copy_of(blob: torch.Tensor) -> torch.Tensor:
    """A blob in memory of its own, which may have held another one before. The kernels copy 16 bytes at a time, and a slice of a larger tensor may
    start anywhere."""
    blob = blob.clone()
    changed(blob)
    return blob


def _is_raw(blob: torch.Tensor, m: int, k: int) -> bool:
    return blob.numel() == HEADER_BYTES + 2 * m * k


def _raw_matrix(blob: torch.Tensor, m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """The matrix of a raw blob, without a copy where its address allows."""
    body = blob[HEADER_BYTES:]
    return (body if body.data_ptr() % 2 == 0 else body.clone()).view(dtype).view(m, k)


def decompress(blob: torch.Tensor, m: int, k: int, dtype_code: int, row0: int, out: torch.Tensor) -> None:
    """Rows ``row0`` on of the matrix into ``out (rows, k)``, whose rows may lie apart."""
    if out.dtype is not DTYPES[dtype_code] or out.dim() != 2 or out.shape[1] != k or out.get_device() != blob.get_device():
        _refuse(out, "out", DTYPES[dtype_code], f"(rows, {k})", blob)
    rows = out.shape[0]
    if row0 < 0 or row0 + rows > m:
        raise ValueError(f"rows {row0} .. {row0 + rows} of a matrix of {m} rows")
    if _is_raw(blob, m, k):
        out.copy_(_raw_matrix(blob, m, k, DTYPES[dtype_code])[row0 : row0 + rows])
    elif dtype_code != _BF16:
        out.copy_(_decode_on_host(blob, m, k, dtype_code, row0, rows))
    elif row0 % TILE:  # begin with the row of tiles that holds row0
        more = torch.empty((row0 % TILE + rows, k), dtype=_bf16, device=blob.device)
        decompress(blob, m, k, dtype_code, row0 - row0 % TILE, more)
        out.copy_(more[row0 % TILE :])
    elif rows:
        if blob.data_ptr() % 16:
            blob = _copy_of(blob)
        index = blob.get_device()
        ld = out.stride(0) if rows > 1 else k
        _zipserv.cuda_decompress(index, _stream(index), blob.data_ptr(), m, k, row0, rows, out.data_ptr(), ld)


def _decode_on_host(blob: torch.Tensor, m: int, k: int, dtype_code: int, row0: int, rows: int) -> torch.Tensor:
    warnings.warn("there are GPU kernels for BF16 only: FP16 weights on a GPU are decoded by the CPU, which is slow", stacklevel=3)
    host = blob.cpu()
    out = torch.empty((rows, k), dtype=DTYPES[dtype_code])
    if rows:
        _zipserv.decode_rows(host.data_ptr(), host.numel(), row0, row0 + rows, out.data_ptr(), out.nbytes, k)
    return out


# --- compress -------------------------------------------------------------------------------------------------------


def compress(weight: torch.Tensor, m: int, k: int, shape: tuple[int, ...]) -> tuple[torch.Tensor, Header]:
    """The blob of a contiguous BF16 or FP16 tensor that is stored as an ``(m, k)`` matrix, on the same device, and what its header says;
    the bytes are the codec's.

    The weights are read once. How much memory the blob takes is guessed before from some of the tiles, so the blob is the first bytes of memory that
    is up to 1.6 % larger (:data:`_SPARE`). Where the guess is not good enough, weights are read twice. Waits for the device twice: for the guess, and
    for the size.
    """
    if weight.dtype is not _bf16:
        host = _compress_on_host(weight, m, k, shape, DTYPE_CODES[weight.dtype])
        return host.to(weight.device), parse_header(host)
    index, device = weight.get_device(), weight.device
    scratch = torch.empty(_zipserv.cuda_compress_scratch(index, m, k), dtype=torch.uint8, device=device)
    job = (index, _stream(index), weight.data_ptr(), k, m, k, shape, scratch.data_ptr())
    room = _zipserv.cuda_compress_plan(*job)
    while True:
        blob = torch.empty(room, dtype=torch.uint8, device=device)
        mode, nbytes, checksum = _zipserv.cuda_compress_write(*job, blob.data_ptr(), room)
        if mode == _RAW or nbytes <= room:
            break
        del blob
        room = nbytes
        _zipserv.cuda_compress_plan(*job)  # clears the scratch memory
    if mode == _RAW:
        del blob
        blob = torch.empty(nbytes, dtype=torch.uint8, device=device)
        _zipserv.cuda_compress_raw(*job, checksum, blob.data_ptr())
        blob[HEADER_BYTES:].copy_(weight.view(-1).view(torch.uint8))
    elif nbytes < room:
        if _SPARE * (room - nbytes) <= room:
            blob = blob[:nbytes]  # the rest is 0 (a file of torch.save holds the whole storage)
        else:
            blob = _copy_of(blob[:nbytes])
    return blob, Header(_bf16, mode == _RAW, shape, m, k, nbytes, checksum)


def compress_into(weight: torch.Tensor, m: int, k: int, shape: tuple[int, ...], blob: torch.Tensor) -> int:
    """Compress a contiguous BF16 tensor into memory that is there, 16-byte aligned, and return the bytes of its blob. It is complete if these are not
    more than there are; a rest of up to a 64th is then set to 0. Else, and where the blob is a raw one (0), the memory holds anything. Waits for the
    device once, for the size."""
    index = weight.get_device()
    scratch = torch.zeros(_zipserv.cuda_compress_scratch(index, m, k), dtype=torch.uint8, device=weight.device)
    job = (index, _stream(index), weight.data_ptr(), k, m, k, shape, scratch.data_ptr())
    mode, nbytes, _ = _zipserv.cuda_compress_write(*job, blob.data_ptr(), blob.numel())
    return 0 if mode == _RAW else nbytes


_SPARE = 64  # a result may leave that part of its memory unused, which cuda_compress_write then clears


def eager_compress(weight: torch.Tensor, m: int, k: int) -> tuple[torch.Tensor, Header] | None:
    """:func:`compress` past torch's dispatcher; the header that is known on the host anyway need not be read from the device, which would
    wait for it. None where something needs the dispatcher."""
    if (weight.__class__ is not torch.Tensor and weight.__class__ is not torch.nn.Parameter) or _mode_count() or _transform() is not None:
        return None
    return compress(weight.detach().contiguous() if weight.requires_grad else weight.contiguous(), m, k, tuple(weight.shape))


def _compress_on_host(weight: torch.Tensor, m: int, k: int, shape: tuple[int, ...], code: int) -> torch.Tensor:
    host = weight.cpu()
    handle, nbytes = _zipserv.plan(host.data_ptr(), code, m, k, tuple(shape))
    try:
        blob = torch.empty(nbytes, dtype=torch.uint8)
        _zipserv.encode(handle, blob.data_ptr(), nbytes)
    finally:
        _zipserv.free_plan(handle)
    return blob


# --- settings and information ---------------------------------------------------------------------------------------


def set_batch_invariant(on: bool) -> None:
    """A token's result has the same bits whatever else is in the batch, for every number of tokens.

    Without it that holds for up to 32 tokens. More are split in another way where that is faster, for thousands the sums depend on their
    number or are cuBLAS's, and choices of ``zipserv tune`` are for classes of tokens. The environment variable ``VLLM_BATCH_INVARIANT=1``
    switches it on at start. CUDA graphs that were captured before keep what they have.
    """
    global _invariant
    _zipserv.cuda_set_batch_invariant(on)
    _invariant = bool(on)


def batch_invariant() -> bool:
    """What :func:`set_batch_invariant` or the environment has set."""
    return _invariant


def warm(blob: torch.Tensor, m: int, k: int, tokens: int = 64, gated: bool = False) -> None:
    """Compiles and loads all that products with this weight need, so that no later call waits for the compiler.

    Args:
        blob: the weight on its GPU.
        m: rows of the weight.
        k: columns of the weight.
        tokens: largest number of tokens to prepare for.
        gated: also products that apply gates (:func:`linear_gated`), those of an MLP whose gate and up are this weight's rows.

    Raises:
        ValueError: ``m`` or ``k`` is not from 1 to 2^31 - 1, or ``gated`` and ``m`` is no multiple of 128.
    """
    _zipserv.cuda_warm(blob.get_device(), m, k, tokens, gated)


def warm_experts(blobs: torch.Tensor, m: int, k: int, gated: bool = False) -> None:
    """:func:`warm` for experts of shape ``(m, k)`` that are multiplied together (:mod:`zipserv.grouped`)."""
    _zipserv.cuda_warm_grouped(blobs.get_device(), m, k, gated)


def changed(blob: torch.Tensor) -> None:
    """To be called after a blob on a GPU was overwritten in place: the next product with it then waits for that.

    Products fetch their first weights before the kernel ahead of them in the stream has ended. The first product with a blob does not,
    so a blob in memory of its own needs no call.
    """
    _zipserv.cuda_changed(blob.get_device(), blob.data_ptr())


def clear_cache() -> None:
    """Removes the compiled kernels on disk; they are made again when needed."""
    _zipserv.cuda_clear_cache()


def describe() -> dict[str, Any]:
    """Driver, devices, compiler (NVRTC) and kernel cache, as the engine sees them. Missing parts carry an ``error``."""
    facts: dict[str, Any] = json.loads(_zipserv.cuda_describe())
    return facts


def report() -> dict[str, object]:
    """The same in a line each, for ``zipserv doctor``."""
    facts = describe()
    driver, nvrtc, cache = facts["driver"], facts["nvrtc"], facts["cache"]
    lines: dict[str, object] = {
        "driver": driver.get("error") or f"CUDA {driver['cuda']} ({driver['path']})",
        "compiler": nvrtc.get("error") or f"NVRTC {nvrtc['version']} ({nvrtc['path']})",
        "cache": cache.get("error") or f"{cache['dir']}: {cache['files']} kernels, {cache['bytes'] / 1e6:.1f} of {cache['limit'] / 1e6:.0f} MB",
    }
    for device in facts["devices"]:
        what = device.get("error") or f"compiles for {device.get('target', 'nothing: no compiler')}"
        tuned = device.get("tuned")
        if tuned:
            what += f"; tuned: {tuned.get('error') or str(tuned['choices']) + ' choices'}" + (", switched off" if tuned.get("off") else "")
        lines[f"device {device['index']}"] = f"{device.get('name', '?')}, compute capability {device.get('capability', '?')}, {what}"
    return lines
