// SPDX-License-Identifier: Apache-2.0

// Package codec compresses and decompresses matrices of 16-bit weights in the format of docs/format.md. Compression is two passes: a Plan
// finds windows, counts and the checksum, and so the exact size; Encode then writes the blob. All calls use GOMAXPROCS goroutines, stop soon
// after their context is done, and never trust a blob: any bytes give a result or an error.
package codec

import (
	"context"
	"slices"
	"sync/atomic"

	"github.com/zipserv/zipserv/core/format"
)

// Plan is the outcome of the first pass. The weights must stay as they are until Encode has returned.
type Plan struct {
	header format.Header
	src    []byte
	grid   grid
	tiles  []tilePlan // nil when raw
	stats  Stats
}

// tilePlan is what the second pass must know of a tile.
type tilePlan struct {
	header   format.TileHeader
	literals uint16
}

func (t tilePlan) listSize() int {
	if t.header.Dense() {
		return format.DenseSize
	}
	return format.ListSize(int(t.header.EscCount), int(t.literals))
}

// NewPlan plans the compression of src, an m x k matrix of little-endian 16-bit weights, row-major and contiguous. shape is the tensor's
// own shape, of any 1 to 8 dimensions with the product m k.
func NewPlan(ctx context.Context, src []byte, dt format.DType, shape []uint64, m, k uint64) (*Plan, error) {
	p := &Plan{
		header: format.Header{DType: dt, Mode: format.Tiled, Shape: slices.Clone(shape), M: m, K: k},
		src:    src, grid: newGrid(m, k),
	}
	if err := p.header.Validate(); err != nil {
		return nil, err
	}
	if err := checkMatrix(src, m, k); err != nil {
		return nil, err
	}
	// Few weights in many tiles (a single row, say) cannot shrink whatever their values.
	if format.TiledSections(dt, m, k, 0).Total >= format.RawSize(m, k) {
		return p, p.planRaw(ctx)
	}
	p.tiles = make([]tilePlan, p.grid.tiles)
	var sum atomic.Uint32
	err := parallel(ctx, p.grid.tiles, tileGrain, func(s *scratch, lo, hi uint64) error {
		var part uint32
		for t := lo; t < hi; t++ {
			part += p.planTile(s, t)
		}
		sum.Add(part)
		return nil
	})
	if err != nil {
		return nil, err
	}
	p.header.Checksum = sum.Load()
	p.place()
	return p, nil
}

func (p *Plan) planRaw(ctx context.Context) (err error) {
	p.setRaw()
	p.header.Checksum, err = Checksum(ctx, p.src, p.header.M, p.header.K)
	return err
}

func (p *Plan) setRaw() {
	p.header.Mode, p.header.EscapeBytes, p.tiles = format.Raw, 0, nil
	p.stats = Stats{Weights: p.header.M * p.header.K, Bytes: format.RawSize(p.header.M, p.header.K)}
}

// planTile fills p.tiles[t] but for the offset, and returns the tile's checksum.
func (p *Plan) planTile(s *scratch, t uint64) uint32 {
	b, dt := p.grid.tile(t), p.header.DType
	s.factors(b.mb, b.kb)
	src, stride := p.src[b.offset:], p.grid.stride
	if !b.whole() || dt == format.FP16 {
		gather(&s.tile, src, stride, b.rows, b.cols)
		src, stride = s.tile[:], tileStride
	}
	sum, lowest, highest := kern.scan(s, src, stride, tileRows)
	if dt == format.FP16 {
		splitFP16(&s.tile, &s.low)
		_, lowest, highest = kern.scan(s, src, stride, tileRows)
	}
	w := s.chooseWindow(lowest, highest, tileWeights-b.rows*b.cols, dt.MaxBase())
	plan := tilePlan{header: format.TileHeader{EscCount: uint16(w.escapes), Base: w.base}, literals: uint16(w.literals)}
	if format.NeedsDense(w.escapes, w.literals) {
		plan = tilePlan{header: format.TileHeader{Flags: format.FlagDense}}
	}
	p.tiles[t] = plan
	return sum
}

