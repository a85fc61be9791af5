# SPDX-License-Identifier: Apache-2.0
"""Every kernel variant compiles for every architecture without a spill, and the decode core stays within its instruction ceiling. Needs no GPU."""

from __future__ import annotations

import pytest

import check
import sass


@pytest.mark.parametrize("arch", sass.ARCHITECTURES)
def test_variants_compile_without_spills(arch: str) -> None:
    mine = [v for v in sass.variants() if v.arch == arch]
    assert {v.source for v in mine} >= {"compress.cu", "decompress.cu", "gather.cu", "zipgemm_mma.cu"}
    for v, u in sass.usages(mine).items():
        assert u.spill_bytes == 0 and u.stack_bytes == 0, f"{v}: {u.spill_bytes} bytes of spills, {u.stack_bytes} of stack"
        assert not u.warnings, f"{v}: {u.warnings}"
        # A block must fit: 64 Ki registers a multiprocessor, given out in units of 8 a thread.
        assert -(-u.registers // 8) * 8 * v.block <= 65536, f"{v}: {u.registers} registers x {v.block} threads"


@pytest.mark.parametrize("arch", sass.ARCHITECTURES)
def test_decode_core_within_ceiling(arch: str) -> None:
    core, ceiling = sass.decode_core(arch), sass.ceilings()[arch]
    assert core["integer"] <= ceiling["integer"], core
    assert core["fma"] <= ceiling["fma"], core
    assert core["memory"] == 7, f"the probe loads three and stores four vectors, but has {core}"
    assert core.get("other", 0) == 0, core


def test_every_source_is_compiled() -> None:
    """No .cu file escapes the checks: each is in a launch plan."""
    assert {p.name for p in sass.KERNELS.glob("*.cu")} == {v.source for v in sass.variants()}


def test_page_is_current() -> None:
    text = check.current()
    assert text is not None, "docs/performance.md has no markers: run python kernels/sass/check.py --write"
    new = check.generate()
    if check.same_compiler(text):
        assert text == new, "run python kernels/sass/check.py --write"
    else:
        assert check.compilations(text) == check.compilations(new), "run python kernels/sass/check.py --write"


def test_pipes() -> None:
    for opcode, pipe in {
        "LOP3.LUT": "integer", "PRMT": "integer", "SHF.R.U32.HI": "integer", "IADD3": "integer", "VIADD": "integer",
        "IMAD.SHL.U32": "fma", "FFMA": "fma", "LDS.128": "memory", "STG.E.128": "memory", "POPC": "other", "EXIT": "control", "UMOV": "uniform",
    }.items():
        assert sass.pipe(opcode) == pipe, opcode
