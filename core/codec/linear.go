// SPDX-License-Identifier: Apache-2.0

package codec

import (
	"context"
	"math"
	"sync"

	"github.com/zipserv/zipserv/core/format"
)

// Product is y = x W^T + bias with rows [Row0, Row1) of W, all of it BF16, with sums in FP32. Rows of x have K elements, rows of y have Row1 - Row0;
// they are `stride` elements apart.
type Product struct {
	Row0, Row1 uint64 // Row0 is a multiple of 64
	Tokens     uint64 // rows of x and y
	X          []byte
	XStride    uint64
	Y          []byte
	YStride    uint64
	Bias       []byte // 2 (Row1 - Row0) bytes, or nil
	Threads    int    // most threads that work on it; below 1: GOMAXPROCS
	// Team runs member on so many threads at once and returns when all are done, or returns false at once; nil: goroutines.
	Team func(threads int, member func()) bool
}

// products are the inner loops of View.Linear. The sums of a row of W and a token stand in `partials` places of that token's accumulator, which are
// added up at the end: so the order of additions depends on nothing but the weight's shape.
type products struct {
	name     string
	partials int
	few      uint64 // FewTokens

	// dot adds a tile in row-major order, 64 rows of 64 weights, times one row of x.
	dot func(acc []float32, tile *[tileBytes]byte, x []byte)

	// These three work on a compressed tile and never write its weights (nil: the tile is decoded, then dot). exps leaves the exponents in s.exps, patch
	// sets those of the escapes, multiply adds the products with `tokens` rows of x.
	exps     func(s *scratch, fixed []byte, base uint8)
	patch    func(s *scratch, l list, base uint8)
	multiply func(acc []float32, tokens int, s *scratch, fixed, x []byte, xStride int)
}

var portableProducts = products{name: "portable", partials: 8, dot: dotPortable}

// prod is the set in use: the fastest that this machine has.
var prod = bestProducts()

const (
	// A worker is started for every so many tiles: the time in which it starts.
	productGrain = 64
	// So many tokens are multiplied with a panel at a time: their sums stay in the first-level cache.
	productTokens = 16
)

// FewTokens is the number of tokens up to which Linear is faster, by measurement (docs/performance.md), than decompressing the weight and a product
// by a good library for uncompressed ones; 0 where it never is.
func FewTokens() uint64 { return prod.few }

