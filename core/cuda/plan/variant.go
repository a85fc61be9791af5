// SPDX-License-Identifier: Apache-2.0

package plan

import "fmt"

// variant is a layout of one of the matrix kernels: everything but the number of tokens. The order in which a token's sums are formed
// follows from mw, kw and the grid.
type variant struct {
	mw, kw int // consumer warps side by side in m and in k; of the wgmma kernel the tiles of a unit
}

// blocksPerSM is one for both kernels: a block takes what an SM has of registers.
const blocksPerSM = 1

// family is one of the matrix kernels. What a launch of it looks like follows from a layout and the number of tokens that it is compiled for.
type family struct {
	source, entry string
	tokens        uint64 // most of a launch
	tensor        bool   // activations come by tensor copies: x has to be aligned to 16 bytes
	threads       func(v variant, tokens uint64) int
	smem          func(v variant, tokens uint64) int // ZS_GEMM_SMEM; a test compares it with the source
	defines       func(v variant, tokens uint64) []string
}

// mma serves few tokens on every device.
var mma = family{
	source: "zipgemm_mma.cu", entry: "zs_zipgemm_mma", tokens: 64,
	threads: func(v variant, _ uint64) int { return 32 * v.mw * v.kw },
	smem: func(v variant, tokens uint64) int {
		return v.mw*v.kw*(tileData+spareBytes) + v.kw*mmaXStages*(int(tokens)*144+16)
	},
	defines: func(variant, uint64) []string {
		return []string{fmt.Sprintf("ZS_XSTAGES=%d", mmaXStages), fmt.Sprintf("ZS_BLOCKS=%d", blocksPerSM)}
	},
}

// mmaXStages is how many tiles of activations are under way. More would take shared memory from the L1 cache, through which the weights come.
const mmaXStages = 2

// wgmma serves up to 128 tokens on compute capability 9.0.
var wgmma = family{
	source: "zipgemm_wgmma.cu", entry: "zs_zipgemm_wgmma", tokens: 128, tensor: true,
	threads: func(v variant, tokens uint64) int {
		r := rolesOf(v, tokens)
		return int(ceilDiv(uint64(128+32*r.decoders+32), 128) * 128)
	},
	smem: func(v variant, tokens uint64) int {
		r := rolesOf(v, tokens)
		return r.stages*tileData + r.xstages*v.kw*int(tokens)*128 + (r.stages+r.xstages)*16 + r.decoders*spareBytes
	},
	defines: func(v variant, tokens uint64) []string {
		r := rolesOf(v, tokens)
		return []string{
			fmt.Sprintf("ZS_DECODERS=%d", r.decoders), fmt.Sprintf("ZS_STAGES=%d", r.stages), fmt.Sprintf("ZS_XSTAGES=%d", r.xstages),
			fmt.Sprintf("ZS_SPREAD=%d", r.spread),
		}
	},
}

// roles is how the warps and the shared memory of a block of the wgmma kernel are dealt out. No result depends on it.
type roles struct {
	decoders int // warps
	stages   int // decoded tiles in the ring
	xstages  int // units of activations in theirs
	spread   int // clocks between the first loads of one decoder and of the next
}

// rolesOf is what measured best: as many decoders as the consumers' sums leave registers for, and eight columns of activations.
func rolesOf(v variant, tokens uint64) roles {
	r := roles{decoders: 11, stages: 16, xstages: 8 / v.kw} // a ring that is hardly longer than there are decoders makes them wait for each other
	if tokens > 64 {                                        // what is left of the L1 cache is too little for the first loads of all decoders at once
		r.spread = 48
		if v.mw == 2 { // the runs are long: fewer activations for it
			r.xstages = 6
		} else {
			r.stages = 12
		}
	}
	return r
}

// limit is the dynamic shared memory that each of the blocks of an SM may have.
func (d Device) limit(blocks int) int {
	const reserved = 1024 // of every block, by the driver
	return min(d.SmemBlock, d.SmemSM/blocks-reserved)
}

// blocks is how many blocks with that much shared memory an SM has room for: one at least, `most` at most.
func (d Device) blocks(smem, most int) int {
	for smem > d.limit(most) && most > 1 {
		most--
	}
	return most
}

