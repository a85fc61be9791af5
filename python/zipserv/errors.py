# SPDX-License-Identifier: Apache-2.0
"""The package's own exception, shared with the native library."""

from __future__ import annotations

from ._zipserv import Error

__all__ = ["Error"]
