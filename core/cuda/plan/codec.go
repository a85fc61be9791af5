// SPDX-License-Identifier: Apache-2.0

package plan

import "fmt"

const (
	decompressWarps  = 4
	decompressBlocks = 5 // a multiprocessor
)

// decompressSmem mirrors ZS_DECOMPRESS_SMEM of decompress.cu: each warp has a tile of its own.
func decompressSmem(warps int) int { return warps * (tileData + spareBytes) }

// Decompress plans the kernel that writes rows of a blob out as a matrix: a warp for each tile. (Blocks that stay and take more of them are slower, 3.3
// against 3.9 TB/s on an H200: what they write drifts apart.)
func Decompress(d Device, rows, k uint64) Kernel {
	smem, blocks := decompressSmem(decompressWarps), decompressBlocks
	for smem > d.limit(blocks) && blocks > 1 {
		blocks--
	}
	return Kernel{
		Source: "decompress.cu", Entry: "zs_decompress",
		Defines: []string{fmt.Sprintf("ZS_WARPS=%d", decompressWarps), fmt.Sprintf("ZS_BLOCKS=%d", blocks)},
		Grid:    clampGrid(ceilDiv(Tiles(rows, k), decompressWarps)),
		Block:   32 * decompressWarps, Smem: uint32(smem), Programmatic: d.Capability >= 90,
	}
}

// Compression is the three launches of a compression; plan and write share their grid of Blocks.
type Compression struct {
	Plan, Scan, Write Kernel
	Blocks            uint32
}

const (
	compressWarps  = 4
	compressBlocks = 4 // a multiprocessor
	compressRounds = 2 // tiles a warp: fewer make the scan longer, more let the blocks drift apart
)

// The shared memory of compress.cu's kernels: ZS_PLAN_SMEM, ZS_WRITE_SMEM, ZS_SCAN_SMEM.
func compressSmem(warps int) (plan, write, scan int) {
	return warps * (256 + 1040 + 16), warps * (4096 + 512 + 1024), 256
}

// Compress plans the kernels that write a blob.
func Compress(d Device, m, k uint64) Compression {
	planSmem, writeSmem, scanSmem := compressSmem(compressWarps)
	blocks := uint32(compressGrid(Tiles(m, k)))
	kernel := func(entry string, grid, block uint32, smem int) Kernel {
		return Kernel{
			Source: "compress.cu", Entry: entry,
			Defines: []string{fmt.Sprintf("ZS_WARPS=%d", compressWarps), fmt.Sprintf("ZS_BLOCKS=%d", compressBlocks)},
			Grid:    grid, Block: block, Smem: uint32(smem),
		}
	}
	scan := kernel("zs_compress_scan", 1, 1024, scanSmem)
	scan.Programmatic = d.Capability >= 90
	return Compression{
		Plan:   kernel("zs_compress_plan", blocks, 32*compressWarps, planSmem),
		Scan:   scan,
		Write:  kernel("zs_compress_write", blocks, 32*compressWarps, writeSmem),
		Blocks: blocks,
	}
}

// CompressScratch is the bytes of device memory that a compression needs beside the blob.
func CompressScratch(m, k uint64) uint64 {
	tiles := Tiles(m, k)
	return 16 + ceilDiv(8*compressGrid(tiles), 16)*16 + 8*tiles
}

func compressGrid(tiles uint64) uint64 {
	return min(ceilDiv(tiles, compressRounds*compressWarps), 1<<31-1)
}

const gatherThreads = 128

// Gather plans the kernel that looks up rows of a table. Its grid is GatherBlocks.
func Gather(d Device, fp16 bool) Kernel {
	variant := 0
	if fp16 {
		variant = 1
	}
	return Kernel{
		Source: "gather.cu", Entry: "zs_gather", Defines: []string{fmt.Sprintf("ZS_FP16=%d", variant)},
		Grid: 1, Block: gatherThreads, Smem: gatherThreads / 4 * 2 * tileSide, Programmatic: d.Capability >= 90,
	}
}

// GatherTokens is the most tokens of one launch: the kernel counts pieces, a token's part of a tile each, in 32 bits.
func GatherTokens(k uint64) uint64 { return (1<<32 - 1) / ceilDiv(k, tileSide) }

// GatherPieces is the work of a lookup, and the blocks that do it.
func GatherPieces(tokens, k uint64) (pieces uint64, blocks uint32) {
	pieces = tokens * ceilDiv(k, tileSide)
	return pieces, uint32(ceilDiv(pieces, gatherThreads/4))
}

func clampGrid(n uint64) uint32 { return uint32(min(max(n, 1), 1<<31-1)) }
