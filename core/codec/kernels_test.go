// SPDX-License-Identifier: Apache-2.0

package codec

import (
	"fmt"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/zipserv/zipserv/core/format"
)

// compareKernels runs every set on one tile and wants the same results as the portable one's, and no byte written elsewhere.
func compareKernels(t *testing.T, src []byte, stride int, base uint8, rows int) {
	const guard = 0xA5
	type result struct {
		sum              uint32
		low, high        uint8
		exps             [][]byte // sorted: their order inside a row is the kernel's own
		counts           counts
		outside          int
		fixed, out, rows []byte
		masks            [tileRows]uint64
	}
	run := func(set kernels) (r result) {
		s := new(scratch)
		s.factors(3, 5)
		r.sum, r.low, r.high = set.scan(s, src, stride, rows)
		for row := range rows {
			e := slices.Clone(s.exps[row*tileCols:][:tileCols])
			slices.Sort(e)
			r.exps = append(r.exps, e)
		}
		if set.count == nil {
			r.low, r.high = slices.Min(s.exps[:rows*tileCols]), slices.Max(s.exps[:rows*tileCols])
			r.counts, r.outside = countReference(s, r.high, base/2, base/2+22)
		} else {
			r.counts = set.count(s, r.high, true)
			few := set.count(s, r.high, false)
			require.Equal(t, [4]uint32{r.counts.window, r.counts.top[0], r.counts.top[1], r.counts.below[0]},
				[4]uint32{few.window, few.top[0], few.top[1], few.below[0]})
			r.outside = set.outside(s, base/2, base/2+22)
		}
		if rows != tileRows || r.high < 10 {
			r.counts, r.outside = counts{}, 0
		}
		if rows != tileRows {
			return r
		}
		fixed := slices.Repeat([]byte{guard}, fixedBytes+64)
		set.encode(s, fixed, src, stride, base)
		r.fixed, r.masks = fixed, s.masks
		r.out = slices.Repeat([]byte{guard}, 63*stride+tileStride+64)
		set.decode(s, r.out, stride, fixed, 0, 4, base)
		r.rows = slices.Repeat([]byte{guard}, 2*tileBytes)
		set.decode(s, r.rows, 200, fixed, 1, 3, base)
		return r
	}
	want := run(portable)
	for _, set := range kernelSets()[1:] {
		got := run(set)
		require.Equal(t, want.sum, got.sum, set.name)
		require.Equal(t, want.masks, got.masks, set.name)
		require.Equal(t, want, got, set.name)
	}
	if rows == tileRows {
		checkTileAgainstLayout(t, src, stride, base, want.fixed, want.masks)
		for r := range tileRows {
			for c := range tileCols {
				w := le.Uint16(src[r*stride+2*c:])
				if want.masks[r]>>c&1 != 0 {
					w = w&format.MaskA | uint16(base)<<7
				}
				require.Equal(t, w, le.Uint16(want.out[r*stride+2*c:]), "row %d column %d", r, c)
			}
		}
	}
}

func countReference(s *scratch, highest, lo, hi uint8) (c counts, outside int) {
	for _, e := range s.exps {
		d := int(highest) - int(e)
		if d <= 7 {
			c.window++
		}
		if d < len(c.top) {
			c.top[d]++
		}
		if d >= 8 && d < 8+len(c.below) {
			c.below[d-8]++
		}
		if e < lo || e > hi {
			outside++
		}
	}
	return c, outside
}

// checkTileAgainstLayout holds a fixed part against the formulas of docs/format.md section 5, weight by weight.
func checkTileAgainstLayout(t *testing.T, src []byte, stride int, base uint8, fixed []byte, masks [tileRows]uint64) {
	want := make([]byte, fixedBytes)
	for r := range tileRows {
		for c := range tileCols {
			w := le.Uint16(src[r*stride+2*c:])
			p := format.PlaceOf(r, c)
			o, swapped := p.SignMantissa()
			bits := w & format.MaskA
			if swapped {
				bits = bits<<8 | bits>>8
			}
			le.PutUint16(want[o:], le.Uint16(want[o:])|bits)
			d := int(uint8(w>>7)) - int(base)
			outside := d < 0 || d >= format.WindowSize
			require.Equal(t, outside, masks[r]>>c&1 != 0)
			for k := range format.Planes {
				if o, bit := p.PlaneBit(k); !outside && d>>k&1 != 0 {
					at := want[format.BitmapOffset+o:]
					le.PutUint32(at, le.Uint32(at)|1<<bit)
				}
			}
		}
	}
	require.Equal(t, want, fixed[:fixedBytes])
}

func TestKernelsAgree(t *testing.T) {
	for _, name := range distributions {
		for _, stride := range []int{tileStride, 130, 1000} {
			t.Run(fmt.Sprintf("%s/%d", name, stride), func(t *testing.T) {
				src := weights(name, (63*stride+tileStride)/2)
				for _, base := range []uint8{0, 1, 113, 248} {
					compareKernels(t, src, stride, base, tileRows)
				}
				compareKernels(t, src, stride, 0, 1)
				compareKernels(t, src, stride, 0, 37)
			})
		}
	}
}
