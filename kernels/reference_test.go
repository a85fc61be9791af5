// SPDX-License-Identifier: Apache-2.0

package kernels_test

import (
	"encoding/binary"
	"math"
	"math/rand/v2"

	"github.com/zipserv/zipserv/core/format"
)

// An encoder written from docs/format.md alone, slow and plain. It always writes the tiled form, which the codec does only where that is
// smaller, and so lets kernels run on matrices of any shape and any content.

var le = binary.LittleEndian

type matrix struct {
	m, k int
	w    []uint16
}

func (x matrix) bytes() []byte { return halves(x.w) }

func halves(w []uint16) []byte {
	b := make([]byte, 2*len(w))
	for i, v := range w {
		le.PutUint16(b[2*i:], v)
	}
	return b
}

func fromHalves(b []byte) []uint16 {
	w := make([]uint16, len(b)/2)
	for i := range w {
		w[i] = le.Uint16(b[2*i:])
	}
	return w
}

func exponent(w uint16) int { return int(w >> 7 & 0xFF) }

// bestBase is the smallest base whose window holds the most of the weights.
func bestBase(weights []uint16) int {
	var hist [256]int
	for _, w := range weights {
		hist[exponent(w)]++
	}
	best, most := 0, -1
	for b := 0; b <= 248; b++ {
		n := 0
		for e := b; e < b+8; e++ {
			n += hist[e]
		}
		if n > most {
			best, most = b, n
		}
	}
	return best
}

// encodeTiled writes the blob of a BF16 matrix.
func encodeTiled(x matrix) []byte {
	rt, ct := (x.m+63)/64, (x.k+63)/64
	tiles := rt * ct
	heads, fixed := make([]byte, (8*tiles+127)/128*128), make([]byte, tiles*5632)
	var escapes []byte
	for t := range tiles {
		part := fixed[t*5632 : (t+1)*5632]
		head := format.TileHeader{EscOffset: uint32(len(escapes) / 16)}
		list := encodeTile(x, t/ct*64, t%ct*64, part, &head)
		escapes = append(escapes, list...)
		head.Put(heads[8*t:])
	}
	h := format.Header{DType: format.BF16, Mode: format.Tiled, Shape: []uint64{uint64(x.m), uint64(x.k)}, M: uint64(x.m), K: uint64(x.k),
		EscapeBytes: uint64(len(escapes)), Checksum: checksum(x)}
	hb := h.Marshal()
	blob := append([]byte{}, hb[:]...)
	return append(append(append(blob, heads...), fixed...), escapes...)
}

func encodeTile(x matrix, row0, col0 int, part []byte, head *format.TileHeader) []byte {
	var weights []uint16
	var present [4096]bool
	var tile [4096]uint16
	for r := range min(64, x.m-row0) {
		for c := range min(64, x.k-col0) {
			w := x.w[(row0+r)*x.k+col0+c]
			tile[r*64+c], present[r*64+c] = w, true
			weights = append(weights, w)
		}
	}
	base := bestBase(weights)
	var literals, others []byte
	var literal []byte
	for p, w := range tile {
		d := exponent(w) - base
		switch {
		case !present[p] || d >= 0 && d < 8:
		case d < 0 && d >= -12:
			others = le.AppendUint16(others, uint16(p|(-1-d)<<12))
		case d >= 8 && d < 11:
			others = le.AppendUint16(others, uint16(p|(d+4)<<12))
		default:
			literals = le.AppendUint16(literals, uint16(p|15<<12))
			literal = append(literal, byte(exponent(w)))
		}
	}
	list := append(append(literals, others...), literal...)
	dense := len(list) > 4096
	if dense {
		list = make([]byte, 4096)
		for p, w := range tile {
			list[p] = byte(exponent(w))
		}
		head.Flags = format.FlagDense
		base = 0
	} else {
		head.EscCount, head.Base = uint16((len(literals)+len(others))/2), byte(base)
	}
	for len(list)%16 != 0 {
		list = append(list, 0)
	}
	for p, w := range tile {
		r, c := p/64, p%64
		warp, f := r/16, r%16/8*8+c/8
		chunk, lane := f/4, f%4*8+r%8
		n := 8*chunk + c%8
		pair, h := n/2, n%2
		half := w & 0x807F
		if pair >= 8 {
			half = half<<8 | half>>8
		}
		q := pair % 8
		words := part[warp*1024+q/4*512+lane*16+q%4*4+2*h:]
		le.PutUint16(words, le.Uint16(words)|half) // pair q+8 has its bits where pair q has none
		code := exponent(w) - base
		if !present[p] || dense || code < 0 || code > 7 {
			code = 0
		}
		for k := range 3 {
			at := part[4096+warp*384+k*128+lane*4:]
			le.PutUint32(at, le.Uint32(at)|uint32(code>>k&1)<<(16*h+(pair+k)%16))
		}
	}
	return list
}

