// SPDX-License-Identifier: Apache-2.0

package codec

import (
	"math"

	"github.com/x448/float16"

	"github.com/zipserv/zipserv/core/format"
)

// PanelRows is the number of rows of a panel: one row of block tiles.
const PanelRows = tileRows

// PanelDecoder decodes a matrix panel by panel for a matrix product on the CPU: rows 64 p .. 64 p + 63, all columns. It works in the
// caller's goroutine and allocates nothing after NewPanelDecoder, so that a product can run one decoder in each of its workers, each over a
// panel buffer that stays in the cache. A decoder serves one goroutine at a time; any number of them can share a View.
type PanelDecoder struct {
	v       *View
	scratch scratch
}

// NewPanelDecoder makes a decoder for v.
func NewPanelDecoder(v *View) *PanelDecoder { return &PanelDecoder{v: v} }

// Panels is the number of panels, ceil(M / 64).
func (v *View) Panels() uint64 { return (v.Header.M + tileRows - 1) / tileRows }

// Bits16 writes panel p in the matrix's own type, K elements a row, to dst, which needs room for 64 K elements (or for the rows that the
// last panel has). It returns the number of rows.
func (d *PanelDecoder) Bits16(p uint64, dst []byte) (int, error) {
	rows, err := d.rows(p, uint64(len(dst))/2)
	if err != nil {
		return 0, err
	}
	v := d.v
	if v.Header.Mode == format.Raw {
		size := uint64(rows) * 2 * v.Header.K
		copy(dst, v.blob[format.HeaderSize+p*tileRows*2*v.Header.K:][:size])
		return rows, nil
	}
	out := rowRange(p, rows, 0, dst, v.grid.stride)
	for kb := range v.grid.columns {
		if err := v.decodeTile(&d.scratch, p*v.grid.columns+kb, out); err != nil {
			return 0, err
		}
	}
	return rows, nil
}

// Float32 writes panel p as float32, which every weight fits into exactly, to dst, which needs room as in Bits16.
func (d *PanelDecoder) Float32(p uint64, dst []float32) (int, error) {
	rows, err := d.rows(p, uint64(len(dst)))
	if err != nil {
		return 0, err
	}
	v, k := d.v, int(d.v.Header.K)
	if v.Header.Mode == format.Raw {
		src := v.blob[format.HeaderSize+p*tileRows*2*v.Header.K:]
		widen(dst[:rows*k], src, v.Header.DType)
		return rows, nil
	}
	tile := d.scratch.out[:]
	for kb := range v.grid.columns {
		t := p*v.grid.columns + kb
		b := v.grid.tile(t)
		if err := v.decodeTile(&d.scratch, t, rowRange(p, rows, kb, tile, tileStride)); err != nil {
			return 0, err
		}
		for r := range rows {
			widen(dst[r*k+int(kb)*tileCols:][:b.cols], tile[r*tileStride:], v.Header.DType)
		}
	}
	return rows, nil
}

// rows checks the arguments and tells how many rows panel p has.
func (d *PanelDecoder) rows(p, room uint64) (int, error) {
	h := &d.v.Header
	if p >= d.v.Panels() {
		return 0, format.Argumentf("panel %d of %d", p, d.v.Panels())
	}
	n := min(tileRows, h.M-p*tileRows)
	if room < n*h.K {
		return 0, format.Argumentf("destination has room for %d weights, panel %d has %d", room, p, n*h.K)
	}
	return int(n), nil
}

func rowRange(p uint64, n int, kb0 uint64, dst []byte, stride int) rows {
	return rows{row0: p * tileRows, row1: p*tileRows + uint64(n), kb0: kb0, dst: dst, stride: stride}
}

// widen converts little-endian 16-bit weights.
func widen(dst []float32, src []byte, dt format.DType) {
	if dt == format.FP16 {
		for i := range dst {
			dst[i] = float16.Frombits(le.Uint16(src[2*i:])).Float32()
		}
		return
	}
	for i := range dst {
		dst[i] = math.Float32frombits(uint32(le.Uint16(src[2*i:])) << 16)
	}
}
