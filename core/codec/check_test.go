// SPDX-License-Identifier: Apache-2.0

package codec

import (
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/zipserv/zipserv/core/format"
)

// The quick check of a tile and the one that explains itself say the same of every list, right or damaged.
func TestTheQuickCheckIsTheSlowOne(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	const m, k = 256, 256
	for _, dt := range []format.DType{format.BF16, format.FP16} {
		right, wrong, withLiterals := 0, 0, 0
		for _, kind := range []string{"gaussian", "outliers"} {
			blob := encodeBlob(t, weights(kind, m*k), dt, m, k)
			v, err := Parse(blob)
			require.NoError(t, err)
			s := new(scratch)
			for tile := range v.sec.Tiles {
				h, err := v.tileHeader(tile)
				require.NoError(t, err)
				l, err := readList(v.escapes(), h)
				require.NoError(t, err)
				if h.Dense() {
					continue
				}
				fixed, b := v.fixed(tile), v.grid.tile(tile)
				require.True(t, b.whole())
				same := func(l list, base uint8) {
					err := l.check(s, fixed, b, dt, base)
					if assert.Equal(t, err == nil, l.isRight(fixed, dt, base), err) && err == nil {
						right++
					} else {
						wrong++
					}
				}
				same(l, h.Base)
				if len(l.literals) > 0 {
					withLiterals++
				}
				for base := range dt.MaxBase() + 1 {
					same(l, uint8(base))
				}
				list := v.escapes()[h.EscOffset*format.EscapeUnit:][:l.size]
				for range min(200, 99*len(list)) {
					at, was := rng.IntN(len(list)), byte(0)
					was, list[at] = list[at], list[at]^1<<rng.IntN(8)
					if damaged, err := readList(v.escapes(), h); err == nil {
						same(damaged, h.Base)
					}
					list[at] = was
				}
				if n := len(l.entries) / 2; n > len(l.literals) && len(l.literals) > 0 { // an entry at the place of one with a literal
					last := l.entries[2*n-2:]
					was := le.Uint16(last)
					le.PutUint16(last, was&0xF000|le.Uint16(l.entries[2*len(l.literals)-2:])&0xFFF)
					same(l, h.Base)
					le.PutUint16(last, was)
				}
				for range 50 { // bits of codes
					at, bit := format.BitmapOffset+rng.IntN(format.BitmapSize), byte(1)<<rng.IntN(8)
					fixed[at] ^= bit
					same(l, h.Base)
					fixed[at] ^= bit
				}
			}
		}
		assert.Greater(t, right, 100)
		assert.Greater(t, wrong, 1000)
		assert.Greater(t, withLiterals, 5, dt)
	}
}
