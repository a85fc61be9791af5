// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"fmt"
	"slices"
)

// Limits of moe.cu.
const (
	RoutePairs   = 4096 // most pairs (a token and one of its experts) of a launch
	RouteExperts = 1024 // most experts of a layer
	CombineTop   = 32   // most experts of a token
)

const (
	routeThreads   = 1024
	combineThreads = 128
)

// GroupedTiles are the numbers of pairs of one expert that the grouped product is compiled for.
var GroupedTiles = classes[:4]

// GatedTile is the largest of them with gates: ptxas would spill with 64, where a launch saved matters least.
const GatedTile = 32

// Grouped plans the product with the experts that a router chose, each M x K, `tile` pairs at a time. The layout, and with it the order of a pair's sums, is the same for
// every tile. gated: the upper half of the rows are gates of the lower half. The grid is all blocks that fit: how much work there is only the device knows.
func Grouped(d Device, m, k, tile uint64, invariant, gated bool) (Linear, error) {
	if m == 0 || k == 0 {
		return Linear{}, fmt.Errorf("a product needs M and K of at least 1, got %d and %d", m, k)
	}
	if gated && tile > GatedTile {
		return Linear{}, fmt.Errorf("the grouped product takes %d pairs at a time with gates, not %d", GatedTile, tile)
	}
	if !slices.Contains(GroupedTiles, tile) {
		return Linear{}, fmt.Errorf("the grouped product takes %v pairs at a time, not %d", GroupedTiles, tile)
	}
	for _, v := range layouts(d) {
		if !mma.fits(d, v, mma.tokens) || gated && v.mw%2 != 0 {
			continue
		}
		grid := uint32(d.SMs * blocksPerSM)
		whole, half, gates := 0, 0, 0
		if gated {
			gates = 1
		}
		if invariant {
			whole = 1
		}
		if tile == 64 && d.Capability != 80 && d.Capability < 120 { // there ptxas would spill, on 12.0 with some versions of NVRTC
			half = 1
		}
		defines := []string{
			fmt.Sprintf("ZS_N=%d", tile), fmt.Sprintf("ZS_MW=%d", v.mw), fmt.Sprintf("ZS_KW=%d", v.kw), fmt.Sprintf("ZS_WHOLE=%d", whole), fmt.Sprintf("ZS_HALF=%d", half),
			fmt.Sprintf("ZS_GATED=%d", gates),
		}
		return Linear{
			Kernel: Kernel{
				Source: "zipgemm_grouped.cu", Entry: "zs_zipgemm_grouped", Defines: append(defines, mma.defines(v, tile)...),
				Grid: grid, Resident: blocksPerSM, Block: uint32(mma.threads(v, tile)), Smem: uint32(mma.smem(v, tile)), Programmatic: d.Capability >= 90,
			},
			Tokens:    tile,
			Workspace: uint64(grid) * uint64(v.mw) * tileSide * tile * 4,
		}, nil
	}
	return Linear{}, fmt.Errorf("a block of this GPU has %d bytes of shared memory, too little for the matrix kernel", d.SmemBlock)
}

// Route plans the kernel that turns a router's choice into what the grouped product reads.
func Route(d Device) Kernel {
	return Kernel{
		Source: "moe.cu", Entry: "zs_moe_route", Grid: 1, Block: routeThreads, Smem: 4*RoutePairs + 8*routeThreads, Programmatic: d.Capability >= 90,
	}
}

// RoutingWords is the 32-bit words that Route's kernel writes.
func RoutingWords(pairs uint64) uint64 { return 4 + 6*pairs }

// Combine plans the kernel that adds up what a token's experts gave. Its grid is CombineBlocks by tokens.
func Combine(d Device) Kernel {
	return Kernel{Source: "moe.cu", Entry: "zs_moe_combine", Grid: 1, Block: combineThreads, Smem: 65 * 4, Programmatic: d.Capability >= 90}
}

// CombineBlocks is the blocks for one token of M values.
func CombineBlocks(m uint64) uint32 { return uint32(ceilDiv(m, 8*combineThreads)) }
