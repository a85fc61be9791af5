// SPDX-License-Identifier: Apache-2.0

package codec

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/zipserv/zipserv/core/format"
)

func useProducts(t testing.TB, set products) {
	before := prod
	prod = set
	t.Cleanup(func() { prod = before })
}

func fromBF16(b []byte, i int) float64 {
	return float64(math.Float32frombits(uint32(le.Uint16(b[2*i:])) << 16))
}

// linearOf runs View.Linear with every stride larger than a row and looks that nothing else is written.
func linearOf(t testing.TB, blob, x, bias []byte, tokens, m, k, threads int) []byte {
	v, err := Parse(blob)
	require.NoError(t, err)
	const guard = 0xA5
	xs, ys := k+3, m+5
	wide, y := make([]byte, 2*((tokens-1)*xs+k)), slices.Repeat([]byte{guard}, 2*tokens*ys)
	for i := range tokens {
		copy(wide[2*i*xs:], x[2*i*k:2*(i+1)*k])
	}
	require.NoError(t, v.Linear(context.Background(), Product{
		Row1: uint64(m), Tokens: uint64(tokens), X: wide, XStride: uint64(xs), Y: y, YStride: uint64(ys), Bias: bias, Threads: threads,
	}))
	out := make([]byte, 0, 2*tokens*m)
	for i := range tokens {
		row := y[2*i*ys:][:2*ys]
		out = append(out, row[:2*m]...)
		require.Equal(t, slices.Repeat([]byte{guard}, 2*(ys-m)), row[2*m:])
	}
	return out
}

// checkLinear compares with float64: the error is that of sums in FP32 (K of them at worst; some in practice) and one rounding to BF16.
func checkLinear(t *testing.T, w, x, bias, y []byte, tokens, m, k int) {
	t.Helper()
	for i := range tokens {
		for r := range m {
			var want, size float64
			for c := range k {
				p := fromBF16(w, r*k+c) * fromBF16(x, i*k+c)
				want += p
				size += math.Abs(p)
			}
			if bias != nil {
				want += fromBF16(bias, r)
				size += math.Abs(fromBF16(bias, r))
			}
			got := fromBF16(y, i*m+r)
			if math.IsNaN(want) || size > math.MaxFloat32 {
				if math.IsNaN(want) {
					require.True(t, math.IsNaN(got), "token %d row %d: %v, want NaN", i, r, got)
				}
				continue
			}
			if math.IsInf(want, 0) {
				require.Equal(t, want, got, "token %d row %d", i, r)
				continue
			}
			// The instructions for BF16 take subnormal numbers for 0.
			limit := math.Abs(want)/256 + size*float64(16+k/8)*0x1p-24 + 0x1p-120
			require.LessOrEqual(t, math.Abs(got-want), limit, "token %d row %d: %v, want %v", i, r, got, want)
		}
	}
}

var linearShapes = [][2]int{{64, 64}, {1, 64}, {64, 1}, {65, 63}, {63, 129}, {128, 200}, {200, 192}, {5, 7}}

func TestLinear(t *testing.T) {
	for _, set := range productSets() {
		for _, name := range distributions {
			t.Run(set.name+"/"+name, func(t *testing.T) {
				useProducts(t, set)
				for _, shape := range linearShapes {
					m, k := shape[0], shape[1]
					w := weights(name, m*k)
					blob := encodeBlob(t, w, format.BF16, uint64(m), uint64(k))
					x, bias := weights("gaussian", 7*k), weights("gaussian", m)
					all := linearOf(t, blob, x, bias, 7, m, k, 1)
					checkLinear(t, w, x, bias, all, 7, m, k)
					none := linearOf(t, blob, x, nil, 2, m, k, 3)
					checkLinear(t, w, x, nil, none, 2, m, k)
				}
			})
		}
	}
}

// A token's bits depend neither on the other tokens nor on the threads.
func TestLinearInvariant(t *testing.T) {
	const m, k, most = 700, 1030, 23
	w, x, bias := weights("outliers", m*k), weights("gaussian", most*k), weights("gaussian", m)
	for i := range w { // finite weights, so that equal bits say something
		if i%2 == 1 {
			w[i] &= 0xBF
		}
	}
	for _, set := range productSets() {
		t.Run(set.name, func(t *testing.T) {
			useProducts(t, set)
			blob := encodeBlob(t, w, format.BF16, m, k)
			all := linearOf(t, blob, x, bias, most, m, k, 0)
			for _, threads := range []int{1, 2, 5} {
				for tokens := 1; tokens < 9; tokens++ {
					for first := 0; first+tokens <= most; first += 5 {
						got := linearOf(t, blob, x[2*first*k:2*(first+tokens)*k], bias, tokens, m, k, threads)
						require.Equal(t, all[2*first*m:2*(first+tokens)*m], got, "%d tokens from %d on, %d threads", tokens, first, threads)
					}
				}
			}
		})
	}
}

