// SPDX-License-Identifier: Apache-2.0

package codec

import "unsafe"

// kernels are the inner loops. They see whole 64x64 tiles of BF16 bit patterns and know nothing of edges, lists or FP16. There is a
// portable set, and sets in assembly that must give the same bytes.
type kernels struct {
	name string

	// scan reads `rows` rows of 64 weights: their checksum with s.rowA and s.colB, their lowest and highest exponent;
	// it leaves the exponents in s.exps, in any order inside a row. Without counts the two exponents may be any bounds.
	scan func(s *scratch, src []byte, stride, rows int) (sum uint32, lowest, highest uint8)

	// count counts exponents of s.exps around the highest one: all of counts, or only window, top[0], top[1] and below[0].
	// nil where a whole histogram is the best there is.
	count func(s *scratch, highest uint8, all bool) counts

	// outside counts exponents of s.exps below lo or above hi.
	outside func(s *scratch, lo, hi uint8) int

	// encode writes a fixed part (format.md section 5) and leaves in s.masks which weights are outside the window.
	encode func(s *scratch, dst, src []byte, stride int, base uint8)

	// decode turns the warp tiles [w0, w1) of a fixed part into rows of 64 weights; dst starts at the first row of w0. Escapes get
	// the exponent `base`.
	decode func(s *scratch, dst []byte, stride int, fixed []byte, w0, w1 int, base uint8)

	// stream copies rows of 128 bytes to dst past the caches; nil where there is no such way. dst and stride are multiples of
	// lineSize; fence must follow before another goroutine reads.
	stream func(dst []byte, stride int, src []byte, rows int)
	fence  func()
}

// An output of streamFrom bytes or more is streamed: it would throw everything else out of the caches and not stay there itself.
const lineSize = 64

var streamFrom = 8 << 20 // a variable for the tests

// streams tells whether rows of 128 bytes at dst and every stride from there are streamed.
func streams(dst []byte, stride int) bool {
	return kern.stream != nil && len(dst) >= streamFrom && uintptr(unsafe.Pointer(&dst[0]))%lineSize == 0 && stride%lineSize == 0
}

// counts around the highest exponent h.
type counts struct {
	window uint32    // h-7 .. h
	top    [4]uint32 // h, h-1, h-2, h-3
	below  [3]uint32 // h-8, h-9, h-10
}

// kernelWork is room for the kernels' own intermediate results.
type kernelWork struct {
	hist   [256]uint32
	planes [3 * 16]uint64 // code bits of the 16 rows of a warp tile
	counts [8]uint32

	symbols [16]uint8 // exponents of a tile's symbols
}

var portable = kernels{"portable", scanPortable, nil, nil, encodePortable, decodePortable, nil, nil}

// kern is the set in use: the fastest that this machine has.
var kern = best()
