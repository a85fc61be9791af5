# SPDX-License-Identifier: Apache-2.0
"""The library as a C program sees it: builds tests/c against zipserv.h and the library, and runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import native
import zipserv.paths

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = zipserv.paths.library_path()


def compilers() -> list[list[str]]:
    """The system's C compiler and the one of the package ziglang, those that are there."""
    found = [native.find_cc(False, os.uname().machine)]
    zig = native.find_zig()
    if zig and found[0][0] != zig:
        found.append([zig, "cc"])
    return found


@pytest.mark.parametrize("cc", compilers(), ids=lambda cc: Path(cc[0]).name)
def test_c_program(cc: list[str], tmp_path: Path) -> None:
    program = tmp_path / "test_zipserv"
    flags = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread"]
    source = ROOT / "tests" / "c" / "test_zipserv.c"
    subprocess.run(
        [*cc, *flags, f"-I{zipserv.paths.include_dir()}", str(source), str(LIBRARY), f"-Wl,-rpath,{LIBRARY.parent}", "-o", str(program)],
        check=True,
    )
    # Every symbol is bound at the start, so that one that only Python has would be missed at once.
    env = dict(os.environ, LD_BIND_NOW="1", LD_LIBRARY_PATH="")
    done = subprocess.run([str(program)], env=env, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "all passed\n"), done.stdout + done.stderr


def test_header_is_valid_cpp(tmp_path: Path) -> None:
    source = tmp_path / "use.cc"
    source.write_text('#include "zipserv.h"\nint main() { return zs_version()[0] == 0; }\n')
    cc = native.find_cc(False, os.uname().machine)
    include = f"-I{zipserv.paths.include_dir()}"
    subprocess.run([*cc, "-x", "c++", "-c", "-Wall", "-Werror", include, str(source), "-o", str(tmp_path / "use.o")], check=True)


def test_paths_tells_where_things_are() -> None:
    out = subprocess.run([sys.executable, "-m", "zipserv.paths"], check=True, capture_output=True, text=True).stdout.split()
    assert [Path(p).exists() for p in out] == [True, True]
    assert (Path(out[0]) / "zipserv.h").read_text() == (ROOT / "capi" / "zipserv.h").read_text()
    assert subprocess.run([sys.executable, "-m", "zipserv.paths", "--nonsense"], capture_output=True).returncode == 2
