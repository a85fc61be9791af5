// SPDX-License-Identifier: Apache-2.0

package codec

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
	"github.com/x448/float16"

	"github.com/zipserv/zipserv/core/format"
)

var ctx = context.Background()

// roundTrip proves everything that is promised of one matrix: the bytes of the reference, a size within the bound, a blob that checks, and the
// same bits back by every way to decode.
func roundTrip(t *testing.T, src []byte, dt format.DType, m, k int) format.Header {
	t.Helper()
	before := slices.Clone(src)
	blob := encodeBlob(t, src, dt, uint64(m), uint64(k))
	require.Equal(t, before, src, "the weights were written to")
	if m*k <= 1<<17 {
		require.Equal(t, referenceBlob(src, dt, m, k), blob, "not the reference's bytes")
	}
	require.LessOrEqual(t, len(blob), 2*m*k+format.HeaderSize)
	require.NoError(t, Check(ctx, blob, false))
	require.NoError(t, Check(ctx, blob, true))
	v, err := Parse(blob)
	require.NoError(t, err)
	out := make([]byte, len(src))
	require.NoError(t, v.Decode(ctx, out))
	require.Equal(t, src, out)

	// A range of rows, strided, with guards that must stay.
	rng := rand.New(rand.NewPCG(uint64(m), uint64(k)))
	for range 3 {
		a, b := rng.IntN(m+1), rng.IntN(m+1)
		a, b = min(a, b), max(a, b)
		stride := k + rng.IntN(5)
		got := slices.Repeat([]byte{0xA5}, 2*(b-a)*stride+2)
		want := slices.Clone(got)
		for r := a; r < b; r++ {
			copy(want[2*(r-a)*stride:], src[2*r*k:2*(r+1)*k])
		}
		require.NoError(t, v.DecodeRows(ctx, uint64(a), uint64(b), got, uint64(stride)))
		require.Equal(t, want, got, "rows %d to %d, stride %d", a, b, stride)
	}

	d := NewPanelDecoder(v)
	bits, floats := make([]byte, 2*64*k), make([]float32, 64*k)
	for p := range v.Panels() {
		n, err := d.Bits16(p, bits)
		require.NoError(t, err)
		want := src[2*64*int(p)*k:][:2*n*k]
		require.Equal(t, want, bits[:2*n*k])
		n, err = d.Float32(p, floats)
		require.NoError(t, err)
		for i, x := range floats[:n*k] {
			w := le.Uint16(want[2*i:])
			y := math.Float32frombits(uint32(w) << 16)
			if dt == format.FP16 {
				y = float16.Frombits(w).Float32()
			}
			if math.Float32bits(x) != math.Float32bits(y) {
				require.Equal(t, math.Float32bits(y), math.Float32bits(x), "panel %d, weight %d", p, i)
			}
		}
	}
	return v.Header
}

func eachSet(t *testing.T, f func(t *testing.T)) {
	for _, set := range kernelSets() {
		t.Run(set.name, func(t *testing.T) {
			use(t, set)
			f(t)
		})
	}
}

var dtypes = []format.DType{format.BF16, format.FP16}

func TestRoundTripShapesAndDistributions(t *testing.T) {
	shapes := [][2]int{{1, 1}, {1, 5000}, {5000, 1}, {64, 64}, {63, 64}, {64, 63}, {65, 129}, {100, 100}, {128, 192}, {60, 250}, {250, 60}, {193, 517}}
	eachSet(t, func(t *testing.T) {
		for i, name := range distributions {
			for j, shape := range shapes {
				if testing.Short() && (i+j)%4 != 0 {
					continue
				}
				for _, dt := range dtypes {
					t.Run(fmt.Sprintf("%s/%dx%d/%v", name, shape[0], shape[1], dt), func(t *testing.T) {
						roundTrip(t, weights(name, shape[0]*shape[1]), dt, shape[0], shape[1])
					})
				}
			}
		}
	})
}

