# SPDX-License-Identifier: Apache-2.0
"""Keeps the tables of compiled kernels in docs/performance.md: `python kernels/sass/check.py` compares, `--write` writes them anew.

`--nvrtc .../libnvrtc.so.12` compiles every variant with another version and names those that spill or that ptxas has something to say of:
users have the NVRTC of their torch, and a kernel at the limit of its registers may fit with one version and not with the next.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import sass
from sass import ARCHITECTURES, REPO, Usage, Variant, ceilings, decode_core, nvrtc, usages, variants

PAGE = REPO / "docs" / "performance.md"
BEGIN, END = "<!-- kernels:begin -->", "<!-- kernels:end -->"  # between them: what --write generates


def _row(v: Variant, u: Usage) -> str:
    defines = " ".join(d.removeprefix("ZS_") for d in v.defines)
    return f"| {v.arch} | `{v.entry}` | {defines} | {v.block} | {v.smem} | {u.registers} | {u.spill_bytes} |"


def generate() -> str:
    lines = [
        f"Compiled by NVRTC {nvrtc().version}, every variant that the launch plans choose. Shared memory in bytes a block, registers a thread,",
        "spills in bytes a thread (any spill fails the tests).",
        "",
        "| architecture | kernel | variant | threads | shared memory | registers | spills |",
        "|---|---|---|---|---|---|---|",
        *(_row(v, u) for v, u in usages(variants()).items()),
        "",
        "The decode core (`decode32` in `kernels/format.cuh`) for 1024 weights, 32 in each lane of a warp: SASS instructions by pipe, and the",
        "ceiling that the tests hold it to. For sm_120 ptxas writes the four plain additions as IADD and not as IMAD, so they count as integer.",
        "",
        "| architecture | integer | ceiling | FMA pipe | ceiling |",
        "|---|---|---|---|---|",
        *(
            f"| {arch} | {decode_core(arch)['integer']} | {ceilings()[arch]['integer']} | {decode_core(arch)['fma']} | {ceilings()[arch]['fma']} |"
            for arch in ARCHITECTURES
        ),
    ]
    return "\n".join(lines) + "\n"


def current(page: Path = PAGE) -> str | None:
    """What stands between the markers; None without them."""
    text = page.read_text() if page.exists() else ""
    if BEGIN not in text or END not in text:
        return None
    return text.split(BEGIN, 1)[1].split(END, 1)[0].strip("\n") + "\n"


def same_compiler(text: str) -> bool:
    return f"NVRTC {nvrtc().version}," in text


def compilations(text: str) -> list[str]:
    """The part of the rows that no compiler version changes: architecture, kernel, variant, threads, shared memory."""
    return ["|".join(line.split("|")[:6]) for line in text.splitlines() if line.startswith("| sm_") and "`" in line]


def write(page: Path = PAGE) -> None:
    block = f"{BEGIN}\n{generate()}{END}"
    text = page.read_text() if page.exists() else "# Performance\n"  # not before: compiling takes minutes, in which someone may write
    if current(page) is None:
        text = text.rstrip("\n") + f"\n\n## Compiled kernels\n{block}\n"
    else:
        head, rest = text.split(BEGIN, 1)
        text = head + block + rest.split(END, 1)[1]
    page.write_text(text)


def other_version(library: Path) -> int:
    sass.library = library
    known, bad, skipped = [], 0, set()
    for v in variants():
        try:
            if v.arch not in skipped:
                known.append((v, sass.usage(v)))
        except RuntimeError as error:
            if "gpu-architecture" not in str(error):
                raise
            skipped.add(v.arch)  # younger than this NVRTC
    for v, u in known:
        if u.spill_bytes or u.warnings:
            bad += 1
            print(f"{v}: {u.spill_bytes} bytes spilled", *u.warnings, sep="\n  ")
    without = f" (it does not know {', '.join(sorted(skipped))})" if skipped else ""
    print(f"NVRTC {nvrtc().version}: {len(known)} variants, {bad} with spills or warnings{without}")
    return 1 if bad else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the tables into docs/performance.md")
    parser.add_argument("--nvrtc", type=Path, metavar="LIB", help="look for spills with this version instead")
    args = parser.parse_args()
    if args.nvrtc:
        return other_version(args.nvrtc)
    if args.write:
        write()
        return 0
    text = current()
    if text is None or (text != generate() if same_compiler(text) else compilations(text) != compilations(generate())):
        print(f"{PAGE}: the tables of compiled kernels are out of date: run python kernels/sass/check.py --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
