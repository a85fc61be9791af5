# SPDX-License-Identifier: Apache-2.0
"""Whole models: replace their layers by compressed ones, in place."""

from __future__ import annotations

import contextlib
import fnmatch
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from .checkpoint import open_file
from .conv import ZipConv, is_matmul
from .embedding import ZipEmbedding
from .errors import Error
from .format import DTYPE_CODES
from .layers import BlobModule, ZipLinear, take_over
from .merged import merge_layers
from .report import CompressionReport, LayerReport
from .tensor import compress, require_compressible

__all__ = ["CompressionReport", "Converter", "LayerReport", "compress_model", "converters", "load_model", "prepare_model"]

#: What ``include`` and ``exclude`` take: a glob over the layer's name, several, or a function of name and module.
Patterns = str | Iterable[str] | Callable[[str, nn.Module], bool] | None


@dataclass(frozen=True)
class Converter:
    """How one kind of module becomes a compressed one.

    Attributes:
        matches: whether a module is of this kind.
        build: makes the new module from the old one and its compressed weights by name.
        weights: names of the parameters that are compressed.
        view: what of such a parameter is compressed, e.g. its transpose.
        compress: compresses it; the result, with ``nbytes`` and ``is_raw``, is what ``build`` gets.
        empty: makes the new module without weights, to load a compressed checkpoint into; None if it can't.
    """

    matches: Callable[[nn.Module], bool]
    build: Callable[[nn.Module, Mapping[str, Any]], nn.Module]
    weights: tuple[str, ...] = ("weight",)
    view: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
    compress: Callable[[torch.Tensor], Any] = compress
    empty: Callable[[nn.Module], nn.Module] | None = None


def _blob_dtype(old: nn.Module) -> torch.dtype:
    """Dtype of the compressed weight to be loaded: the old one's where that can be compressed."""
    dtype = old.get_parameter("weight").dtype
    return dtype if dtype in DTYPE_CODES else torch.bfloat16


def _empty_linear(old: nn.Module) -> nn.Module:
    assert isinstance(old, nn.Linear)
    new = ZipLinear(old.in_features, old.out_features, False, old.weight.device, _blob_dtype(old))
    new.bias = old.bias
    return new


def _empty_embedding(old: nn.Module) -> nn.Module:
    assert isinstance(old, nn.Embedding)
    return ZipEmbedding(old.num_embeddings, old.embedding_dim, old.padding_idx, old.weight.device, _blob_dtype(old))


#: The kinds of modules that are compressed; the first match counts. Exactly these classes, for a subclass may use its
#: weight in ways of its own. Other packages' kinds may be appended.
converters: list[Converter] = [
    Converter(
        matches=lambda module: type(module) is nn.Linear,
        build=lambda old, weights: ZipLinear.from_ziptensor(weights["weight"], getattr(old, "bias", None)),
        empty=_empty_linear,
    ),
    Converter(
        matches=lambda module: type(module) is nn.Embedding and module.max_norm is None,
        build=lambda old, weights: ZipEmbedding.from_embedding(cast(nn.Embedding, old), weights["weight"]),
        empty=_empty_embedding,
    ),
    Converter(
        matches=is_matmul,
        build=lambda old, weights: ZipConv.from_conv(old, weights["weight"]),
        empty=lambda old: ZipConv.empty_like(old, _blob_dtype(old)),
    ),
]


