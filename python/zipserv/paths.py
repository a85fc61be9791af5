# SPDX-License-Identifier: Apache-2.0
"""Where the native library and its C header lie: `python -m zipserv.paths [--include | --library]`."""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["include_dir", "library_path"]

_PACKAGE = Path(__file__).resolve().parent


def include_dir() -> Path:
    """Folder of the C header `zipserv.h`, for a compiler's -I."""
    return _PACKAGE / "include"


def library_path() -> Path:
    """The native library, for a linker or dlopen; C programs need no Python beside it."""
    return _PACKAGE / "_zipserv.abi3.so"


def main(arguments: list[str]) -> int:
    """Prints the paths that were asked for, one a line; both without an option."""
    known = {"--include": include_dir(), "--library": library_path()}
    unknown = [a for a in arguments if a not in known]
    if unknown:
        print(f"zipserv.paths: unknown option {unknown[0]}; known are {' and '.join(known)}", file=sys.stderr)
        return 2
    for name in arguments or known:
        print(known[name])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