// The way past the caches, which only large matrices take, on small ones.
func TestStreaming(t *testing.T) {
	before := streamFrom
	defer func() { streamFrom = before }()
	streamFrom = 1
	eachSet(t, func(t *testing.T) {
		for _, name := range []string{"gaussian", "outliers", "constant"} {
			for _, shape := range [][2]int{{192, 320}, {200, 320}, {192, 300}, {64, 64}} {
				for _, dt := range dtypes {
					roundTrip(t, weights(name, shape[0]*shape[1]), dt, shape[0], shape[1])
				}
			}
		}
	})
}

// Every pattern as an escape or in the window, among weights that make the tile shrink.
func TestAllPatternsInTiles(t *testing.T) {
	eachSet(t, func(t *testing.T) {
		for _, dt := range dtypes {
			const m, k = 1024, 1024
			src := weights("gaussian", m*k)
			if dt == format.FP16 {
				src = weights("constant", m*k)
			}
			order := rand.New(rand.NewPCG(1, 2)).Perm(1 << 16)
			for i, w := range order {
				le.PutUint16(src[2*16*i:], uint16(w))
			}
			h := roundTrip(t, src, dt, m, k)
			require.Equal(t, format.Tiled, h.Mode)
			require.NotZero(t, h.EscapeBytes)
		}
	})
}

// Every pattern in tiles in dense mode, among constant tiles that make the matrix shrink.
func TestAllPatternsDense(t *testing.T) {
	eachSet(t, func(t *testing.T) {
		for _, dt := range dtypes {
			const m, k = 64 * 16, 64 * 16
			src := weights("constant", m*k)
			order := rand.New(rand.NewPCG(1, 2)).Perm(1 << 16)
			for i, w := range order {
				tile, r, c := i/4096, i/64%64, i%64
				le.PutUint16(src[2*((64*tile+r)*k+64*tile+c):], uint16(w))
			}
			p, err := NewPlan(ctx, src, dt, []uint64{m, k}, m, k)
			require.NoError(t, err)
			if dt == format.BF16 {
				require.EqualValues(t, 16, p.Stats().DenseTiles)
			}
			require.Equal(t, format.Tiled, roundTrip(t, src, dt, m, k).Mode)
		}
	})
}

func TestAllPatternsRaw(t *testing.T) {
	for _, dt := range dtypes {
		src := make([]byte, 2<<16)
		for w := range 1 << 16 {
			le.PutUint16(src[2*w:], uint16(w))
		}
		require.Equal(t, format.Raw, roundTrip(t, src[:2*256*250], dt, 256, 250).Mode)
		roundTrip(t, src, dt, 256, 256)
		roundTrip(t, src, dt, 65536, 1)
		roundTrip(t, src, dt, 1, 65536)
	}
}

// Every base, and every exponent at its distance from it.
func TestEveryBase(t *testing.T) {
	eachSet(t, func(t *testing.T) {
		for _, dt := range dtypes {
			shift := 7
			if dt == format.FP16 {
				shift = 10
			}
			for base := 0; base <= dt.MaxBase(); base++ {
				src := make([]byte, tileBytes)
				for i := range tileWeights {
					e := base + i%8
					if i < 2*(dt.MaxExponent()+1) && i%2 == 0 {
						e = i / 2
					}
					le.PutUint16(src[2*i:], uint16(e)<<shift|uint16(i*2654435761>>7)&^(uint16(dt.MaxExponent())<<shift))
				}
				p, err := NewPlan(ctx, src, dt, []uint64{64, 64}, 64, 64)
				require.NoError(t, err)
				require.EqualValues(t, base, p.tiles[0].header.Base)
				roundTrip(t, src, dt, 64, 64)
			}
		}
	})
}