// A team's threads do the work of the goroutines; where there is no team, goroutines do.
func TestLinearTeam(t *testing.T) {
	const m, k, threads = 1500, 700, 3
	w, x := weights("gaussian", m*k), weights("gaussian", k)
	blob := encodeBlob(t, w, format.BF16, m, k)
	v, err := Parse(blob)
	require.NoError(t, err)
	want := linearOf(t, blob, x, nil, 1, m, k, 1)
	for _, there := range []bool{true, false} {
		called := 0
		y := make([]byte, 2*m)
		require.NoError(t, v.Linear(context.Background(), Product{
			Row1: m, Tokens: 1, X: x, XStride: k, Y: y, YStride: m, Threads: threads,
			Team: func(n int, member func()) bool {
				called += n
				if !there {
					return false
				}
				var wg sync.WaitGroup
				for range n {
					wg.Go(member)
				}
				wg.Wait()
				return true
			},
		}))
		require.Equal(t, want, y)
		require.Equal(t, threads, called)
	}
}

// A run of rows gives what a weight with no others gives.
func TestLinearRows(t *testing.T) {
	const m, k, tokens = 300, 200, 3
	w, x, bias := weights("gaussian", m*k), weights("gaussian", tokens*k), weights("gaussian", m)
	for _, set := range productSets() {
		useProducts(t, set)
		v, err := Parse(encodeBlob(t, w, format.BF16, m, k))
		require.NoError(t, err)
		for _, r := range [][2]int{{0, 64}, {0, 65}, {64, 128}, {128, 300}, {128, 130}, {256, 299}} {
			n := r[1] - r[0]
			alone := encodeBlob(t, w[2*r[0]*k:2*r[1]*k], format.BF16, uint64(n), k)
			y := make([]byte, 2*tokens*n)
			require.NoError(t, v.Linear(context.Background(), Product{
				Row0: uint64(r[0]), Row1: uint64(r[1]), Tokens: tokens, X: x, XStride: k, Y: y, YStride: uint64(n), Bias: bias[2*r[0] : 2*r[1]],
			}))
			require.Equal(t, linearOf(t, alone, x, bias[2*r[0]:2*r[1]], tokens, n, k, 1), y, "%s, rows %v", set.name, r)
		}
	}
}

// NaN and infinity in one weight reach every token of its row and no other row; in x they reach every row of their token and no other token.
func TestLinearSpecials(t *testing.T) {
	const m, k, tokens = 130, 150, 5
	for _, set := range productSets() {
		t.Run(set.name, func(t *testing.T) {
			useProducts(t, set)
			for _, special := range []uint16{0x7FC1, 0xFF81, 0x7F80, 0xFF80} {
				w, x := weights("gaussian", m*k), weights("gaussian", tokens*k)
				le.PutUint16(w[2*(70*k+149):], special)
				y := linearOf(t, encodeBlob(t, w, format.BF16, m, k), x, nil, tokens, m, k, 0)
				for i := range tokens * m {
					f := fromBF16(y, i)
					require.Equal(t, i%m == 70, math.IsNaN(f) || math.IsInf(f, 0), "weight %04x, result %d", special, i)
				}
				w = weights("gaussian", m*k)
				le.PutUint16(x[2*(3*k+7):], special)
				y = linearOf(t, encodeBlob(t, w, format.BF16, m, k), x, nil, tokens, m, k, 0)
				for i := range tokens * m {
					f := fromBF16(y, i)
					require.Equal(t, i/m == 3, math.IsNaN(f) || math.IsInf(f, 0), "x %04x, result %d", special, i)
				}
			}
		})
	}
}

