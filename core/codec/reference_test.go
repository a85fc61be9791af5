// SPDX-License-Identifier: Apache-2.0

package codec

import (
	"github.com/zipserv/zipserv/core/format"
)

// referenceBlob compresses weight by weight, as docs/format.md says it and with nothing in common with the codec but the layout's formulas.
func referenceBlob(src []byte, dt format.DType, m, k int) []byte {
	weight := func(r, c int) uint16 { return le.Uint16(src[2*(r*k+c):]) }
	h := format.Header{DType: dt, Mode: format.Raw, Shape: []uint64{uint64(m), uint64(k)}, M: uint64(m), K: uint64(k)}
	for r := range m {
		for c := range k { // section 7
			x := uint32(r)
			x ^= x >> 16
			x *= 0x7FEB352D
			x ^= x >> 15
			x *= 0x846CA68B
			x ^= x >> 16
			b := int16(uint16((uint64(c)*0x9E3779B1)%(1<<32)>>16) | 1)
			h.Checksum += (x | 1) * uint32(int32(b)) * uint32(int32(int16(weight(r, c))))
		}
	}
	var headers, fixed, lists []byte
	for mb := 0; mb < m; mb += 64 {
		for kb := 0; kb < k; kb += 64 {
			th, f, list := referenceTile(weight, dt, m, k, mb, kb)
			th.EscOffset = uint32(len(lists) / 16)
			b := make([]byte, 8)
			th.Put(b)
			headers, fixed, lists = append(headers, b...), append(fixed, f...), append(lists, list...)
		}
	}
	for len(headers)%128 != 0 {
		headers = append(headers, 0)
	}
	payload := append(append(headers, fixed...), lists...)
	if len(payload) < len(src) {
		h.Mode, h.EscapeBytes = format.Tiled, uint64(len(lists))
	} else {
		payload = src
	}
	header := h.Marshal()
	return append(header[:], payload...)
}

func referenceTile(weight func(r, c int) uint16, dt format.DType, m, k, mb, kb int) (h format.TileHeader, fixed, list []byte) {
	rows, cols := min(64, m-mb), min(64, k-kb)
	var count [256]int
	for r := range rows {
		for c := range cols {
			count[dt.Exponent(weight(mb+r, kb+c))]++
		}
	}
	covered := func(b int) (n int) {
		for e := b; e < b+8; e++ {
			n += count[e]
		}
		return n
	}
	best := -1
	for b := 0; b <= dt.MaxBase(); b++ {
		if n := covered(b); n > best {
			best, h.Base = n, uint8(b)
		}
	}
	var withLiteral, symbols []uint16
	var literals []byte
	for r := range rows {
		for c := range cols {
			e, b := int(dt.Exponent(weight(mb+r, kb+c))), int(h.Base)
			entry := uint16(64*r + c)
			switch {
			case e >= b && e < b+8:
			case e < b && e >= b-12:
				symbols = append(symbols, entry|uint16(b-1-e)<<12)
			case e >= b+8 && e <= b+10:
				symbols = append(symbols, entry|uint16(12+e-b-8)<<12)
			default:
				withLiteral, literals = append(withLiteral, entry|15<<12), append(literals, byte(e))
			}
		}
	}
	h.EscCount = uint16(len(withLiteral) + len(symbols))
	if 2*int(h.EscCount)+len(literals) > 4096 {
		h = format.TileHeader{Flags: 1}
		list = make([]byte, 4096)
	} else {
		for _, x := range append(withLiteral, symbols...) {
			list = append(list, byte(x), byte(x>>8))
		}
		list = append(list, literals...)
		for len(list)%16 != 0 {
			list = append(list, 0)
		}
	}
	fixed = make([]byte, dt.FixedSize())
	setBits := func(bitmaps []byte, p format.Place, code int) {
		for plane := range 3 {
			o, bit := p.PlaneBit(plane)
			le.PutUint32(bitmaps[o:], le.Uint32(bitmaps[o:])|uint32(code>>plane&1)<<bit)
		}
	}
	for r := range rows {
		for c := range cols {
			w, p := weight(mb+r, kb+c), format.PlaceOf(r, c)
			signMantissa := w & 0x807F
			if dt == format.FP16 {
				signMantissa = w&0x8000 | w>>3&0x7F
				setBits(fixed[5632:], p, int(w&7))
			}
			o, swapped := p.SignMantissa()
			if swapped {
				signMantissa = signMantissa<<8 | signMantissa>>8
			}
			le.PutUint16(fixed[o:], le.Uint16(fixed[o:])|signMantissa)
			e := int(dt.Exponent(w))
			if h.Dense() {
				list[64*r+c] = byte(e)
			} else if d := e - int(h.Base); d >= 0 && d < 8 {
				setBits(fixed[4096:], p, d)
			}
		}
	}
	return h, fixed, list
}
