// SPDX-License-Identifier: Apache-2.0

package codec

import "github.com/zipserv/zipserv/core/format"

const (
	tileRows    = format.TileRows
	tileCols    = format.TileCols
	tileWeights = format.TileWeights
	tileStride  = 2 * tileCols
	tileBytes   = 2 * tileWeights
	fixedBytes  = format.FixedBF16
	maxDim      = format.MaxDim
)

// grid walks the block tiles of an M x K matrix that lies row-major in memory.
type grid struct {
	m, k    uint64
	columns uint64 // tiles in a row of tiles
	tiles   uint64
	stride  int // bytes from row to row
}

func newGrid(m, k uint64) grid {
	return grid{m: m, k: k, columns: (k + tileCols - 1) / tileCols, tiles: format.TileCount(m, k), stride: int(2 * k)}
}

// block is one tile's place: offset in bytes, and how many of its rows and columns are weights and not padding.
type block struct {
	mb, kb     uint64
	offset     uint64
	rows, cols int
}

func (b block) whole() bool { return b.rows == tileRows && b.cols == tileCols }

func (g grid) tile(t uint64) block {
	mb, kb := t/g.columns, t%g.columns
	return block{
		mb: mb, kb: kb, offset: mb*tileRows*uint64(g.stride) + kb*tileStride,
		rows: int(min(tileRows, g.m-mb*tileRows)), cols: int(min(tileCols, g.k-kb*tileCols)),
	}
}

// gather copies the weights of an edge tile into a padded tile.
func gather(dst *[tileBytes]byte, src []byte, stride, rows, cols int) {
	if rows < tileRows || cols < tileCols {
		clear(dst[:])
	}
	for r := range rows {
		copy(dst[r*tileStride:r*tileStride+2*cols], src[r*stride:])
	}
}

// scatter copies rows [r0, r0+rows) and the first cols columns of a tile out of it.
func scatter(dst []byte, stride int, src *[tileBytes]byte, r0, rows, cols int) {
	for r := range rows {
		copy(dst[r*stride:r*stride+2*cols], src[(r0+r)*tileStride:])
	}
}
