// SPDX-License-Identifier: Apache-2.0

package codec

import (
	"context"
	"math"
	"sync"

	"github.com/zipserv/zipserv/core/format"
)

// Stats tells what a blob holds.
type Stats struct {
	Weights    uint64
	Tiles      uint64 // block tiles; 0 when raw
	Escapes    uint64 // listed; tiles in dense mode have none
	Literals   uint64 // escapes with a byte of their own
	DenseTiles uint64
	Bytes      uint64 // the whole blob
}

// BitsPerWeight is the blob's size, header included, per weight.
func (s Stats) BitsPerWeight() float64 { return 8 * float64(s.Bytes) / float64(s.Weights) }

// Histogram counts the exponent fields of src, little-endian 16-bit weights; an odd last byte is not counted.
func Histogram(src []byte, dt format.DType) [256]uint64 {
	var total [256]uint64
	if !dt.Valid() {
		return total
	}
	var mu sync.Mutex
	const piece = 1 << 20
	n := uint64(len(src) / 2 * 2)
	// The context is never done and the work never fails.
	_ = parallel(context.Background(), (n+piece-1)/piece, 1, func(s *scratch, lo, hi uint64) error {
		var part [256]uint64
		for o := lo * piece; o < min(hi*piece, n); o += tileBytes {
			b := src[o:min(o+tileBytes, n)]
			exps := s.exps[:len(b)/2]
			for i := range exps {
				exps[i] = dt.Exponent(le.Uint16(b[2*i:]))
			}
			histogram(&s.work.hist, exps)
			for e, c := range s.work.hist {
				part[e] += uint64(c)
			}
		}
		mu.Lock()
		defer mu.Unlock()
		for e, c := range part {
			total[e] += c
		}
		return nil
	})
	return total
}

// EntropyBound is the bits a weight needs at least when its exponent is coded by its own frequency alone and sign and mantissa are kept
// as they are: their 8 bits (FP16: 11) plus the entropy of the exponents. No codec that treats weights one by one gets below.
func EntropyBound(hist *[256]uint64, dt format.DType) float64 {
	var n float64
	for _, c := range hist {
		n += float64(c)
	}
	entropy := 0.0
	for _, c := range hist {
		if c > 0 {
			entropy -= float64(c) / n * math.Log2(float64(c)/n)
		}
	}
	return float64(plainBits(dt)) + entropy
}

func plainBits(dt format.DType) int {
	if dt == format.FP16 {
		return 11
	}
	return 8
}

// SevenCodeSize is the size in bytes that the same m x k weights would have in the layout of the paper that the method is from: one window of
// seven consecutive exponents for the whole tensor, three bits a weight of which the eighth code is the escape, sign and mantissa of the
// weights in the window, and all 16 bits of each weight outside it; two 32-bit offsets for each 64x64 tile (padded as here) and the
// base exponent. The window is the best one, which is generous to that layout.
func SevenCodeSize(hist *[256]uint64, dt format.DType, m, k uint64) uint64 {
	const codes = 7
	var n, covered, best uint64
	for e, c := range hist {
		n += c
		covered += c
		if e >= codes {
			covered -= hist[e-codes]
		}
		best = max(best, covered)
	}
	t := format.TileCount(m, k)
	padding := t*tileWeights - m*k
	bits := t*tileWeights*format.Planes + (best+padding)*uint64(plainBits(dt)) + (n-best)*16
	return (bits+7)/8 + t*8 + 1
}
