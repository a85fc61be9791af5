// SPDX-License-Identifier: Apache-2.0

package plan

import "fmt"

// variant is a layout of one of the matrix kernels: everything but the number of tokens. The order in which a token's sums are formed
// follows from mw, kw and the grid, which is why no N may change them.
type variant struct {
	mw, kw  int // consumers (warps, or warpgroups of the wgmma kernel) side by side in m and in k
	blocks  int // a multiprocessor
	stages  int // most stages of weights; only the wgmma kernel has them
	xstages int // most stages of activations
}

// family is one of the matrix kernels.
type family struct {
	source, entry string
	classes       []uint64 // numbers of tokens that it is compiled for
	minStages     int
	threads       func(v variant) int
	smem          func(v variant, tokens uint64) int // ZS_GEMM_SMEM; a test compares it with the source
}

const minXStages = 2

// mma serves few tokens on every device.
var mma = family{
	source: "zipgemm_mma.cu", entry: "zs_zipgemm_mma",
	classes: []uint64{8, 16, 32, 64},
	threads: func(v variant) int { return 32 * v.mw * v.kw },
	smem: func(v variant, tokens uint64) int {
		return v.mw*v.kw*8192 + v.kw*v.xstages*int(tokens)*144 + v.kw*v.xstages*16 + 16
	},
}

// wgmma serves compute capability 9.0.
var wgmma = family{
	source: "zipgemm_wgmma.cu", entry: "zs_zipgemm_wgmma",
	classes:   []uint64{8, 16, 32, 64, 128, 256},
	minStages: 2,
	threads:   func(v variant) int { return 128*v.mw*v.kw + 32 },
	smem: func(v variant, tokens uint64) int {
		groups := v.mw * v.kw
		const stage = tileBytes + 2*128 + 16
		return groups*2*8192 + v.xstages*v.kw*int(tokens)*128 + groups*v.stages*stage + (groups*v.stages+v.kw*v.xstages)*16
	},
}

// limit is the dynamic shared memory that each of the blocks of an SM may have.
func (d Device) limit(blocks int) int {
	const reserved = 1024 // of every block, by the driver
	return min(d.SmemBlock, d.SmemSM/blocks-reserved)
}

// fit gives up stages until the variant fits; false where it never does.
func (f family) fit(d Device, v variant, tokens uint64) (variant, bool) {
	for {
		if f.smem(v, tokens) <= d.limit(v.blocks) {
			return v, true
		}
		switch {
		case v.stages > f.minStages && v.stages >= v.xstages:
			v.stages--
		case v.xstages > minXStages:
			v.xstages--
		case v.stages > f.minStages:
			v.stages--
		default:
			return v, false
		}
	}
}

// first is the first of the variants that serves up to the given number of tokens.
func (f family) first(d Device, list []variant, tokens uint64) (variant, error) {
	for _, v := range list {
		if _, fits := f.fit(d, v, tokens); fits {
			return v, nil
		}
	}
	return variant{}, fmt.Errorf("a block of this GPU has %d bytes of shared memory, too little for %s", d.SmemBlock, f.source)
}

func (f family) class(n uint64) uint64 {
	for _, c := range f.classes {
		if n <= c {
			return c
		}
	}
	return f.classes[len(f.classes)-1]
}

// launch plans one launch for up to `tokens` tokens, a class of the family.
func (f family) launch(d Device, v variant, m, k, tokens uint64) (Linear, error) {
	v, fits := f.fit(d, v, tokens)
	if !fits {
		return Linear{}, fmt.Errorf("%s for %d tokens does not fit on this GPU", f.source, tokens)
	}
	units := ceilDiv(ceilDiv(m, tileSide), uint64(v.mw)) * ceilDiv(ceilDiv(k, tileSide), uint64(v.kw))
	grid := uint32(min(uint64(d.SMs*v.blocks), units))
	defines := []string{
		fmt.Sprintf("ZS_N=%d", tokens), fmt.Sprintf("ZS_MW=%d", v.mw), fmt.Sprintf("ZS_KW=%d", v.kw),
		fmt.Sprintf("ZS_XSTAGES=%d", v.xstages), fmt.Sprintf("ZS_BLOCKS=%d", v.blocks),
	}
	if f.minStages > 0 {
		defines = append(defines, fmt.Sprintf("ZS_STAGES=%d", v.stages))
	}
	return Linear{
		Kernel: Kernel{
			Source: f.source, Entry: f.entry, Defines: defines, Grid: grid, Resident: uint32(v.blocks),
			Block: uint32(f.threads(v)), Smem: uint32(f.smem(v, tokens)),
		},
		Tokens:    tokens,
		Workspace: partialBytes(v, grid, tokens),
	}, nil
}

func partialBytes(v variant, grid uint32, tokens uint64) uint64 {
	return uint64(grid) * uint64(v.mw) * tileSide * tokens * 4
}
