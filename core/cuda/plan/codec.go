// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"fmt"
	"math"
)

const (
	decompressWarps  = 4
	decompressBlocks = 5 // a multiprocessor
)

// decompressSmem mirrors ZS_DECOMPRESS_SMEM of decompress.cu: each warp has a tile of its own.
func decompressSmem(warps int) int { return warps * (tileData + spareBytes) }

// Decompress plans the kernel that writes rows of a blob out as a matrix: a warp for each tile. (Blocks that stay and take more of them are slower on large
// matrices, 3.3 against 3.9 TB/s on an H200: what they write drifts apart.) Where the GPU would be full less than twice, the blocks of the second time would leave it
// nearly empty: there blocks stay.
func Decompress(d Device, rows, k uint64) Kernel {
	smem := decompressSmem(decompressWarps)
	blocks := d.blocks(smem, decompressBlocks)
	grid, full := ceilDiv(Tiles(rows, k), decompressWarps), uint64(d.SMs*blocks)
	if grid < 2*full {
		grid = min(grid, full)
	}
	return Kernel{
		Source: "decompress.cu", Entry: "zs_decompress",
		Defines: []string{fmt.Sprintf("ZS_WARPS=%d", decompressWarps), fmt.Sprintf("ZS_BLOCKS=%d", blocks)},
		Grid:    clampGrid(grid),
		Block:   32 * decompressWarps, Smem: uint32(smem), Programmatic: d.Capability >= 90,
	}
}

// Compression is the two launches of a compression.
type Compression struct {
	Sample, Write Kernel
	Samples       uint32 // tiles that Sample plans
}

const (
	compressWarps   = 4  // of a block have a tile
	manyWarps       = 12 // the same for large matrices
	compressSamples = 1024
	compressLook    = 128 // ZS_LOOK of compress.cu
)

// compressSmem mirrors ZS_SAMPLE_SMEM and ZS_COMPRESS_SMEM of compress.cu.
func compressSmem(warps int) (sample, write int) {
	const counts = 1040
	board := 20*warps + 12 // what its warps tell each other
	return warps * (tileData + counts + 16), warps*(2*tileData+512+counts) + board
}

// Compress plans the kernels that write a blob. Blocks of four warps with tiles stay, up to three on a multiprocessor, or one of twelve, whose tiles stand side
// by side, so that its reads are longer: that takes large matrices, as smaller blocks end more evenly.
func Compress(d Device, m, k uint64) Compression {
	tiles, warps := Tiles(m, k), uint64(compressWarps)
	if _, smem := compressSmem(manyWarps); smem <= d.limit(1) && tiles >= 16*manyWarps*uint64(d.SMs) {
		warps = manyWarps
	}
	sampleSmem, writeSmem := compressSmem(int(warps))
	blocks := d.blocks(writeSmem, manyWarps/int(warps))
	samples := min(tiles, compressSamples)
	kernel := func(entry string, tiles, threads uint64, smem int) Kernel {
		return Kernel{
			Source: "compress.cu", Entry: entry,
			Defines: []string{fmt.Sprintf("ZS_WARPS=%d", warps), fmt.Sprintf("ZS_BLOCKS=%d", blocks)},
			Grid:    clampGrid(ceilDiv(tiles, warps)), Block: uint32(threads), Smem: uint32(smem),
		}
	}
	c := Compression{
		Sample:  kernel("zs_compress_sample", samples, 32*warps, sampleSmem),
		Write:   kernel("zs_compress", tiles, 32*(warps+1), writeSmem), // the last warp looks back
		Samples: uint32(samples),
	}
	c.Write.PerSM = uint32(blocks) // which stay and take tiles in order
	return c
}

// CompressScratch is the bytes of device memory that a compression needs beside the blob, of which all but the first 16 are to be cleared.
func CompressScratch(m, k uint64) uint64 {
	return 32 + 8*ceilDiv(ceilDiv(Tiles(m, k), compressWarps), compressLook)*compressLook
}

// Room is the escape bytes to allocate for, from what the lists of the sampled tiles take: their sum, in units of 16 bytes, and the sum of their squares.
// It is the sum where every tile was sampled, else the mean and six standard errors, and a little for what no sample showed. False: that much is uncertain
// that a hundredth of the blob could stay unused, so the lists are to be counted first.
func (c Compression) Room(m, k, sum, squares uint64) (escapeBytes uint64, certain bool) {
	tiles, n := Tiles(m, k), uint64(c.Samples)
	if tiles == n {
		return 16 * sum, true
	}
	mean := float64(sum) / float64(n)
	deviation := math.Sqrt(max(0, float64(squares)/float64(n)-mean*mean))
	spare := 6*deviation/math.Sqrt(float64(n)) + 1.0/32
	return 16 * uint64(math.Ceil((mean+spare)*float64(tiles))), 16*spare < 5632.0/100
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
