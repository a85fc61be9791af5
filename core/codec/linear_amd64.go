// SPDX-License-Identifier: Apache-2.0

package codec

import (
	"golang.org/x/sys/cpu"

	"github.com/zipserv/zipserv/core/format"
)

var (
	avx2Products   = products{name: "avx2", partials: 8, few: 8, dot: dotAVX2Tile}
	avx512Products = products{
		name: "avx512", partials: 4, few: 16, dot: dotTo4, exps: expsAVX512Tile, patch: patchExpsTile,
		multiply: multiplyBlocks([]block4{{2, multiplyFP32x2}, {1, multiplyFP32x1}}),
	}
	bf16Products = products{
		name: "avx512-bf16", partials: 4, few: 32, dot: dotTo4, exps: expsAVX512Tile, patch: patchExpsTile,
		multiply: multiplyBlocks([]block4{{4, multiplyBF16x4}, {2, multiplyBF16x2}, {1, multiplyBF16x1}}),
	}
	gfniProducts = products{
		name: "avx512-bf16-gfni", partials: 4, few: 32, dot: dotTo4, exps: expsGFNITile, patch: patchExpsTile, multiply: bf16Products.multiply,
	}
)

func bestProducts() products {
	switch {
	case hasAVX512() && cpu.X86.HasAVX512BF16 && cpu.X86.HasAVX512GFNI:
		return gfniProducts
	case hasAVX512() && cpu.X86.HasAVX512BF16:
		return bf16Products
	case hasAVX512():
		return avx512Products
	case cpu.X86.HasAVX2 && cpu.X86.HasFMA:
		return avx2Products
	}
	return portableProducts
}

func dotAVX2Tile(acc []float32, tile *[tileBytes]byte, x []byte) {
	_, _ = acc[:8*tileRows], x[:tileStride]
	dotAVX2(&acc[0], &tile[0], &x[0])
}

// dotTo4 is dot for accumulators of four sums a row; only raw blobs come here.
func dotTo4(acc []float32, tile *[tileBytes]byte, x []byte) {
	var sums [8 * tileRows]float32
	dotAVX2Tile(sums[:], tile, x)
	for r := range tileRows {
		for i := range 4 {
			acc[4*r+i] += sums[8*r+i] + sums[8*r+4+i]
		}
	}
}

func expsAVX512Tile(s *scratch, fixed []byte, base uint8) {
	_ = fixed[:fixedBytes]
	expsAVX512(&s.exps[0], &fixed[0], uint32(base), &s.work.planes[0])
}

func expsGFNITile(s *scratch, fixed []byte, base uint8) {
	_ = fixed[:fixedBytes]
	expsGFNI(&s.exps[0], &fixed[0], uint32(base), &s.work.planes[0])
}

func patchExpsTile(s *scratch, l list, base uint8) {
	n := len(l.entries) / 2
	if n == 0 {
		return
	}
	literals := &s.work.symbols[0] // any address: it is not read
	if len(l.literals) > 0 {
		literals = &l.literals[0]
	}
	patchExps(&s.exps[0], &l.entries[0], n, literals, len(l.literals), uint32(base), &s.work.symbols[0])
}

// block4 multiplies a number of tokens at once.
type block4 struct {
	tokens int
	f      func(acc *float32, accStride int, signMantissa, exps, x *byte, xStride int)
}

// multiplyBlocks takes as many tokens at a time as there are, the largest block first. Each token's sums are made in the same order in any block.
func multiplyBlocks(blocks []block4) func(acc []float32, tokens int, s *scratch, fixed, x []byte, xStride int) {
	const one = 4 * tileRows
	return func(acc []float32, tokens int, s *scratch, fixed, x []byte, xStride int) {
		_, _, _ = acc[:tokens*one], fixed[:format.SignMantissaSize], x[:(tokens-1)*xStride+tileStride]
		for t := 0; t < tokens; {
			for _, b := range blocks {
				for ; tokens-t >= b.tokens; t += b.tokens {
					b.f(&acc[t*one], 4*one, &fixed[0], &s.exps[0], &x[t*xStride], xStride)
				}
			}
		}
	}
}
