# SPDX-License-Identifier: Apache-2.0
"""``ZipEmbedding``: ``nn.Embedding`` over a compressed table."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from . import gather, ops
from .errors import Error
from .format import DTYPE_CODES, SUFFIX
from .layers import BlobModule
from .lazy import LazyWeight
from .tensor import ZipTensor, compress

__all__ = ["ZipEmbedding"]


class ZipEmbedding(BlobModule, nn.Embedding):
    """``nn.Embedding`` whose table stays compressed: a lookup decodes the rows it needs and no others.

    The table is the uint8 buffer ``weight_zipserv``; there is no parameter. A new layer holds no table: use
    :meth:`from_embedding` or :meth:`from_ziptensor`, or load a state dict.

    Args:
        num_embeddings: rows of the table.
        embedding_dim: columns of the table.
        padding_idx: kept for those who read it; without gradients it has no effect.
        device: any device, ``"meta"`` included.
        dtype: ``torch.bfloat16`` or ``torch.float16``.

    Raises:
        TypeError: another dtype.
    """

    weight_zipserv: torch.Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        nn.Module.__init__(self)
        self._set(num_embeddings, embedding_dim, padding_idx, dtype, None, device)

    def _set(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None,
        dtype: torch.dtype,
        blob: torch.Tensor | None,
        device: torch.device | str | None = None,
    ) -> None:
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.max_norm = None
        self.norm_type = 2.0
        self.scale_grad_by_freq = False
        self.sparse = False
        self.weight_dtype = dtype
        self.register_blob("weight", (num_embeddings, embedding_dim), dtype, blob, device)

    @classmethod
    def from_ziptensor(cls, weight: ZipTensor, padding_idx: int | None = None) -> ZipEmbedding:
        """A layer over an existing compressed table ``(num_embeddings, embedding_dim)``; its bytes are shared.

        Raises:
            TypeError: ``weight`` is no ZipTensor.
            ValueError: it has not two dimensions.
        """
        if not isinstance(weight, ZipTensor):
            raise TypeError(f"expected a zipserv.ZipTensor, not {type(weight).__name__}")
        if weight.ndim != 2:
            raise ValueError(f"an embedding table has two dimensions, this one has the shape {tuple(weight.shape)}")
        layer = cls(weight.m, weight.k, padding_idx, device="meta", dtype=weight.dtype)
        layer.weight_zipserv = weight.blob
        return layer

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, weight: ZipTensor | None = None) -> ZipEmbedding:
        """The same layer with its table compressed.

        A subclass of ``nn.Embedding`` that adds to the lookup (a scale, say) and calls ``super().forward`` keeps what
        it adds.

        Args:
            embedding: the layer; one with ``max_norm`` changes its table in forward and can't be compressed.
            weight: its table, if it has been compressed already.

        Raises:
            TypeError: not an ``nn.Embedding``, or its table is not BF16 or FP16.
            ValueError: it has ``max_norm``.
        """
        if not isinstance(embedding, nn.Embedding) or isinstance(embedding, ZipEmbedding):
            raise TypeError(f"expected a torch.nn.Embedding, not {type(embedding).__name__}")
        if embedding.max_norm is not None:
            raise ValueError("an embedding with max_norm changes its table in forward: it can't be compressed")
        weight = compress(embedding.weight) if weight is None else weight
        if type(embedding) is nn.Embedding:
            return cls.from_ziptensor(weight, embedding.padding_idx).train(embedding.training)
        kind = _mixed(cls, type(embedding))
        layer = cast(ZipEmbedding, object.__new__(kind))
        _take_over(layer, embedding, without=("weight",))
        ZipEmbedding._set(layer, weight.m, weight.k, embedding.padding_idx, weight.dtype, weight.blob)
        return layer

    def to_embedding(self) -> nn.Embedding:
        """The plain layer with the decompressed table, equal to the original bit for bit."""
        kind: Any = nn.Embedding if type(self) is ZipEmbedding else type(self).__mro__[1]
        layer = cast(nn.Embedding, object.__new__(kind))
        _take_over(layer, self, without=("weight" + SUFFIX,))
        layer.weight = nn.Parameter(self.ziptensor.decompress(), requires_grad=False)
        return layer

    @property
    def ziptensor(self) -> ZipTensor:
        """The compressed table, over this layer's own bytes. Raises Error where none is loaded."""
        return self.get_ziptensor("weight")

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The table for code that looks at it: free for shape, dtype and device, decompressed for anything else."""
        blob, m, k = self.weight_zipserv, self.num_embeddings, self.embedding_dim
        if blob.is_meta or not blob.numel():
            return torch.empty((m, k), dtype=self.weight_dtype, device="meta")
        if torch.compiler.is_compiling():
            table: torch.Tensor = torch.ops.zipserv.decompress(blob, m, k, DTYPE_CODES[self.weight_dtype])
            return table
        return LazyWeight(blob, (m, k), (m, k), self.weight_dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError("the table of a ZipEmbedding is compressed and can't be set: use ZipEmbedding.from_embedding")
        super().__setattr__(name, value)

    def reset_parameters(self) -> None:
        """Not possible: a compressed table is never drawn anew. Raises Error."""
        raise Error("a compressed table can't be initialised anew: initialise an nn.Embedding, then from_embedding")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``input (...)``, integers -> ``(..., embedding_dim)``.

        Raises:
            IndexError: an index is outside the table (on the CPU; a GPU asserts, as it does for ``nn.Embedding``).
        """
        blob, m, k = self.weight_zipserv, self.num_embeddings, self.embedding_dim
        if blob.numel() == 0:
            raise Error("ZipEmbedding holds no table yet: load a state dict, or make it from a loaded layer")
        code = DTYPE_CODES[self.weight_dtype]
        if input.is_cuda and blob.is_cuda and not torch.compiler.is_compiling() and torch._C._get_tracing_state() is None:
            rows: torch.Tensor | None = ops.cuda_module().eager_embedding(input, blob, m, k, code)
            if rows is not None:
                return rows
        result: torch.Tensor = gather.embedding(input, blob, m, k, code)
        return result

    def extra_repr(self) -> str:
        blob = self.weight_zipserv
        size = f"{8 * blob.numel() / (self.num_embeddings * self.embedding_dim):.2f} bits/weight" if blob.numel() else "no table yet"
        return f"{self.num_embeddings}, {self.embedding_dim}, padding_idx={self.padding_idx}, dtype={self.weight_dtype}, {size}"


def _take_over(new: nn.Module, old: nn.Module, without: tuple[str, ...]) -> None:
    """Make ``new`` have all that ``old`` has but these tensors: for subclasses whose constructors we do not know."""
    ours = ("_blob_specs", "weight_dtype")
    new.__dict__.update({key: value for key, value in old.__dict__.items() if key not in ours})
    for kind in ("_parameters", "_buffers", "_modules"):
        new.__dict__[kind] = {name: value for name, value in old.__dict__[kind].items() if name not in without}
    new.__dict__["_non_persistent_buffers_set"] = set(old._non_persistent_buffers_set)


_mixtures: dict[tuple[type, type], type[Any]] = {}


def _mixed(zipped: type[ZipEmbedding], kind: type[nn.Embedding]) -> type[Any]:
    """``kind`` in front, so that its forward runs, and the compressed lookup where it calls ``super().forward``."""
    if (zipped, kind) not in _mixtures:
        members = {"weight": ZipEmbedding.weight, "__module__": __name__}
        _mixtures[zipped, kind] = type(f"Zip{kind.__name__}", (kind, zipped), members)
    return _mixtures[zipped, kind]
