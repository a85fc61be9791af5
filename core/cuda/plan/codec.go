// SPDX-License-Identifier: Apache-2.0

package plan

import "fmt"

// Shape of the decompression kernel: a warp works on a tile of its own, with a ring of stages of its own.
const (
	decompressWarps  = 4
	decompressStages = 2
)

// Decompress plans the kernel that writes a blob out as a matrix.
func Decompress(d Device, m, k uint64) Kernel {
	warps := uint64(decompressWarps)
	smem := decompressWarps * (tileData + decompressStages*tileBytes + 128)
	for smem > d.SmemBlock && warps > 1 {
		warps /= 2
		smem = int(warps) * (tileData + decompressStages*tileBytes + 128)
	}
	return Kernel{
		Source: "decompress.cu", Entry: "zs_decompress",
		Defines: []string{fmt.Sprintf("ZS_WARPS=%d", warps), fmt.Sprintf("ZS_STAGES=%d", decompressStages)},
		Grid:    clampGrid(ceilDiv(Tiles(m, k), warps)), PerSM: 16,
		Block: uint32(32 * warps), Smem: uint32(smem),
	}
}

func clampGrid(n uint64) uint32 { return uint32(min(max(n, 1), 1<<31-1)) }
