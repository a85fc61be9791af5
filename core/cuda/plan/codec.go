// SPDX-License-Identifier: Apache-2.0

package plan

import "fmt"

const (
	decompressWarps  = 8
	decompressBlocks = 2 // a multiprocessor
)

// decompressSmem mirrors ZS_DECOMPRESS_SMEM of decompress.cu: each warp has a tile of its own.
func decompressSmem(warps int) int { return warps*tileData + 16 }

// Decompress plans the kernel that writes a blob out as a matrix.
func Decompress(d Device, m, k uint64) Kernel {
	warps := decompressWarps
	for decompressSmem(warps) > d.limit(decompressBlocks) && warps > 1 {
		warps /= 2
	}
	return Kernel{
		Source: "decompress.cu", Entry: "zs_decompress",
		Defines: []string{fmt.Sprintf("ZS_WARPS=%d", warps), fmt.Sprintf("ZS_BLOCKS=%d", decompressBlocks)},
		Grid:    clampGrid(ceilDiv(Tiles(m, k), uint64(warps))), PerSM: 16,
		Block: uint32(32 * warps), Smem: uint32(decompressSmem(warps)),
	}
}

func clampGrid(n uint64) uint32 { return uint32(min(max(n, 1), 1<<31-1)) }
