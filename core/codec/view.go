// SPDX-License-Identifier: Apache-2.0

package codec

import (
	"context"

	"github.com/zipserv/zipserv/core/format"
)

// View reads a blob without copying it. Its sizes fit the bytes that are there; what the tiles say is checked when they are decoded, for
// safety, and completely by Check.
type View struct {
	Header format.Header
	sec    format.Sections
	blob   []byte
	grid   grid
}

// Parse checks the header and that the blob has just the size that the header says. It reads 128 bytes.
func Parse(blob []byte) (*View, error) {
	h, err := format.ParseHeader(blob)
	if err != nil {
		return nil, err
	}
	sec := h.Sections()
	if uint64(len(blob)) != sec.Total {
		return nil, format.Invalidf("%d bytes, but its header speaks of %d", len(blob), sec.Total)
	}
	return &View{Header: h, sec: sec, blob: blob, grid: newGrid(h.M, h.K)}, nil
}

func (v *View) tileHeader(t uint64) (format.TileHeader, error) {
	h := format.ReadTileHeader(v.blob[v.sec.TileHeaders+t*format.TileHeaderSize:])
	return h, h.Validate(v.Header.DType)
}

func (v *View) fixed(t uint64) []byte {
	n := v.Header.DType.FixedSize()
	return v.blob[v.sec.Fixed+t*n:][:n]
}

func (v *View) escapes() []byte { return v.blob[v.sec.Escapes:] }

// Decode writes the whole matrix, row-major, to dst of 2 M K bytes.
func (v *View) Decode(ctx context.Context, dst []byte) error {
	if uint64(len(dst)) != 2*v.Header.M*v.Header.K {
		return format.Argumentf("destination has %d bytes, the matrix %d", len(dst), 2*v.Header.M*v.Header.K)
	}
	return v.DecodeRows(ctx, 0, v.Header.M, dst, v.Header.K)
}

// DecodeRows writes rows [row0, row1) to dst, row after row, `stride` elements apart. Only the warp tiles that hold
// these rows are decoded.
func (v *View) DecodeRows(ctx context.Context, row0, row1 uint64, dst []byte, stride uint64) error {
	h := &v.Header
	if row0 > row1 || row1 > h.M {
		return format.Argumentf("rows %d to %d of a matrix of %d rows", row0, row1, h.M)
	}
	if row0 == row1 {
		return ctx.Err()
	}
	if stride < h.K || stride > 1<<40 {
		return format.Argumentf("stride is %d elements, a row has %d", stride, h.K)
	}
	if need := 2 * ((row1-row0-1)*stride + h.K); uint64(len(dst)) < need {
		return format.Argumentf("destination has %d bytes, %d rows of stride %d need %d", len(dst), row1-row0, stride, need)
	}
	expectLarge(dst)
	if h.Mode == format.Raw {
		return v.copyRows(ctx, row0, row1, dst, stride)
	}
	first := row0 / tileRows
	n := ((row1-1)/tileRows - first + 1) * v.grid.columns
	out := rows{row0: row0, row1: row1, dst: dst, stride: int(2 * stride)}
	out.stream = h.DType == format.BF16 && streams(dst, out.stride)
	return parallel(ctx, n, tileGrain, func(s *scratch, lo, hi uint64) error {
		for t := lo; t < hi; t++ {
			if err := v.decodeTile(s, first*v.grid.columns+t, out); err != nil {
				return err
			}
		}
		if out.stream {
			kern.fence()
		}
		return nil
	})
}

// rows is where decoded rows go.
type rows struct {
	row0, row1 uint64
	kb0        uint64 // the tile column that starts at dst
	dst        []byte
	stride     int  // bytes
	stream     bool // whole tiles go past the caches
}

// tileList is a tile's header and escape list.
func (v *View) tileList(t uint64) (format.TileHeader, list, error) {
	h, err := v.tileHeader(t)
	if err != nil {
		return h, list{}, err
	}
	l, err := readList(v.escapes(), h)
	return h, l, err
}

// decodeTile decodes the part of tile t that lies in out's rows.
func (v *View) decodeTile(s *scratch, t uint64, out rows) error {
	h, l, err := v.tileList(t)
	if err != nil {
		return format.InTile(t, err)
	}
	b := v.grid.tile(t)
	top := b.mb * tileRows
	r0 := int(max(out.row0, top) - top)
	r1 := int(min(out.row1-top, uint64(b.rows)))
	dst := out.dst[(top+uint64(r0)-out.row0)*uint64(out.stride)+(b.kb-out.kb0)*tileStride:]
	w0, w1 := r0/format.WarpRows, (r1+format.WarpRows-1)/format.WarpRows
	fixed := v.fixed(t)
	whole := b.cols == tileCols && r0 == 0 && r1 == tileRows
	if !(out.stream && whole) && v.Header.DType == format.BF16 && b.cols == tileCols && r0 == w0*format.WarpRows && r1 == w1*format.WarpRows {
		kern.decode(s, dst, out.stride, fixed, w0, w1, h.Base)
		if err := l.apply(dst, out.stride, r0, r1-r0, tileCols, h.Base); err != nil {
			return format.InTile(t, err)
		}
		return nil
	}
	kern.decode(s, s.tile[:], tileStride, fixed, w0, w1, h.Base)
	top0 := w0 * format.WarpRows
	if err := l.apply(s.tile[:], tileStride, top0, (w1-w0)*format.WarpRows, tileCols, h.Base); err != nil {
		return format.InTile(t, err)
	}
	if v.Header.DType == format.FP16 {
		s.decodeLow(fixed[format.LowBitmapOffset:], w0, w1)
		joinFP16(&s.tile, &s.low, (w1-w0)*format.WarpRows)
	}
	if out.stream && whole {
		kern.stream(dst, out.stride, s.tile[:], tileRows)
		return nil
	}
	scatter(dst, out.stride, &s.tile, r0-top0, r1-r0, b.cols)
	return nil
}

// copyRows is DecodeRows of a raw blob.
func (v *View) copyRows(ctx context.Context, row0, row1 uint64, dst []byte, stride uint64) error {
	size := 2 * v.Header.K
	src := v.blob[format.HeaderSize+row0*size : format.HeaderSize+row1*size]
	if stride == v.Header.K {
		return copyParallel(ctx, dst[:len(src)], src)
	}
	grain := max(1, (1<<20)/size)
	return parallel(ctx, row1-row0, grain, func(_ *scratch, lo, hi uint64) error {
		for r := lo; r < hi; r++ {
			copy(dst[2*r*stride:][:size], src[r*size:])
		}
		return nil
	})
}
