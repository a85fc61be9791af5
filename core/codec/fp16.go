// SPDX-License-Identifier: Apache-2.0

package codec

import "github.com/zipserv/zipserv/core/format"

// An FP16 weight (format.md section 5.1) is two BF16-shaped patterns for the kernels: one with its sign, exponent and upper seven
// mantissa bits, and one whose "exponent" is the lower three mantissa bits, coded with base 0.

// splitFP16 makes the two tiles from a padded FP16 tile that stands in tile.
func splitFP16(tile, low *[tileBytes]byte) {
	for o := 0; o < tileBytes; o += 8 {
		w := le.Uint64(tile[o:])
		le.PutUint64(low[o:], w&(7*lanes4)<<7)
		le.PutUint64(tile[o:], w&(0x8000*lanes4)|w&(0x7FF8*lanes4)>>3)
	}
}

// joinFP16 is its inverse, for `rows` rows.
func joinFP16(tile, low *[tileBytes]byte, rows int) {
	for o := 0; o < rows*tileStride; o += 8 {
		w := le.Uint64(tile[o:])
		le.PutUint64(tile[o:], w&(0x8000*lanes4)|w&(0xFFF*lanes4)<<3|le.Uint64(low[o:])>>7&(7*lanes4))
	}
}

// encodeLow writes the three bitmaps of the lower mantissa bits; the sign-and-mantissa part that the kernel also makes is all zero and dropped.
func (s *scratch) encodeLow(dst []byte) {
	kern.encode(s, s.fixed[:], s.low[:], tileStride, 0)
	copy(dst[:format.BitmapSize], s.fixed[format.BitmapOffset:])
}

// decodeLow is its inverse for the warp tiles [w0, w1).
func (s *scratch) decodeLow(src []byte, w0, w1 int) {
	clear(s.fixed[:format.SignMantissaSize])
	copy(s.fixed[format.BitmapOffset:], src[:format.BitmapSize])
	kern.decode(s, s.low[:], tileStride, s.fixed[:], w0, w1, 0)
}