func (f family) fits(d Device, v variant, tokens uint64) bool {
	return f.smem(v, tokens) <= d.limit(blocksPerSM)
}

// units is the work of a problem in steps of a block: mw strips of 64 rows by kw column tiles.
func (v variant) units(m, k uint64) uint64 {
	return v.groups(m) * ceilDiv(ceilDiv(k, tileSide), uint64(v.kw))
}

// dealing is how the grid of a launch is chosen (docs/performance.md, "What is not multiplication", "In step" and "What a narrow product waits for on the H200").
type dealing struct {
	percent uint64 // how much longer runs of whole strips may be than equal ones of all blocks
	units   uint64 // or how many units longer than the runs that are taken otherwise
	whole   bool   // the runs taken otherwise are equal in whole units, where that leaves no more than a tenth of the blocks out, and
	longer  uint64 // makes them at most so many percent longer
}

// dealingOf: partial sums are in proportion to the tokens. Up to sameTokens a token's sums are the same without the batch-invariant mode.
func dealingOf(f family, v variant, p Problem, tokens uint64) dealing {
	switch {
	case !f.tensor:
		return dealing{percent: 2}
	case p.Invariant || tokens <= sameTokens:
		return dealing{percent: 2, whole: true}
	case v == wideLayout:
		return dealing{units: 20, whole: true, longer: 10}
	}
	how := dealing{percent: 20, units: 6, whole: true}
	if tokens > 64 {
		how.longer = 10
	}
	return how
}

const sameTokens = 32

// runDefines is what a launch defines for runs that begin anywhere in k; where strips divide well it changes nothing but, in step, the order of a token's sums. Blocks that wait
// for each other at the end of their runs have runs that differ: a gain for 33 to 64 tokens, and nothing for fewer or more (docs/performance.md, "What a narrow product waits
// for on the H200"). Or blocks go through k in step: a gain where activations are many and each block brings them for one strip ("In step").
func runDefines(f family, v variant, p Problem, tokens uint64) []string {
	switch {
	case !f.tensor || v != tensorLayout || p.Invariant || tokens <= sameTokens:
		return nil
	case tokens <= 64:
		return []string{"ZS_ANYWHERE_LEAD=1"}
	}
	return []string{"ZS_IN_STEP=1"}
}

// grid is the number of blocks: all that fit, or fewer if their runs then end with strips, so that fewer partial sums travel, or are equal in whole units.
func (v variant) grid(d Device, m, k uint64, how dealing) uint32 {
	all, even := v.resident(d, m, k), v.even(d, m, k)
	units := v.units(m, k)
	shortest, run := ceilDiv(units, uint64(all)), ceilDiv(units, uint64(even))
	if 100*run <= (100+how.percent)*shortest {
		return even
	}
	if how.whole {
		if n := uint32(largestDivisor(units, uint64(all))); 10*n >= 9*all && 100*(units/uint64(n)) <= (100+how.longer)*shortest {
			all, shortest = n, units/uint64(n)
		}
	}
	if run <= shortest+how.units {
		return even
	}
	return all
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
func (f family) launch(d Device, v variant, p Problem, tokens uint64) Linear {
	grid := v.grid(d, p.M, p.K, dealingOf(f, v, p, tokens))
	defines := append([]string{fmt.Sprintf("ZS_N=%d", tokens), fmt.Sprintf("ZS_MW=%d", v.mw), fmt.Sprintf("ZS_KW=%d", v.kw)}, f.defines(v, tokens)...)
	defines = append(defines, runDefines(f, v, p, tokens)...)
	l := Linear{
		Kernel: Kernel{
			Source: f.source, Entry: f.entry,
			Defines: append(defines, p.gates()...),
			Grid:    grid, Resident: blocksPerSM, Block: uint32(f.threads(v, tokens)), Smem: uint32(f.smem(v, tokens)),
			Programmatic: d.Capability >= 90,
		},
		Tokens:    tokens,
		Workspace: uint64(grid) * uint64(v.mw) * tileSide * tokens * 4,
	}
	if f.tensor {
		l.TensorRows = uint32(tokens)
	}
	return l
}