// place gives every list its offset, or decides that the matrix stays raw.
func (p *Plan) place() {
	var units uint64
	st := Stats{Weights: p.header.M * p.header.K, Tiles: p.grid.tiles}
	for i := range p.tiles {
		t := &p.tiles[i]
		t.header.EscOffset = uint32(units)
		units += uint64(t.listSize() / format.EscapeUnit)
		st.Escapes += uint64(t.header.EscCount)
		st.Literals += uint64(t.literals)
		if t.header.Dense() {
			st.DenseTiles++
		}
	}
	p.header.EscapeBytes = units * format.EscapeUnit
	st.Bytes = p.header.Sections().Total
	// An offset has 32 bits; no matrix that shrinks comes near the limit unless it is of 10^11 weights.
	if st.Bytes >= format.RawSize(p.header.M, p.header.K) || units > 1<<32-1 {
		p.setRaw()
		return
	}
	p.stats = st
}

// Header is the header that Encode will write.
func (p *Plan) Header() format.Header { return p.header }

// Size is the size of the blob in bytes: at most 2 M K + 128.
func (p *Plan) Size() uint64 { return p.header.Sections().Total }

// Stats tells what the blob will hold.
func (p *Plan) Stats() Stats { return p.stats }

// Encode writes the blob to dst, which must be Size() bytes long. It fails if the weights have changed since NewPlan in a way
// that shows; a change that does not show is found by Check, since the checksum is that of the planned weights.
func (p *Plan) Encode(ctx context.Context, dst []byte) error {
	sec := p.header.Sections()
	if uint64(len(dst)) != sec.Total {
		return format.Argumentf("destination has %d bytes, the blob %d", len(dst), sec.Total)
	}
	expectLarge(dst)
	header := p.header.Marshal()
	copy(dst, header[:])
	if p.header.Mode == format.Raw {
		return copyParallel(ctx, dst[format.HeaderSize:], p.src)
	}
	clear(dst[sec.TileHeaders+sec.Tiles*format.TileHeaderSize : sec.Fixed])
	stream := p.header.DType == format.BF16 && streams(dst, format.FixedBF16)
	return parallel(ctx, sec.Tiles, tileGrain, func(s *scratch, lo, hi uint64) error {
		for t := lo; t < hi; t++ {
			if err := p.encodeTile(s, dst, sec, t, stream); err != nil {
				return err
			}
		}
		if stream {
			kern.fence()
		}
		return nil
	})
}

func (p *Plan) encodeTile(s *scratch, dst []byte, sec format.Sections, t uint64, stream bool) error {
	b, plan, dt := p.grid.tile(t), p.tiles[t], p.header.DType
	plan.header.Put(dst[sec.TileHeaders+t*format.TileHeaderSize:])
	fixed := dst[sec.Fixed+t*dt.FixedSize():][:dt.FixedSize()]
	list := dst[sec.Escapes+uint64(plan.header.EscOffset)*format.EscapeUnit:][:plan.listSize()]
	src, stride := p.src[b.offset:], p.grid.stride
	if !b.whole() || dt == format.FP16 {
		gather(&s.tile, src, stride, b.rows, b.cols)
		src, stride = s.tile[:], tileStride
	}
	if dt == format.FP16 {
		splitFP16(&s.tile, &s.low)
		s.encodeLow(fixed[format.LowBitmapOffset:])
	}
	to := fixed
	if stream {
		to = s.fixed[:]
	}
	kern.encode(s, to, src, stride, plan.header.Base)
	if plan.header.Dense() {
		clear(to[format.BitmapOffset:format.LowBitmapOffset])
	}
	if stream {
		kern.stream(fixed, tileStride, to, fixedBytes/tileStride)
	}
	if plan.header.Dense() {
		writeDense(list, src, stride)
		return nil
	}
	return s.writeEscapes(list, src, stride, plan, b.rows, b.cols)
}

// copyParallel copies in pieces of 1 MiB.
func copyParallel(ctx context.Context, dst, src []byte) error {
	const piece = 1 << 20
	n := uint64(len(src))
	return parallel(ctx, (n+piece-1)/piece, 1, func(_ *scratch, lo, hi uint64) error {
		copy(dst[lo*piece:min(hi*piece, n)], src[lo*piece:])
		return nil
	})
}
