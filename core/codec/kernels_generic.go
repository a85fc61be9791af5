// SPDX-License-Identifier: Apache-2.0

package codec

import (
	"encoding/binary"
	"math/bits"

	"github.com/zipserv/zipserv/core/format"
)

// Four weights at a time in a 64-bit word: these constants repeat a 16-bit value four times.
const (
	lanes4   = 0x0001_0001_0001_0001
	maskA4   = format.MaskA * lanes4
	maskB4   = format.MaskB * lanes4
	lowByte4 = 0x00FF * lanes4
)

var le = binary.LittleEndian

// swap4 swaps the bytes of each 16-bit half.
func swap4(x uint64) uint64 { return x>>8&lowByte4 | x&lowByte4<<8 }

// scanPortable does not look for the extremes: the set has no counts either, and the window is chosen from the whole histogram.
func scanPortable(s *scratch, src []byte, stride, rows int) (sum uint32, lowest, highest uint8) {
	for r := range rows {
		row := src[r*stride:][:tileStride]
		exps := s.exps[r*tileCols:][:tileCols]
		var part int32
		for c := 0; c < tileCols; c += 4 {
			w := le.Uint64(row[2*c:])
			e := w >> 7 & lowByte4
			e |= e >> 8
			le.PutUint32(exps[c:], uint32(e&0xFFFF|e>>16&0xFFFF0000))
			b := (*[4]uint16)(s.colB[c:])
			part += int32(int16(w))*int32(int16(b[0])) + int32(int16(w>>16))*int32(int16(b[1])) +
				int32(int16(w>>32))*int32(int16(b[2])) + int32(int16(w>>48))*int32(int16(b[3]))
		}
		sum += uint32(part) * s.rowA[r]
	}
	return sum, 0, 255
}

func encodePortable(s *scratch, dst, src []byte, stride int, base uint8) {
	bias := (0x100 - uint64(base)) * lanes4
	clear(s.masks[:])
	for w := range format.WarpTiles {
		signMantissa := dst[w*format.WarpSignMantissaSize:][:format.WarpSignMantissaSize]
		bitmaps := dst[format.BitmapOffset+w*format.WarpBitmapSize:][:format.WarpBitmapSize]
		for r := range 8 {
			row := [2]int{16*w + r, 16*w + r + 8}
			upper, lower := src[row[0]*stride:][:tileStride], src[row[1]*stride:][:tileStride]
			for o := 0; o < tileStride; o += 8 {
				a, b := le.Uint64(upper[o:]), le.Uint64(lower[o:])
				le.PutUint64(signMantissa[o/16*128+r*16+o%16:], a&maskA4|swap4(b)&maskB4)
			}
			for group := range 4 {
				var p0, p1, p2 uint32
				for i := range 4 { // chunk i of the lane: rows r and r+8, column blocks group and group+4
					half := upper
					if i >= 2 {
						half = lower
					}
					column := group + i%2*4
					chunk := half[16*column:][:16]
					a := le.Uint64(chunk)>>7&lowByte4 + bias // exponent - base + 256 in each half
					b := le.Uint64(chunk[8:])>>7&lowByte4 + bias
					if outA, outB := outside4(a), outside4(b); outA|outB != 0 {
						a &^= outA * 7
						b &^= outB * 7
						s.masks[row[i/2]] |= (gather4(outA) | gather4(outB)<<4) << (8 * column)
					}
					p0 |= codeBits(a, b) << (4 * i)
					p1 |= codeBits(a>>1, b>>1) << (4 * i)
					p2 |= codeBits(a>>2, b>>2) << (4 * i)
				}
				o := (8*group + r) * 4
				le.PutUint32(bitmaps[o:], p0)
				le.PutUint32(bitmaps[planeBytes+o:], rotateHalves(p1, 1))
				le.PutUint32(bitmaps[2*planeBytes+o:], rotateHalves(p2, 2))
			}
		}
	}
}

// outside4 tells in bit 0 of each half whether exponent - base + 256 there is not in 256..263.
func outside4(d uint64) uint64 {
	return ((d^0x100*lanes4)&(0x1F8*lanes4) + 0x7FF8*lanes4) >> 15 & lanes4
}

// codeBits are the bits 0 of the halves of two pairs each in a and b, where pairs 0..3 have theirs.
func codeBits(a, b uint64) uint32 {
	a, b = a&lanes4, b&lanes4
	return uint32(a|a>>31) | uint32(b|b>>31)<<2
}

// gather4 collects bit 0 of the four halves into bits 0..3.
func gather4(x uint64) uint64 { return (x | x>>15 | x>>30 | x>>45) & 15 }

// rotateHalves rotates each 16-bit half left by k.
func rotateHalves(v uint32, k int) uint32 {
	lo, hi := bits.RotateLeft16(uint16(v), k), bits.RotateLeft16(uint16(v>>16), k)
	return uint32(lo) | uint32(hi)<<16
}

func decodePortable(_ *scratch, dst []byte, stride int, fixed []byte, w0, w1 int, base uint8) {
	base4 := uint64(base) * lanes4
	for w := w0; w < w1; w++ {
		signMantissa := fixed[w*format.WarpSignMantissaSize:][:format.WarpSignMantissaSize]
		bitmaps := fixed[format.BitmapOffset+w*format.WarpBitmapSize:][:format.WarpBitmapSize]
		for r := range 8 {
			upper := dst[(16*(w-w0)+r)*stride:][:tileStride]
			lower := dst[(16*(w-w0)+r+8)*stride:][:tileStride]
			for group := range 4 {
				o := (8*group + r) * 4
				p0 := le.Uint32(bitmaps[o:])
				p1 := rotateHalves(le.Uint32(bitmaps[planeBytes+o:]), -1)
				p2 := rotateHalves(le.Uint32(bitmaps[2*planeBytes+o:]), -2)
				for i := range 4 {
					at := 16*(group+i/2*4) + i%2*8 // half a chunk
					sm := le.Uint64(signMantissa[at/16*128+r*16+at%16:])
					p := 2 * i
					le.PutUint64(upper[at:], sm&maskA4|(codes4(p0>>p, p1>>p, p2>>p)+base4)<<7)
					p += 8
					le.PutUint64(lower[at:], swap4(sm)&maskA4|(codes4(p0>>p, p1>>p, p2>>p)+base4)<<7)
				}
			}
		}
	}
}

// codes4 are the codes of two pairs from their bits 0 and 1, 16 and 17.
func codes4(a, b, c uint32) uint64 {
	const pair = 0x00010001
	even := a&pair | b&pair<<1 | c&pair<<2
	odd := a>>1&pair | b&(pair<<1) | c&(pair<<1)<<1
	return uint64(even) | uint64(odd)<<32
}