func TestLinearArguments(t *testing.T) {
	ctx := context.Background()
	const m, k = 70, 130
	w := weights("gaussian", m*k)
	v, err := Parse(encodeBlob(t, w, format.BF16, m, k))
	require.NoError(t, err)
	x, y := make([]byte, 2*3*k), make([]byte, 2*3*m)
	good := Product{Row1: m, Tokens: 3, X: x, XStride: k, Y: y, YStride: m}
	require.NoError(t, v.Linear(ctx, good))
	for name, change := range map[string]func(p *Product){
		"x short":         func(p *Product) { p.X = x[:len(x)-1] },
		"y short":         func(p *Product) { p.Y = y[2:] },
		"x stride":        func(p *Product) { p.XStride = k - 1 },
		"y stride":        func(p *Product) { p.YStride = 0 },
		"overflow":        func(p *Product) { p.Tokens, p.XStride = 1<<39, 1<<39 },
		"too many tokens": func(p *Product) { p.Tokens = 1 << 60 },
		"row range":       func(p *Product) { p.Row1 = m + 1 },
		"rows reversed":   func(p *Product) { p.Row0, p.Row1 = 64, 0 },
		"first row":       func(p *Product) { p.Row0 = 1 },
		"bias":            func(p *Product) { p.Bias = x[:2*m-2] },
	} {
		p := good
		change(&p)
		require.ErrorIs(t, v.Linear(ctx, p), format.ErrArgument, name)
	}
	require.NoError(t, v.Linear(ctx, Product{}))
	half, err := Parse(encodeBlob(t, w, format.FP16, m, k))
	require.NoError(t, err)
	require.ErrorIs(t, half.Linear(ctx, good), format.ErrArgument)
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	require.ErrorIs(t, v.Linear(cancelled, good), context.Canceled)
}

// The places of exponents: what exps leaves there is what the layout of the format says, and every place is used once.
func TestExponentPlaces(t *testing.T) {
	var seen [tileWeights]bool
	for p := range tileWeights {
		seen[p&0xF00|int(expPlaces[p&0xFF])] = true
	}
	require.NotContains(t, seen[:], false)
	for _, set := range productSets() {
		if set.exps == nil {
			continue
		}
		src := weights("outliers", tileWeights)
		s, fixed := new(scratch), make([]byte, fixedBytes)
		kern.encode(s, fixed, src, tileStride, 113)
		masks := s.masks
		set.exps(s, fixed, 113)
		for p := range tileWeights {
			want := uint8(le.Uint16(src[2*p:]) >> 7)
			if masks[p/64]>>(p%64)&1 != 0 {
				want = 113
			}
			require.Equal(t, want, s.exps[p&0xF00|int(expPlaces[p&0xFF])], "position %d", p)
		}
	}
}

// FuzzLinear: small shapes of any weights agree with float64, and a damaged blob gives an error or some result, never a fault.
func FuzzLinear(f *testing.F) {
	f.Add(uint64(1), uint16(70), uint16(90), uint8(3), uint32(0))
	f.Add(uint64(2), uint16(1), uint16(1), uint8(1), uint32(150))
	f.Fuzz(func(t *testing.T, seed uint64, rows, columns uint16, n uint8, damage uint32) {
		m, k, tokens := 1+int(rows)%140, 1+int(columns)%200, 1+int(n)%9
		rng := rand.New(rand.NewPCG(seed, 1))
		w := weights(distributions[seed%uint64(len(distributions))], m*k)
		for range rng.IntN(40) {
			le.PutUint16(w[2*rng.IntN(m*k):], uint16(rng.Uint32()))
		}
		x := weights("gaussian", tokens*k)
		blob := encodeBlob(t, w, format.BF16, uint64(m), uint64(k))
		for _, set := range productSets() {
			useProducts(t, set)
			checkLinear(t, w, x, nil, linearOf(t, blob, x, nil, tokens, m, k, 2), tokens, m, k)
			if damage == 0 {
				continue
			}
			bad := slices.Clone(blob)
			bad[format.HeaderSize+int(damage)%(len(bad)-format.HeaderSize)] ^= uint8(1 + damage%255)
			v, err := Parse(bad)
			require.NoError(t, err)
			_ = v.Linear(context.Background(), Product{Row1: uint64(m), Tokens: uint64(tokens), X: x, XStride: uint64(k), Y: make([]byte, 2*tokens*m), YStride: uint64(m)})
		}
	})
}

func TestRoundBF16(t *testing.T) {
	for bits, want := range map[uint32]uint16{
		0x3F808000: 0x3F80, 0x3F818000: 0x3F82, 0x3F808001: 0x3F81, 0x7F7FFFFF: 0x7F80, 0x7F800001: 0x7FC0, 0xFF800000: 0xFF80, 0: 0, 0x80000001: 0x8000,
	} {
		require.Equal(t, want, roundBF16(math.Float32frombits(bits)), fmt.Sprintf("%08x", bits))
	}
}