// The window from a few counts must be that of the whole histogram.
func TestQuickWindowIsExact(t *testing.T) {
	eachSet(t, func(t *testing.T) {
		rng := rand.New(rand.NewPCG(3, 4))
		s := new(scratch)
		quick := 0
		for range 1000 {
			padding := rng.IntN(2) * rng.IntN(tileWeights)
			n := tileWeights - padding
			clear(s.exps[:])
			top, spread := 8+rng.IntN(240), 1+rng.IntN(24)
			skew := rng.Float64() * 4
			low, high := uint8(255), uint8(0)
			for i := range n {
				e := uint8(max(0, top-int(float64(spread)*math.Pow(rng.Float64(), 1+skew))))
				s.exps[i] = e
				low, high = min(low, e), max(high, e)
			}
			var hist [256]uint32
			histogram(&hist, s.exps[:n])
			want := histogramWindow(&hist, n, 248)
			if kern.count != nil {
				if w, ok := s.quickWindow(low, high, padding, n, 248); ok {
					quick++
					require.Equal(t, want, w)
				}
			}
			require.Equal(t, want, s.chooseWindow(low, high, padding, 248))
		}
		require.True(t, quick > 100 || kern.count == nil, "the quick way was hardly tried")
	})
}

func TestShapes(t *testing.T) {
	src := weights("gaussian", 64*128)
	for _, shape := range [][]uint64{{64 * 128}, {2, 32, 128}, {1, 1, 1, 1, 1, 1, 64, 128}} {
		p, err := NewPlan(ctx, src, format.BF16, shape, 64, 128)
		require.NoError(t, err)
		blob := make([]byte, p.Size())
		require.NoError(t, p.Encode(ctx, blob))
		v, err := Parse(blob)
		require.NoError(t, err)
		require.Equal(t, shape, v.Header.Shape)
		require.Equal(t, p.Header(), v.Header)
	}
}

func TestSizes(t *testing.T) {
	const m, k = 2048, 1024
	src := weights("gaussian", m*k)
	p, err := NewPlan(ctx, src, format.BF16, []uint64{m, k}, m, k)
	require.NoError(t, err)
	hist := Histogram(src, format.BF16)
	bound := EntropyBound(&hist, format.BF16)
	paper := 8 * float64(SevenCodeSize(&hist, format.BF16, m, k)) / (m * k)
	t.Logf("Gaussian, sigma 0.02: %.3f bits a weight; seven-code layout %.3f, entropy bound %.3f", p.Stats().BitsPerWeight(), paper, bound)
	require.LessOrEqual(t, p.Stats().BitsPerWeight(), 11.22)
	require.InDelta(t, 10.55, bound, 0.02)
	require.InDelta(t, 11.17, paper, 0.03)

	v, err := Parse(encodeBlob(t, src, format.BF16, m, k))
	require.NoError(t, err)
	st, err := v.Stats(ctx)
	require.NoError(t, err)
	require.Equal(t, p.Stats(), st)

	// FP16 values of the same distribution.
	for i := range m * k {
		x := math.Float32frombits(uint32(le.Uint16(src[2*i:])) << 16)
		le.PutUint16(src[2*i:], float16.Fromfloat32(x).Bits())
	}
	p, err = NewPlan(ctx, src, format.FP16, []uint64{m, k}, m, k)
	require.NoError(t, err)
	t.Logf("the same in FP16: %.3f bits a weight", p.Stats().BitsPerWeight())
	require.Less(t, p.Stats().BitsPerWeight(), 14.25)
	roundTrip(t, src, format.FP16, m, k)
}

func TestHistogram(t *testing.T) {
	src := weights("outliers", 1<<20+12345)
	for _, dt := range dtypes {
		var want [256]uint64
		for i := 0; i < len(src); i += 2 {
			want[dt.Exponent(le.Uint16(src[i:]))]++
		}
		require.Equal(t, want, Histogram(src, dt))
	}
	require.Equal(t, [256]uint64{}, Histogram(nil, format.BF16))
	var one [256]uint64
	one[120] = 5
	require.EqualValues(t, 8, EntropyBound(&one, format.BF16))
	one[121] = 5
	require.EqualValues(t, 12, EntropyBound(&one, format.FP16))
}
