# SPDX-License-Identifier: Apache-2.0
"""The build backend: setuptools, plus the tool chains that this machine lacks as build requirements.

A wheel is built by zig for glibc 2.17 and later whatever the machine has, so that its manylinux tag is true; setting CC to a compiler
of one's own leaves zig out and gives the tag linux_<arch>. An editable install takes the system's C compiler if there is one.
"""

from __future__ import annotations

from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401 (these names are what makes a build backend)
    build_editable,
    build_sdist,
    build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

import native

Settings = dict[str, Any] | None


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *native.needed(portable=True)]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *native.needed()]


def get_requires_for_build_sdist(config_settings: Settings = None) -> list[str]:
    return [*build_meta.get_requires_for_build_sdist(config_settings), *([] if native.system_go() else [native.GO_PACKAGE])]
