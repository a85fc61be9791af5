// SPDX-License-Identifier: Apache-2.0

package plan

import "fmt"

const (
	decompressWarps  = 4
	decompressBlocks = 5 // a multiprocessor
)

// decompressSmem mirrors ZS_DECOMPRESS_SMEM of decompress.cu: each warp has a tile of its own.
func decompressSmem(warps int) int { return warps*tileData + 16 }

// Decompress plans the kernel that writes rows of a blob out as a matrix.
func Decompress(d Device, rows, k uint64) Kernel {
	warps := decompressWarps
	for decompressSmem(warps) > d.limit(decompressBlocks) && warps > 1 {
		warps /= 2
	}
	return Kernel{
		Source: "decompress.cu", Entry: "zs_decompress",
		Defines: []string{fmt.Sprintf("ZS_WARPS=%d", warps), fmt.Sprintf("ZS_BLOCKS=%d", decompressBlocks)},
		Grid:    clampGrid(ceilDiv(Tiles(rows, k), uint64(warps))), PerSM: 16,
		Block: uint32(32 * warps), Smem: uint32(decompressSmem(warps)),
	}
}

// Compression is the three launches of a compression; plan and write share their grid, warps is the number of warps in it.
type Compression struct {
	Plan, Scan, Write Kernel
	Warps             uint32
	Scratch           uint64 // bytes
}

const (
	compressWarps  = 8
	compressBlocks = 2 // a multiprocessor
)

// The shared memory of compress.cu's kernels: ZS_PLAN_SMEM, ZS_WRITE_SMEM, ZS_SCAN_SMEM.
func compressSmem(warps int) (plan, write, scan int) { return warps * 8 * 260 * 4, warps * 1024, 256 }

// Compress plans the kernels that write a blob.
func Compress(d Device, m, k uint64) Compression {
	warps := compressWarps
	for {
		if p, _, _ := compressSmem(warps); p <= d.limit(compressBlocks) || warps == 1 {
			break
		}
		warps /= 2
	}
	tiles := Tiles(m, k)
	planSmem, writeSmem, scanSmem := compressSmem(warps)
	blocks := uint32(min(ceilDiv(tiles, uint64(warps)), uint64(d.SMs*compressBlocks)))
	kernel := func(entry string, grid, block uint32, smem int) Kernel {
		return Kernel{
			Source: "compress.cu", Entry: entry, Defines: []string{fmt.Sprintf("ZS_WARPS=%d", warps), fmt.Sprintf("ZS_BLOCKS=%d", compressBlocks)},
			Grid: grid, Block: block, Smem: uint32(smem),
		}
	}
	all := uint64(blocks) * uint64(warps)
	return Compression{
		Plan:    kernel("zs_compress_plan", blocks, uint32(32*warps), planSmem),
		Scan:    kernel("zs_compress_scan", 1, 1024, scanSmem),
		Write:   kernel("zs_compress_write", blocks, uint32(32*warps), writeSmem),
		Warps:   uint32(all),
		Scratch: 16 + ceilDiv(8*all, 16)*16 + 8*tiles,
	}
}

func clampGrid(n uint64) uint32 { return uint32(min(max(n, 1), 1<<31-1)) }
