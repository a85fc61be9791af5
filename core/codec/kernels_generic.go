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

func scanPortable(s *scratch, src []byte, stride, rows int) (sum uint32, lowest, highest uint8) {
	lowest = 255
	for r := range rows {
		row := src[r*stride:][:tileStride]
		exps := s.exps[r*tileCols:][:tileCols]
		var part int32
		for c := range tileCols {
			w := le.Uint16(row[2*c:])
			e := uint8(w >> 7)
			exps[c] = e
			lowest, highest = min(lowest, e), max(highest, e)
			part += int32(int16(w)) * int32(int16(s.colB[c]))
		}
		sum += uint32(part) * s.rowA[r]
	}
	return sum, lowest, highest
}

func countPortable(s *scratch, highest uint8, _ bool) (c counts) {
	hist := &s.work.hist
	histogram(hist, s.exps[:])
	for i := range 8 {
		c.window += hist[highest-uint8(i)]
	}
	for i := range c.top {
		c.top[i] = hist[highest-uint8(i)]
	}
	for i := range c.below {
		c.below[i] = hist[highest-uint8(8+i)]
	}
	return c
}

func outsidePortable(s *scratch, lo, hi uint8) (n int) {
	for _, e := range s.exps {
		if e < lo || e > hi {
			n++
		}
	}
	return n
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
				var plane [3]uint32
				for i := range 4 { // chunk i of the lane: rows r and r+8, column blocks group and group+4
					half := upper
					if i >= 2 {
						half = lower
					}
					column := group + i%2*4
					for part := range 2 {
						d := le.Uint64(half[16*column+8*part:])>>7&lowByte4 + bias // exponent - base + 256 in each half
						if out := ((d ^ 0x100*lanes4) & (0x1F8 * lanes4)) + 0x7FF8*lanes4; out&(0x8000*lanes4) != 0 {
							out = out >> 15 & lanes4
							d &^= out * 7
							s.masks[row[i/2]] |= gather4(out) << (8*column + 4*part)
						}
						p := 4*i + 2*part
						for k := range 3 {
							bit := d >> k & lanes4
							plane[k] |= uint32(bit|bit>>31) << p
						}
					}
				}
				for k, v := range plane {
					le.PutUint32(bitmaps[k*128+(8*group+r)*4:], rotateHalves(v, k))
				}
			}
		}
	}
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
				var plane [3]uint32
				for k := range plane {
					plane[k] = rotateHalves(le.Uint32(bitmaps[k*128+(8*group+r)*4:]), -k)
				}
				for i := range 2 {
					for part := range 2 {
						o := 16*(group+4*i) + 8*part
						sm := le.Uint64(signMantissa[o/16*128+r*16+o%16:])
						p := 4*i + 2*part
						le.PutUint64(upper[o:], sm&maskA4|(codes4(&plane, p)+base4)<<7)
						le.PutUint64(lower[o:], swap4(sm)&maskA4|(codes4(&plane, p+8)+base4)<<7)
					}
				}
			}
		}
	}
}

// codes4 are the codes of pairs p and p+1.
func codes4(plane *[3]uint32, p int) uint64 {
	a, b, c := plane[0]>>p, plane[1]>>p, plane[2]>>p
	const pair = 0x00010001
	even := a&pair | b&pair<<1 | c&pair<<2
	odd := a>>1&pair | b>>1&pair<<1 | c>>1&pair<<2
	return uint64(even) | uint64(odd)<<32
}