// Linear writes x W^T + bias to y without ever decompressing more than a tile. A token's result has the same bits whatever other tokens there
// are and however many threads. W must be BF16.
func (v *View) Linear(ctx context.Context, p Product) error {
	h := &v.Header
	if err := p.check(h); err != nil {
		return err
	}
	if p.Tokens == 0 || p.Row0 == p.Row1 {
		return ctx.Err()
	}
	x, xStride := p.X, int(2*p.XStride)
	if h.K%tileCols != 0 { // the last tile needs zeros behind each row
		padded := padPool.Get().(*[]byte)
		defer padPool.Put(padded)
		stride := int(v.grid.columns) * tileStride
		*padded = resize(*padded, int(p.Tokens)*stride)
		x = *padded
		for t := range int(p.Tokens) {
			n := copy(x[t*stride:], p.X[t*xStride:][:2*h.K])
			clear(x[t*stride+n : (t+1)*stride])
		}
		xStride = stride
	}
	grain := max(1, productGrain/v.grid.columns)
	first := p.Row0 / tileRows
	panels := (p.Row1+tileRows-1)/tileRows - first
	return parallelOn(ctx, p.Threads, p.Team, panels, grain, func(s *scratch, lo, hi uint64) error {
		acc := accPool.Get().(*[]float32)
		defer accPool.Put(acc)
		for panel := lo; panel < hi; panel++ {
			for token := uint64(0); token < p.Tokens; token += productTokens {
				block := p
				block.Tokens = min(productTokens, p.Tokens-token)
				block.Y = p.Y[2*token*p.YStride:]
				if err := v.linearPanel(s, acc, &block, x[int(token)*xStride:], xStride, first+panel); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

func (p *Product) check(h *format.Header) error {
	if h.DType != format.BF16 {
		return format.Argumentf("the weight is %v; only BF16 is multiplied without decompressing it", h.DType)
	}
	const most = 1 << 40
	if p.Tokens >= most || p.XStride >= most || p.YStride >= most {
		return format.Argumentf("%d tokens with strides of %d and %d elements are more than can be", p.Tokens, p.XStride, p.YStride)
	}
	if p.Row0 > p.Row1 || p.Row1 > h.M || p.Row0%tileRows != 0 {
		return format.Argumentf("rows %d to %d of a matrix of %d rows; the first must be a multiple of %d", p.Row0, p.Row1, h.M, tileRows)
	}
	if p.Tokens == 0 || p.Row0 == p.Row1 {
		return nil
	}
	rows := p.Row1 - p.Row0
	for _, side := range []struct {
		name            string
		bytes           []byte
		stride, columns uint64
	}{{"x", p.X, p.XStride, h.K}, {"y", p.Y, p.YStride, rows}} {
		if side.stride < side.columns && p.Tokens > 1 {
			return format.Argumentf("%s: stride is %d elements, a row has %d", side.name, side.stride, side.columns)
		}
		if have := uint64(len(side.bytes)); have/2 < side.columns || p.Tokens > 1 && (have/2-side.columns)/(p.Tokens-1) < side.stride {
			return format.Argumentf("%s has %d bytes, fewer than %d rows of %d elements with a stride of %d need", side.name, have, p.Tokens, side.columns, side.stride)
		}
	}
	if p.Bias != nil && uint64(len(p.Bias)) != 2*rows {
		return format.Argumentf("bias has %d bytes, the result's rows %d", len(p.Bias), 2*rows)
	}
	return nil
}

// linearPanel makes 64 columns of y; x is padded to whole tiles.
func (v *View) linearPanel(s *scratch, room *[]float32, p *Product, x []byte, xStride int, panel uint64) error {
	tokens, partials := int(p.Tokens), prod.partials
	one := tileRows * partials
	*room = resize(*room, tokens*one)
	acc := *room
	clear(acc)
	raw := v.Header.Mode == format.Raw
	for kb := range v.grid.columns {
		from := x[kb*tileStride:]
		t := panel*v.grid.columns + kb
		if prod.multiply != nil && !raw {
			h, l, err := v.tileList(t)
			if err != nil {
				return format.InTile(t, err)
			}
			fixed := v.fixed(t)
			if l.dense != nil {
				denseExps(s, l.dense)
			} else {
				prod.exps(s, fixed, h.Base)
				prod.patch(s, l, h.Base)
			}
			prod.multiply(acc, tokens, s, fixed, from, xStride)
			continue
		}
		if err := v.plainTile(s, t); err != nil {
			return err
		}
		for i := range tokens {
			prod.dot(acc[i*one:], &s.out, from[i*xStride:][:tileStride])
		}
	}
	rows, column := int(min(tileRows, p.Row1-panel*tileRows)), panel*tileRows-p.Row0
	for i := range tokens {
		y := p.Y[2*(uint64(i)*p.YStride+column):][:2*rows]
		var bias []byte
		if p.Bias != nil {
			bias = p.Bias[2*column:][:2*rows]
		}
		finish(y, acc[i*one:][:rows*partials], partials, bias)
	}
	return nil
}

// plainTile leaves tile t in s.out, row-major; columns that the matrix does not have are zero.
func (v *View) plainTile(s *scratch, t uint64) error {
	b := v.grid.tile(t)
	if v.Header.Mode == format.Raw {
		gather(&s.out, v.blob[format.HeaderSize+b.offset:], v.grid.stride, b.rows, b.cols)
		return nil
	}
	if b.cols < tileCols {
		clear(s.out[:])
	}
	top := b.mb * tileRows
	return v.decodeTile(s, t, rows{row0: top, row1: top + uint64(b.rows), kb0: b.kb, dst: s.out[:], stride: tileStride})
}

// finish adds up each row's sums and the bias and rounds once.
func finish(y []byte, acc []float32, partials int, bias []byte) {
	for r := range len(y) / 2 {
		a := acc[r*partials:][:partials]
		sum := (a[0] + a[1]) + (a[2] + a[3])
		if partials == 8 {
			sum += (a[4] + a[5]) + (a[6] + a[7])
		}
		if bias != nil {
			sum += math.Float32frombits(uint32(le.Uint16(bias[2*r:])) << 16)
		}
		le.PutUint16(y[2*r:], roundBF16(sum))
	}
}

// roundBF16 rounds to the nearest, ties to even; a NaN stays one.
func roundBF16(x float32) uint16 {
	b := math.Float32bits(x)
	if x != x {
		return uint16(b>>16) | 0x40
	}
	return uint16((b + 0x7FFF + b>>16&1) >> 16)
}

func dotPortable(acc []float32, tile *[tileBytes]byte, x []byte) {
	var values [tileCols]float32
	for c := range values {
		values[c] = math.Float32frombits(uint32(le.Uint16(x[2*c:])) << 16)
	}
	for r := range tileRows {
		row := tile[r*tileStride:][:tileStride]
		sums := (*[8]float32)(acc[8*r:])
		for c := 0; c < tileCols; c += 8 {
			for i := range sums {
				sums[i] += math.Float32frombits(uint32(le.Uint16(row[2*(c+i):]))<<16) * values[c+i]
			}
		}
	}
}

// expPlaces is where the exponent of a position stands in s.exps after products.exps, by its lower 8 bits; the upper 4 are its own
// (asm/fused.go: expOrder).
var expPlaces = func() (table [256]uint8) {
	for p := range table {
		table[p] = uint8(p>>3&3<<6 | p>>6&3<<4 | p&1<<3 | p>>5&1<<2 | p>>1&3)
	}
	return table
}()

// denseExps is products.exps of a tile in dense mode.
func denseExps(s *scratch, dense []byte) {
	for p, e := range dense[:tileWeights] {
		s.exps[p&0xF00|int(expPlaces[p&0xFF])] = e
	}
}

// Room that a product needs and the next one takes over: none is made for each tile or panel.
var (
	accPool = sync.Pool{New: func() any { return new([]float32) }}
	padPool = sync.Pool{New: func() any { return new([]byte) }}
)

func resize[T any](b []T, n int) []T {
	if cap(b) < n {
		return make([]T, n)
	}
	return b[:n]
}
