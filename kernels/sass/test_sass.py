# SPDX-License-Identifier: Apache-2.0
"""Every kernel variant compiles for every architecture without a spill, and the decode core stays within its instruction ceiling. Needs no GPU."""

from __future__ import annotations

import re

import pytest

import check
import nvrtc
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
    pair = {(v.arch, *v.defines[:2]) for v in sass.variants() if v.source == "zipgemm_pair.cu"}
    assert pair == {("sm_90a", f"ZS_N={n}", f"ZS_CLUSTER={cluster}") for n, cluster in ((256, 2), (192, 2), (128, 2), (256, 1), (192, 1))}
    assert [(v.arch, *v.defines[:2]) for v in sass.variants() if v.source == "zipgemm_relay.cu"] == [("sm_90a", "ZS_N=256", "ZS_GROUPS=2")]


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


CLUSTER = """
#define ZS_WGMMA 1
#include "ptx.cuh"
extern "C" __global__ void probe(const __grid_constant__ TensorMap map, float* y) {
    ZS_SMEM(smem_ptr);
    const uint32_t smem = smem_addr(smem_ptr), bar = smem + 65536;
    if (threadIdx.x == 0) mbarrier_init(bar, 1), mbarrier_init(bar + 8, 2), fence_mbarrier_init();
    cluster_arrive_relaxed();
    cluster_wait();
    if (threadIdx.x == 0) {
        mbarrier_wait(bar + 8, 1);
        mbarrier_arrive_expect_tx(bar, 65536);
        tensor_copy_multicast(smem + cluster_rank() * 32768, map, TensorRows{}, 0, cluster_rank() * 256, bar, 3);
    }
    mbarrier_wait(bar, 0);
    float acc[128] = {};
    wgmma_pin(acc);
    wgmma_fence();
    wgmma_m64k16_bf16<256>(acc, wgmma_descriptor(smem, 0), wgmma_descriptor(smem, 32768));
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_pin(acc);
    if (threadIdx.x < 2) mbarrier_arrive_cluster(bar + 8, threadIdx.x);
    for (int i = 0; i < 128; i++) y[threadIdx.x * 128 + i] = acc[i];
    cluster_sync();
}
"""


def test_cluster_instructions() -> None:
    """What ptx.cuh and wgmma.cuh have for clusters and wide products becomes the instructions that it names."""
    compiled = sass.nvrtc().compile("probe.cu", CLUSTER, sass.headers(), [*sass.OPTIONS, "-arch=sm_90a"])
    assert "warning" not in compiled.log, compiled.log
    text = nvrtc.disassemble(compiled.cubin)

    def count(instruction: str) -> int:
        return len(re.findall(instruction, text))

    assert count(r"UCGABAR_ARV") == count(r"UCGABAR_WAIT") == 2
    assert count(r"UTMALDG\.2D\.MULTICAST") == 1 and count(r"HGMMA\.64x256x16\.F32\.BF16") == 1
    assert count(r"SYNCS\.ARRIVE\.TRANS64\.RED") == 1
    # Only the last cluster_sync waits for all of memory, not an arrival at another block.
    assert count(r"MEMBAR\.ALL\.GPU") == 1
