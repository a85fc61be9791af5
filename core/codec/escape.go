// SPDX-License-Identifier: Apache-2.0

package codec

import (
	"math/bits"

	"github.com/zipserv/zipserv/core/format"
)

// symbols are the symbols of all distances from the base: symbols[255+d] is that of exponent base+d.
var symbols = func() (table [511]uint8) {
	for d := -255; d <= 255; d++ {
		table[255+d] = format.Symbol(uint8(max(0, -d)), uint8(max(0, d)))
	}
	return table
}()

// writeEscapes writes the list of a tile (format.md section 6) from the masks that the encode kernel left.
func (s *scratch) writeEscapes(list, src []byte, stride int, plan tilePlan, rows, cols int) error {
	n, literals := int(plan.header.EscCount), int(plan.literals)
	base := plan.header.Base
	found := s.positions(rows, ^uint64(0)>>(tileCols-cols))
	if found != n {
		return errChanged
	}
	// The next place of an entry with a literal byte, and of one without.
	lit, sym := 0, literals
	for _, position := range s.escaped[:found] {
		r, c := int(position/tileCols), int(position%tileCols)
		e := uint8(le.Uint16(src[r*stride+2*c:]) >> 7)
		symbol := symbols[255+int(e)-int(base)]
		entry := position | uint16(symbol)<<12
		if symbol != format.SymbolLiteral {
			if sym == n {
				return errChanged
			}
			le.PutUint16(list[2*sym:], entry)
			sym++
			continue
		}
		if lit == literals {
			return errChanged
		}
		le.PutUint16(list[2*lit:], entry)
		list[2*n+lit] = e
		lit++
	}
	if sym != n || lit != literals {
		return errChanged
	}
	clear(list[2*n+literals:])
	return nil
}

// positions lists the escapes of s.masks, rising, in s.escaped. Most rows have few: four are written whether they are there or not, and those
// that are not are overwritten by the next row's, which saves a branch that would be guessed wrong in every other row.
func (s *scratch) positions(rows int, columns uint64) (n int) {
	for r := range rows {
		mask, first := s.masks[r]&columns, uint16(r*tileCols)
		found := bits.OnesCount64(mask)
		to := s.escaped[n : n+4]
		for i := range to {
			to[i] = first + uint16(bits.TrailingZeros64(mask))
			mask &= mask - 1
		}
		for i := n + 4; mask != 0; i++ {
			s.escaped[i] = first + uint16(bits.TrailingZeros64(mask))
			mask &= mask - 1
		}
		n += found
	}
	return n
}

var errChanged = format.Argumentf("the weights were changed while they were being compressed")

// writeDense writes the exponents of a whole tile; padding is 0 already.
func writeDense(list, src []byte, stride int) {
	for r := range tileRows {
		row, out := src[r*stride:][:tileStride], list[r*tileCols:][:tileCols]
		for c := range out {
			out[c] = uint8(le.Uint16(row[2*c:]) >> 7)
		}
	}
}

// list is a tile's escape list, cut out of a blob and bounds-checked. Its entries may still say anything.
type list struct {
	dense    []byte // dense mode: the exponents
	entries  []byte // 2 n bytes
	literals []byte
	padding  []byte
	size     int
}

// readList finds the list of a tile in the escape section. It reads no more than the list's own bytes.
func readList(escapes []byte, h format.TileHeader) (list, error) {
	start := uint64(h.EscOffset) * format.EscapeUnit
	if start > uint64(len(escapes)) {
		return list{}, format.Invalidf("escape list starts at byte %d of %d", start, len(escapes))
	}
	rest := escapes[start:]
	if h.Dense() {
		if len(rest) < format.DenseSize {
			return list{}, format.Invalidf("dense tile's exponents at byte %d end behind the escape section's %d bytes", start, len(escapes))
		}
		return list{dense: rest[:format.DenseSize], size: format.DenseSize}, nil
	}
	n := int(h.EscCount)
	if len(rest) < 2*n {
		return list{}, format.Invalidf("list of %d escapes at byte %d ends behind the escape section's %d bytes", n, start, len(escapes))
	}
	literals := 0
	for literals < n && rest[2*literals+1]>>4 == format.SymbolLiteral {
		literals++
	}
	size := format.ListSize(n, literals)
	if len(rest) < size {
		return list{}, format.Invalidf("list of %d escapes, %d literals at byte %d ends behind the escape section's %d bytes", n, literals, start, len(escapes))
	}
	end := 2*n + literals
	return list{entries: rest[:2*n], literals: rest[2*n : end], padding: rest[end:size], size: size}, nil
}

// apply gives the escapes among rows [r0, r0+rows) x the first cols columns of a tile their exponents; dst starts at row r0. Nothing here
// trusts the list: positions outside are skipped, and exponents are cut to their 8 bits.
func (l list) apply(dst []byte, stride, r0, rows, cols int, base uint8) error {
	if l.dense != nil {
		for r := range rows {
			row, exps := dst[r*stride:][:2*cols], l.dense[(r0+r)*tileCols:][:cols]
			for c, e := range exps {
				setExponent(row[2*c:], e)
			}
		}
		return nil
	}
	for i := 0; i+1 < len(l.entries); i += 2 {
		entry := le.Uint16(l.entries[i:])
		r, c := int(entry>>6&63)-r0, int(entry&63)
		if r < 0 || r >= rows || c >= cols {
			continue
		}
		symbol := uint8(entry >> 12)
		e := uint8(format.SymbolExponent(base, symbol))
		if symbol == format.SymbolLiteral {
			if i/2 >= len(l.literals) {
				return errLiteralOrder
			}
			e = l.literals[i/2]
		}
		setExponent(dst[r*stride+2*c:], e)
	}
	return nil
}

var errLiteralOrder = format.Invalidf("an escape with a literal byte stands behind one without")

func setExponent(w []byte, e uint8) { le.PutUint16(w, le.Uint16(w)&format.MaskA|uint16(e)<<7) }
