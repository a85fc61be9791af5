// SPDX-License-Identifier: Apache-2.0

package codec

import (
	"context"
	"math"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/zipserv/zipserv/core/format"
)

// use puts a set of kernels in use for one test; such tests do not run in parallel.
func use(t testing.TB, set kernels) {
	before := kern
	kern = set
	t.Cleanup(func() { kern = before })
}

func bf16(x float64) uint16 { return uint16(math.Float32bits(float32(x)) >> 16) }

// distributions are the names that weights knows.
var distributions = []string{
	"gaussian", "wide", "outliers", "constant", "zero", "random", "half-zeros", "mostly-zeros", "tiny", "special", "two-clusters", "uniform-exponent",
}

// weights makes n BF16 bit patterns (which serve as FP16 ones too).
func weights(distribution string, n int) []byte {
	rng := rand.New(rand.NewPCG(7, uint64(n)))
	gaussian := func() uint16 { return bf16(rng.NormFloat64() * 0.02) }
	pick := map[string]func() uint16{
		"gaussian": gaussian,
		"wide":     func() uint16 { return bf16(math.Exp(4*rng.NormFloat64()) * (float64(rng.IntN(2)) - 0.5)) },
		"outliers": func() uint16 {
			if rng.IntN(200) == 0 {
				return uint16(rng.Uint32())
			}
			return gaussian()
		},
		"constant": func() uint16 { return 0x3F80 },
		"zero":     func() uint16 { return 0 },
		"random":   func() uint16 { return uint16(rng.Uint32()) },
		"half-zeros": func() uint16 {
			if rng.IntN(2) == 0 {
				return 0
			}
			return gaussian()
		},
		"mostly-zeros": func() uint16 {
			if rng.IntN(10) != 0 {
				return 0
			}
			return gaussian()
		},
		"tiny": func() uint16 { return uint16(rng.Uint32()) & 0x85FF }, // subnormals and exponents 0..11
		"special": func() uint16 { // infinities and NaN payloads
			return uint16(rng.Uint32()) | 0x7C00
		},
		"two-clusters": func() uint16 { // windows of almost equal coverage
			return uint16(100+rng.IntN(2)*11+rng.IntN(3))<<7 | uint16(rng.Uint32())&0x807F
		},
		"uniform-exponent": func() uint16 { return uint16(104+rng.IntN(18))<<7 | uint16(rng.Uint32())&0x807F },
	}[distribution]
	b := make([]byte, 2*n)
	for i := range n {
		le.PutUint16(b[2*i:], pick())
	}
	return b
}

func encodeBlob(t testing.TB, src []byte, dt format.DType, m, k uint64) []byte {
	ctx := context.Background()
	p, err := NewPlan(ctx, src, dt, []uint64{m, k}, m, k)
	require.NoError(t, err)
	blob := make([]byte, p.Size())
	require.NoError(t, p.Encode(ctx, blob))
	return blob
}
