# SPDX-License-Identifier: Apache-2.0
"""Devices as users name them."""

from __future__ import annotations

import torch

from .errors import Error

__all__ = ["named"]


def named(device: torch.device | str | int) -> torch.device:
    """The device that an argument names; of GPUs with its number.

    Raises:
        TypeError: it is no name of a device.
        ValueError: there is no such device, or none that zipserv runs on.
        Error: a GPU is asked for, and torch sees none.
    """
    if not isinstance(device, torch.device | str | int) or isinstance(device, bool):
        raise TypeError(f"device is a torch.device or a name ('cpu', 'cuda', 'cuda:1'), not {type(device).__name__}")
    if isinstance(device, int):
        device = f"cuda:{device}"
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"{device!r} is no device; 'cpu', 'cuda' and 'cuda:1' are") from error
    if found.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"{str(found)!r}: zipserv runs on 'cpu' and 'cuda'")
    if found.type != "cuda":
        return found
    if not torch.cuda.is_available():
        raise Error(f"{str(found)!r}: torch sees no GPU here; `zipserv doctor` says more, device='cpu' works without one")
    if found.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    if found.index >= torch.cuda.device_count():
        raise ValueError(f"{str(found)!r}: there are {torch.cuda.device_count()} GPUs here, numbered from 0")
    return found
