# SPDX-License-Identifier: Apache-2.0
"""What setuptools cannot know from pyproject.toml: how the native library is built, the wheel's tag, the Go modules of the sdist."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist
from setuptools.errors import BaseError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))
import native  # noqa: E402 (found by the line above)

ARCH = os.environ.get("ZIPSERV_ARCH") or platform.machine()


class BuildNative(build_ext):
    """Builds the one extension by Go."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        in_place = bool(self.inplace or self.editable_mode)
        try:
            native.build(output, portable=not in_place, arch=ARCH)
        except native.BuildError as error:
            raise BaseError(str(error)) from None
        native.install_header(ROOT / "python" / "zipserv" if in_place else output.parent)


class Wheel(bdist_wheel):
    """One wheel serves every CPython from 3.10 on; its platform is what the library was built for."""

    def get_tag(self) -> tuple[str, str, str]:
        glibc = native.GLIBC.replace(".", "_")
        name = f"manylinux_{glibc}_{ARCH}" if native.is_portable(ARCH) else f"linux_{ARCH}"
        return "cp310", "abi3", name


class Sdist(sdist):
    """Carries the Go modules that the library is built from, so that its build needs no module proxy."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        vendor = Path(base_dir).resolve() / "vendor"
        if (ROOT / "vendor").is_dir():
            shutil.copytree(ROOT / "vendor", vendor, dirs_exist_ok=True)
            return
        try:
            go = native.find_go()
        except native.BuildError as error:
            raise BaseError(str(error)) from None
        subprocess.run([go, "mod", "vendor", "-o", str(vendor)], cwd=ROOT, env=dict(os.environ, GOTOOLCHAIN="local"), check=True)


setup(
    version=native.version(),
    ext_modules=[Extension("zipserv._zipserv", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel, "sdist": Sdist},
)
