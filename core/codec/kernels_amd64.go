// SPDX-License-Identifier: Apache-2.0

package codec

import (
	"unsafe"

	"golang.org/x/sys/cpu"

	"github.com/zipserv/zipserv/core/format"
)

//go:generate go run -C asm . -out ../kernels_amd64.s -stubs ../kernels_stubs_amd64.go -pkg codec

var avx2 = kernels{"avx2", scanAsm, countAsm, outsideAsm, encodeAsm, decodeAsm}

func best() kernels {
	if cpu.X86.HasAVX2 {
		return avx2
	}
	return portable
}

// The assembly reads and writes no more than the bytes that these slice expressions name first; a slice that is too short panics here, in Go.

func scanAsm(s *scratch, src []byte, stride, rows int) (sum uint32, lowest, highest uint8) {
	_ = src[(rows-1)*stride:][:tileStride]
	_ = s.exps[:rows*tileCols]
	sum, low, high := scanAVX2(&src[0], stride, rows, &s.rowA[0], &s.colB[0], &s.exps[0])
	return sum, uint8(low), uint8(high)
}

func countAsm(s *scratch, highest uint8) counts {
	c := &s.work.counts
	countAVX2(&s.exps[0], uint32(highest), &c[0])
	return counts{window: c[0], top: [4]uint32(c[1:5]), below: [3]uint32(c[5:8])}
}

func outsideAsm(s *scratch, lo, hi uint8) int {
	return tileWeights - int(outsideAVX2(&s.exps[0], uint32(lo), uint32(hi-lo)))
}

func encodeAsm(s *scratch, dst, src []byte, stride int, base uint8) {
	_ = src[(tileRows-1)*stride:][:tileStride]
	_ = dst[:fixedBytes]
	encodeAVX2(&dst[0], &src[0], stride, uint32(base), &s.masks[0], (*uint64)(unsafe.Pointer(&s.work.planes)))
}

func decodeAsm(_ *scratch, dst []byte, stride int, fixed []byte, w0, w1 int, base uint8) {
	_ = fixed[:fixedBytes]
	if w0 >= w1 || w1 > format.WarpTiles {
		return
	}
	_ = dst[((w1-w0)*format.WarpRows-1)*stride:][:tileStride]
	decodeAVX2(&dst[0], stride, &fixed[w0*format.WarpSignMantissaSize], &fixed[format.BitmapOffset+w0*format.WarpBitmapSize], w1-w0, uint32(base))
}
