# SPDX-License-Identifier: Apache-2.0
"""The stream on which weights are copied to a GPU beside the computation."""

from __future__ import annotations

from typing import Any

import torch

from . import _zipserv
from .errors import Error

# The engine's side streams: it fills its workspaces on the first, once each; copies have the second.
_COPIES = 1
_CUDA: Any = torch.cuda  # torch's streams are not typed


def copy_stream(device: torch.device) -> Any:
    """The native engine's stream for copies to a CUDA device, as a torch stream; one of torch's where the engine does not serve the device."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    try:
        handle = _zipserv.cuda_side_stream(index, _COPIES)
    except Error:
        return _CUDA.Stream(device)
    return _CUDA.ExternalStream(handle, device=torch.device("cuda", index))


def forget(blobs: list[torch.Tensor]) -> None:
    """Tell the engine that blobs on GPUs have new bytes: the next product with each waits for all work before it."""
    for blob in blobs:
        if not blob.is_cuda:
            continue
        try:
            _zipserv.cuda_changed(blob.get_device(), blob.data_ptr())
        except Error:
            return  # a device that the engine does not serve
