// SPDX-License-Identifier: Apache-2.0

//go:build unix

package codec

import (
	"context"
	"fmt"
	"runtime"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/zipserv/zipserv/core/format"
)

// BenchmarkLinear measures the product with a compressed weight, in GB/s of its uncompressed BF16, beside reading the same weights uncompressed and
// doing nothing with them: no product with uncompressed weights that memory has to deliver is faster than that.
func BenchmarkLinear(b *testing.B) {
	ctx := context.Background()
	const m, k = 14336, 4096 // 112 MiB
	src := weights("gaussian", m*k)
	blob := encodeBlob(b, src, format.BF16, m, k)
	v, err := Parse(blob)
	require.NoError(b, err)
	for _, set := range productSets() {
		for _, tokens := range []int{1, 2, 4, 8, 16, 64} {
			if set.name == portableProducts.name && tokens > 1 {
				break
			}
			b.Run(fmt.Sprintf("%s-%d-cores/N=%d", set.name, runtime.GOMAXPROCS(0), tokens), func(b *testing.B) {
				useProducts(b, set)
				x, y := weights("gaussian", tokens*k), make([]byte, 2*tokens*m)
				var products, reads times
				for b.Loop() {
					products.measure(func() error {
						return v.Linear(ctx, Product{Row1: m, Tokens: uint64(tokens), X: x, XStride: k, Y: y, YStride: m})
					})
					reads.measure(func() error { return readParallel(src) })
				}
				b.ReportMetric(0, "ns/op")
				products.rate(b, "product", len(src))
				reads.rate(b, "read", len(src))
			})
		}
	}
}

// BenchmarkProductTile measures the three steps on a tile that is in the cache.
func BenchmarkProductTile(b *testing.B) {
	src := weights("gaussian", tileWeights)
	blob := encodeBlob(b, src, format.BF16, 64, 64)
	v, err := Parse(blob)
	require.NoError(b, err)
	h, err := v.tileHeader(0)
	require.NoError(b, err)
	l, err := readList(v.escapes(), h)
	require.NoError(b, err)
	s, x, fixed := new(scratch), weights("gaussian", 8*tileCols), v.fixed(0)
	for _, set := range productSets() {
		acc := resize([]float32(nil), 8*tileRows*set.partials)
		if set.multiply == nil {
			b.Run(set.name+"/dot", func(b *testing.B) {
				for b.Loop() {
					set.dot(acc, &s.out, x)
				}
			})
			continue
		}
		b.Run(set.name+"/exponents", func(b *testing.B) {
			for b.Loop() {
				set.exps(s, fixed, h.Base)
			}
		})
		b.Run(fmt.Sprintf("%s/patch-%d", set.name, h.EscCount), func(b *testing.B) {
			for b.Loop() {
				set.patch(s, l, h.Base)
			}
		})
		for _, tokens := range []int{1, 2, 4, 8} {
			b.Run(fmt.Sprintf("%s/multiply-%d", set.name, tokens), func(b *testing.B) {
				for b.Loop() {
					set.multiply(acc, tokens, s, fixed, x, tileStride)
				}
			})
		}
	}
}

// readParallel reads a byte of each line of b.
func readParallel(b []byte) error {
	const piece = 1 << 20
	n := uint64(len(b))
	return parallel(context.Background(), (n+piece-1)/piece, 1, func(s *scratch, lo, hi uint64) error {
		var sum uint32
		for o := lo * piece; o < min(hi*piece, n); o += lineSize {
			sum += uint32(b[o])
		}
		s.work.hist[0] = sum
		return nil
	})
}