def compress_model(
    model: nn.Module,
    include: Patterns = None,
    exclude: Patterns = None,
    *,
    progress: bool | None = None,
    offload: str | None = None,
    merge: bool = True,
) -> CompressionReport:
    """Compress the weights of a model's layers, in place and one at a time.

    Layers are ``nn.Linear``, ``nn.Embedding``, convolutions whose windows do not overlap, and what else is in
    ``zipserv.model.converters``. Layers whose weight is neither BF16 nor FP16, or would not shrink, or is shared with a module that stays as it is,
    are kept and named in the report. Weights that several layers share are compressed once and stay shared.

    Args:
        model: any module; its layers are replaced, so it must not be a layer itself.
        include: layers to compress, by default all: a glob over names (``"*.mlp.*"``), several, or a function
            ``(name, module) -> bool``.
        exclude: layers to leave alone, in the same form.
        progress: show a progress bar; by default where stderr is a terminal.
        offload: ``"cpu"`` keeps the compressed weights in host memory and streams them to the GPU.
        merge: store layers that read the same input (query, key, value; gate, up) in one blob, so that a GPU computes
            them in one product (:func:`zipserv.merged.merge_layers`). Names and state dicts stay as they are.

    Returns:
        A report with one entry for each layer looked at.

    Raises:
        TypeError: not a module, or patterns of another type.
        ValueError: the model is a single layer; all its layers have a dtype that can't be compressed; no layer matches
            the globs of ``include``, or ``exclude`` leaves none of those.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, not {type(model).__name__}")
    if offload not in (None, "cpu"):
        raise ValueError(f"offload is 'cpu' or None, not {offload!r}")
    wanted = _selector(include, exclude)
    chosen = [(name, module, converter) for name, module, converter in _candidates(model) if wanted(name, module)]
    if any(not name for name, _, _ in chosen):
        raise ValueError("the model is a single layer and can't be replaced in place: use ZipLinear.from_linear(layer)")
    if not chosen and include is not None and not callable(include):
        _refuse_nothing(model, include, exclude)
    run = _Run(model, chosen)
    report = CompressionReport()
    with _progress(len(chosen), progress) as step:
        # Taken off the list one by one, so that each original weight is freed before the next one is compressed.
        chosen.reverse()
        while chosen:
            report.layers += run.convert(*chosen.pop())
            step()
    dtypes = {str(layer.dtype) for layer in report.layers if layer.dtype not in DTYPE_CODES}
    if report.layers and dtypes and all(layer.dtype not in DTYPE_CODES for layer in report.layers):
        raise ValueError(
            f"no layer can be compressed, all weights are {', '.join(sorted(dtypes))}: model.to(torch.bfloat16) first "
            "(that step rounds; compression itself loses nothing)"
        )
    if merge:
        merge_layers(model)
    if offload is not None:
        importlib.import_module("zipserv.offload").apply(model)
    return report


def prepare_model(model: nn.Module, include: Patterns = None, exclude: Patterns = None) -> list[str]:
    """Replace layers by compressed ones without weights, to load a compressed checkpoint into; works on meta models.

    Args:
        model, include, exclude: as for :func:`compress_model`.

    Returns:
        Names of the replaced layers.
    """
    wanted = _selector(include, exclude)
    names = []
    for name, module, converter in list(_candidates(model)):
        if converter.empty is None or not wanted(name, module):
            continue
        if not name:
            raise ValueError("the model is a single layer and can't be replaced in place: use zipserv.ZipLinear")
        _replace(model, {module: take_over(module, converter.empty(module))})
        names.append(name)
    return names


def load_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    strict: bool = True,
    verify: bool = True,
    merge: bool = True,
) -> Any:
    """Load a checkpoint into a plain model: the layers that it holds compressed become compressed layers.

    Weights are assigned, not copied, so ``model`` may be on the meta device.

    Args:
        model: the uncompressed architecture.
        path: file, index or folder, as for :func:`zipserv.open_file`.
        device: where the weights go.
        strict: as for ``load_state_dict``.
        verify: check the checksums of the original weights.
        merge: as for :func:`compress_model`.

    Returns:
        What ``load_state_dict`` returns: missing and unexpected keys.
    """
    with open_file(path, device=device, verify=verify) as file:
        held = {name: file.info(name).shape for name in file.keys() if file.info(name).compressed}
        state = file.load()
    for name, module, converter in list(_candidates(model)):
        keys = {weight: f"{name}.{weight}" for weight in converter.weights}
        if converter.compress is not compress or not all(key in held for key in keys.values()):
            continue
        for weight, key in keys.items():
            shape = tuple(converter.view(getattr(module, weight)).shape)
            if held[key] != shape:
                raise Error(f"{key!r} has the shape {held[key]} in the file, {shape} in the model")
        _replace(model, {module: take_over(module, converter.build(module, {w: state[key] for w, key in keys.items()}))})
    odd = sorted(held.keys() - _blob_names(model))
    if odd:
        raise Error(f"{odd[0]!r} is compressed in the file, but the model has no layer there that can be compressed")
    result = model.load_state_dict(state, strict=strict, assign=True)
    del state
    if merge:
        merge_layers(model)
    return result


class _Run:
    """One compression of a model: what is shared, what was compressed already."""

    def __init__(self, model: nn.Module, chosen: list[tuple[str, nn.Module, Converter]]) -> None:
        self.model = model
        self.done: dict[tuple[int, tuple[int, ...]], tuple[Any, str]] = {}
        taken = {(id(module), weight) for _, module, converter in chosen for weight in converter.weights}
        # Parameters by id stay alive through the modules that hold them or through this table's own reference.
        self.elsewhere: dict[int, str] = {}
        self.alive: list[nn.Parameter] = []
        counts: dict[int, int] = {}
        for name, module in model.named_modules():
            for key, parameter in module._parameters.items():
                if parameter is None:
                    continue
                counts[id(parameter)] = counts.get(id(parameter), 0) + 1
                if (id(module), key) not in taken:
                    self.elsewhere[id(parameter)] = f"{name}.{key}" if name else key
                if counts[id(parameter)] == 2:
                    self.alive.append(parameter)

    def convert(self, name: str, module: nn.Module, converter: Converter) -> list[LayerReport]:
        parameters = {weight: getattr(module, weight) for weight in converter.weights}
        labels = {weight: name if weight == "weight" else f"{name}.{weight}" for weight in parameters}
        note = self._obstacle(module, parameters, converter)
        if not note:
            entries, blobs = self._compress(parameters, labels, converter)
            if entries:
                _replace(self.model, {module: take_over(module, converter.build(module, blobs))})
                return entries
            note = "would not shrink"
        return [LayerReport(labels[w], tuple(p.shape), p.dtype, _nbytes(p), _nbytes(p), "kept", note) for w, p in parameters.items()]

    def _obstacle(self, module: nn.Module, parameters: dict[str, torch.Tensor], converter: Converter) -> str:
        if "forward" in module.__dict__:
            return "its forward method was replaced (hooks of another library)"
        for weight, parameter in parameters.items():
            if weight not in module._parameters:
                return f"{weight} is no plain parameter (parametrized or pruned)"
            if id(parameter) in self.elsewhere:
                return f"shared with {self.elsewhere[id(parameter)]}, which stays as it is"
            try:
                require_compressible(converter.view(parameter))
            except (TypeError, ValueError) as error:
                return str(error)
        return ""

    def _compress(
        self, parameters: dict[str, torch.Tensor], labels: dict[str, str], converter: Converter
    ) -> tuple[list[LayerReport], dict[str, Any]]:
        """Entries and compressed weights; nothing where all of them would be kept raw."""
        entries, blobs = [], {}
        for weight, parameter in parameters.items():
            shape, dtype, size = tuple(parameter.shape), parameter.dtype, _nbytes(parameter)
            seen = converter.view(parameter)
            key = (id(parameter), seen.stride())
            if key in self.done:
                blobs[weight], first = self.done[key]
                entries.append(LayerReport(labels[weight], shape, dtype, size, 0, "tied", f"to {first}"))
                continue
            blob = blobs[weight] = converter.compress(seen)
            if any(parameter is other for other in self.alive):
                self.done[key] = (blob, labels[weight])
            entries.append(LayerReport(labels[weight], shape, dtype, size, blob.nbytes, "compressed"))
        if all(blob.is_raw for blob in blobs.values()):
            return [], {}
        return entries, blobs


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, Converter]]:
    for name, module in model.named_modules():
        if isinstance(module, BlobModule):
            continue
        converter = next((c for c in converters if c.matches(module)), None)
        if converter is not None:
            yield name, module, converter


def _blob_names(model: nn.Module) -> set[str]:
    return {
        f"{name}.{weight}" if name else weight
        for name, module in model.named_modules()
        if isinstance(module, BlobModule)
        for weight in module._blob_specs
    }


def _replace(model: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
    """Put new modules in the place of old ones, wherever the model holds them."""
    for parent in model.modules():
        for key, child in parent._modules.items():
            if child is not None and child in new:
                parent._modules[key] = new[child]


def _refuse_nothing(model: nn.Module, include: Patterns, exclude: Patterns) -> None:
    """``include`` without a match is a slip of the pen, unless what it names is compressed already."""
    wanted = _selector(include, exclude)
    if any(isinstance(module, BlobModule) and wanted(name, module) for name, module in model.named_modules()):
        return
    there = [name for name, _, _ in _candidates(model)]
    shown = ", ".join(there[:5]) + (f" and {len(there) - 5} more" if len(there) > 5 else "")
    raise ValueError(
        f"include and exclude leave no layer to compress; the model has {shown or 'none'} (a glob must match the whole name: '*.mlp.*')"
    )


def _selector(include: Patterns, exclude: Patterns) -> Callable[[str, nn.Module], bool]:
    """Which layers are meant."""
    wanted, unwanted = _predicate(include), _predicate(exclude)
    return lambda name, module: (wanted is None or wanted(name, module)) and not (unwanted is not None and unwanted(name, module))


def _predicate(patterns: Patterns) -> Callable[[str, nn.Module], bool] | None:
    if patterns is None or callable(patterns):
        return patterns
    globs = [patterns] if isinstance(patterns, str) else list(patterns) if isinstance(patterns, Iterable) else [patterns]
    if any(not isinstance(glob, str) for glob in globs):
        raise TypeError("include and exclude are a glob, a list of globs, or a function of name and module")
    return lambda name, _: any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextlib.contextmanager
def _progress(total: int, show: bool | None) -> Iterator[Callable[[], object]]:
    if show is None:
        show = sys.stderr.isatty()
    if not show:
        yield lambda: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc="compressing", unit="layer") as bar:
        yield bar.update
