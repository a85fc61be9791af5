# SPDX-License-Identifier: Apache-2.0
"""A progress bar on standard error; silent where nobody looks (no terminal, ``--json``, ``--quiet``)."""

from __future__ import annotations

import sys
from types import TracebackType

from tqdm import tqdm


class Bar:
    """Counts bytes: ``with Bar(total, "compress") as bar: bar.say(name); bar.step(nbytes)``."""

    def __init__(self, total: int, title: str, *, quiet: bool = False) -> None:
        self._title = title
        self._bar: tqdm[None] = tqdm(
            total=max(total, 1),
            desc=title,
            unit="B",
            unit_scale=True,
            leave=False,
            dynamic_ncols=True,
            disable=quiet or not sys.stderr.isatty(),
        )

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()

    def say(self, what: str) -> None:
        """Names what is being done now."""
        self._bar.set_description(f"{self._title} {what}")

    def step(self, nbytes: int) -> None:
        self._bar.update(nbytes)
