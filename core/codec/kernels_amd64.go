// SPDX-License-Identifier: Apache-2.0

package codec

import (
	"golang.org/x/sys/cpu"

	"github.com/zipserv/zipserv/core/format"
)

//go:generate go run -C asm . -out ../kernels_amd64.s -stubs ../kernels_stubs_amd64.go -pkg codec

var avx2 = kernels{"avx2", scanAVX2Tile, countAVX2Tile, outsideAVX2Tile, encodeAVX2Tile, decodeAVX2Tile, streamAVX2Rows, fenceSSE}

// AVX-512 does not pay for the two counts: a comparison into a mask register and its population count are no faster than two AVX2 instructions.
var avx512 = kernels{"avx512", scanAVX512Tile, countAVX2Tile, outsideAVX2Tile, encodeAVX512Tile, decodeAVX512Tile, streamAVX2Rows, fenceSSE}

func hasAVX512() bool {
	x := &cpu.X86
	return x.HasAVX2 && x.HasAVX512F && x.HasAVX512BW && x.HasAVX512VBMI && x.HasAVX512VBMI2
}

func best() kernels {
	switch {
	case hasAVX512():
		return avx512
	case cpu.X86.HasAVX2:
		return avx2
	}
	return portable
}

// The assembly reads and writes no more than the bytes that these slice expressions name first: a slice that is too short panics here, in Go.

func checkScan(s *scratch, src []byte, stride, rows int) {
	_ = src[(rows-1)*stride:][:tileStride]
	_ = s.exps[(rows-1)*tileCols:][:tileCols]
}

func checkEncode(dst, src []byte, stride int) {
	_ = src[(tileRows-1)*stride:][:tileStride]
	_ = dst[:fixedBytes]
}

func checkDecode(dst []byte, stride int, fixed []byte, w0, w1 int) {
	_ = fixed[:fixedBytes]
	_ = dst[((w1-w0)*format.WarpRows-1)*stride:][:tileStride]
	_ = [format.WarpTiles + 1]struct{}{}[w1]
}

func scanAVX2Tile(s *scratch, src []byte, stride, rows int) (sum uint32, lowest, highest uint8) {
	checkScan(s, src, stride, rows)
	sum, low, high := scanAVX2(&src[0], stride, rows, &s.rowA[0], &s.colB[0], &s.exps[0])
	return sum, uint8(low), uint8(high)
}

func scanAVX512Tile(s *scratch, src []byte, stride, rows int) (sum uint32, lowest, highest uint8) {
	checkScan(s, src, stride, rows)
	sum, low, high := scanAVX512(&src[0], stride, rows, &s.rowA[0], &s.colB[0], &s.exps[0])
	return sum, uint8(low), uint8(high)
}

func countAVX2Tile(s *scratch, highest uint8, all bool) counts {
	c := &s.work.counts
	if all {
		countAVX2(&s.exps[0], uint32(highest), &c[0])
		return counts{window: c[0], top: [4]uint32(c[1:5]), below: [3]uint32(c[5:8])}
	}
	countFewAVX2(&s.exps[0], uint32(highest), &c[0])
	return counts{window: c[0], top: [4]uint32{c[1], c[2]}, below: [3]uint32{c[3]}}
}

func outsideAVX2Tile(s *scratch, lo, hi uint8) int {
	return tileWeights - int(outsideAVX2(&s.exps[0], uint32(lo), uint32(hi-lo)))
}

func encodeAVX2Tile(s *scratch, dst, src []byte, stride int, base uint8) {
	checkEncode(dst, src, stride)
	encodeAVX2(&dst[0], &src[0], stride, uint32(base), &s.masks[0], &s.work.planes[0])
}

func encodeAVX512Tile(s *scratch, dst, src []byte, stride int, base uint8) {
	checkEncode(dst, src, stride)
	encodeAVX512(&dst[0], &src[0], stride, uint32(base), &s.masks[0], &s.work.planes[0])
}

func decodeAVX2Tile(_ *scratch, dst []byte, stride int, fixed []byte, w0, w1 int, base uint8) {
	checkDecode(dst, stride, fixed, w0, w1)
	decodeAVX2(&dst[0], stride, &fixed[w0*format.WarpSignMantissaSize], &fixed[format.BitmapOffset+w0*format.WarpBitmapSize], w1-w0, uint32(base))
}

func decodeAVX512Tile(s *scratch, dst []byte, stride int, fixed []byte, w0, w1 int, base uint8) {
	checkDecode(dst, stride, fixed, w0, w1)
	decodeAVX512(&dst[0], stride, &fixed[w0*format.WarpSignMantissaSize], &fixed[format.BitmapOffset+w0*format.WarpBitmapSize], w1-w0, uint32(base),
		&s.work.planes[0])
}

func streamAVX2Rows(dst []byte, stride int, src []byte, rows int) {
	_ = src[(rows-1)*tileStride:][:tileStride]
	_ = dst[(rows-1)*stride:][:tileStride]
	streamAVX2(&dst[0], stride, &src[0], rows)
}
