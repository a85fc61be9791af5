// SPDX-License-Identifier: Apache-2.0

package plan

import "fmt"

// variant is a layout of one of the matrix kernels: everything but the number of tokens. The order in which a token's sums are formed
// follows from mw, kw and the grid.
type variant struct {
	mw, kw int // consumers (warps, or warpgroups of the wgmma kernel) side by side in m and in k
}

// blocksPerSM is one for both kernels: a block takes what an SM has of registers.
const blocksPerSM = 1

// xStages is how many tiles of activations are under way. More would take shared memory from the L1 cache, through which the weights come.
const xStages = 2

// family is one of the matrix kernels.
type family struct {
	source, entry string
	threads       func(v variant) int
	smem          func(v variant, tokens uint64) int // ZS_GEMM_SMEM; a test compares it with the source
}

// mma serves few tokens on every device.
var mma = family{
	source: "zipgemm_mma.cu", entry: "zs_zipgemm_mma",
	threads: func(v variant) int { return 32 * v.mw * v.kw },
	smem: func(v variant, tokens uint64) int {
		return v.mw*v.kw*8192 + v.kw*xStages*int(tokens)*144 + v.kw*xStages*16 + 16
	},
}

// wgmma serves compute capability 9.0.
var wgmma = family{
	source: "zipgemm_wgmma.cu", entry: "zs_zipgemm_wgmma",
	threads: func(v variant) int { return 128 * v.mw * v.kw },
	smem: func(v variant, tokens uint64) int {
		return v.mw*v.kw*2*8192 + v.kw*xStages*int(tokens)*128 + v.kw*xStages*16
	},
}

// limit is the dynamic shared memory that each of the blocks of an SM may have.
func (d Device) limit(blocks int) int {
	const reserved = 1024 // of every block, by the driver
	return min(d.SmemBlock, d.SmemSM/blocks-reserved)
}

func (f family) fits(d Device, v variant, tokens uint64) bool {
	return f.smem(v, tokens) <= d.limit(blocksPerSM)
}

// units is the work of a problem in steps of a block: mw strips of 64 rows by kw column tiles.
func (v variant) units(m, k uint64) uint64 {
	return ceilDiv(ceilDiv(m, tileSide), uint64(v.mw)) * ceilDiv(ceilDiv(k, tileSide), uint64(v.kw))
}

// score orders layouts of the mma kernel as measurements do: the longest run of a block, and what a step costs.
func (v variant) score(d Device, m, k uint64) uint64 {
	return ceilDiv(v.units(m, k), uint64(d.SMs*blocksPerSM)) * uint64(v.mw*v.kw+6)
}

// best is the layout with the least score among those that serve up to the given number of tokens.
func best(d Device, list []variant, m, k, tokens uint64) (variant, error) {
	var chosen variant
	least := uint64(0)
	for _, v := range list {
		if !mma.fits(d, v, tokens) {
			continue
		}
		if s := v.score(d, m, k); chosen.mw == 0 || s < least {
			chosen, least = v, s
		}
	}
	if chosen.mw == 0 {
		return chosen, fmt.Errorf("a block of this GPU has %d bytes of shared memory, too little for the matrix kernel", d.SmemBlock)
	}
	return chosen, nil
}

// launch plans one launch for up to `tokens` tokens, for which the family is compiled.
func (f family) launch(d Device, v variant, m, k, tokens uint64) Linear {
	grid := uint32(min(uint64(d.SMs*blocksPerSM), v.units(m, k)))
	return Linear{
		Kernel: Kernel{
			Source: f.source, Entry: f.entry,
			Defines: []string{
				fmt.Sprintf("ZS_N=%d", tokens), fmt.Sprintf("ZS_MW=%d", v.mw), fmt.Sprintf("ZS_KW=%d", v.kw),
				fmt.Sprintf("ZS_XSTAGES=%d", xStages), fmt.Sprintf("ZS_BLOCKS=%d", blocksPerSM),
			},
			Grid: grid, Resident: blocksPerSM, Block: uint32(f.threads(v)), Smem: uint32(f.smem(v, tokens)),
			Programmatic: d.Capability >= 90,
		},
		Tokens:    tokens,
		Workspace: uint64(grid) * uint64(v.mw) * tileSide * tokens * 4,
	}
}