// checksum is that of section 7.
func checksum(x matrix) uint32 {
	var sum uint32
	for r := range x.m {
		a := uint32(r)
		a ^= a >> 16
		a *= 0x7FEB352D
		a ^= a >> 15
		a *= 0x846CA68B
		a ^= a >> 16
		for c := range x.k {
			b := int32(int16(uint32(c)*0x9E3779B1>>16 | 1))
			sum += (a | 1) * uint32(b) * uint32(int32(int16(x.w[r*x.k+c])))
		}
	}
	return sum
}

func bf16(f float64) uint16 { // round to nearest even
	u := math.Float32bits(float32(f))
	return uint16((u + 0x7FFF + u>>16&1) >> 16)
}

func fromBF16(w uint16) float64 { return float64(math.Float32frombits(uint32(w) << 16)) }

// kinds of matrices, by how the weights of a tile are distributed.
var kinds = map[string]func(rng *rand.Rand, r, c int) uint16{
	"gaussian": func(rng *rand.Rand, _, _ int) uint16 { return bf16(rng.NormFloat64() * 0.02) },
	"outliers": func(rng *rand.Rand, _, _ int) uint16 { // some 3 % escapes, some of them literals
		if rng.IntN(32) == 0 {
			return uint16(rng.Uint32())
		}
		return bf16(rng.NormFloat64() * 0.02)
	},
	"random": func(rng *rand.Rand, _, _ int) uint16 { return uint16(rng.Uint32()) }, // dense tiles
	"mixed": func(rng *rand.Rand, r, c int) uint16 { // empty, sparse, long and dense lists side by side
		switch (r/64 + c/64) % 4 {
		case 0:
			return 0x3F80 | uint16(rng.IntN(64))
		case 1:
			return bf16(rng.NormFloat64() * 0.02)
		case 2:
			return bf16(math.Exp(2*rng.NormFloat64()) * (float64(rng.IntN(2)) - 0.5))
		}
		return uint16(rng.Uint32())
	},
	// Every position of a tile is an escape in some tile, beside few others.
	"every position": func(_ *rand.Rand, r, c int) uint16 {
		tile, p := r/64*31+c/64*17, r%64*64+c%64
		if p%61 == tile%61 {
			return uint16([]int{0, 80, 111, 119, 130, 132, 200, 255}[(p+tile)%8])<<7 | uint16(p&0x7F) | uint16(p&1)<<15
		}
		return uint16(120+p%8)<<7 | uint16(p*13&0x7F)
	},
	// Finite and near 1, for products.
	"moderate": func(rng *rand.Rand, _, _ int) uint16 {
		if rng.IntN(40) == 0 {
			return bf16(math.Exp(3*rng.NormFloat64()) * (float64(rng.IntN(2)) - 0.5))
		}
		return bf16(rng.NormFloat64())
	},
	// Finite too, with tiles of every sort side by side: few escapes, dense, long lists. A lost escape is far too large and shows in a product.
	"tiles": func(rng *rand.Rand, r, c int) uint16 {
		w := bf16(rng.NormFloat64())
		switch (r/64 + c/64) % 3 {
		case 1:
			if rng.IntN(20) < 9 {
				w = w&0x807F | uint16(60+rng.IntN(10))<<7
			}
		case 2:
			if rng.IntN(10) == 0 {
				w = w&0x807F | uint16(112+rng.IntN(8))<<7
			}
		}
		return w
	},
}

func newMatrix(kind string, m, k int, seed uint64) matrix {
	rng := rand.New(rand.NewPCG(seed, uint64(m*100003+k)))
	x := matrix{m, k, make([]uint16, m*k)}
	for i := range x.w {
		x.w[i] = kinds[kind](rng, i/k, i%k)
	}
	return x
}
