// SPDX-License-Identifier: Apache-2.0

package codec

import (
	"context"
	"sync/atomic"

	"github.com/zipserv/zipserv/core/format"
)

// Check proves that a blob keeps every rule of docs/format.md that its bytes can show (the list there, section 8). With full it also decodes
// the weights and compares their checksum with the header's.
func Check(ctx context.Context, blob []byte, full bool) error {
	v, err := Parse(blob)
	if err != nil {
		return err
	}
	if v.Header.Mode == format.Raw {
		if !full {
			return nil
		}
		sum, err := Checksum(ctx, blob[format.HeaderSize:], v.Header.M, v.Header.K)
		if err != nil {
			return err
		}
		return v.compareChecksum(sum)
	}
	for _, x := range blob[v.sec.TileHeaders+v.sec.Tiles*format.TileHeaderSize : v.sec.Fixed] {
		if x != 0 {
			return format.Invalidf("bytes between the tile headers and the fixed parts are not 0")
		}
	}
	var sum atomic.Uint32
	err = parallel(ctx, v.sec.Tiles, tileGrain, func(s *scratch, lo, hi uint64) error {
		var part uint32
		for t := lo; t < hi; t++ {
			if err := v.checkTile(s, t); err != nil {
				return format.InTile(t, err)
			}
			if full {
				x, err := v.decodedChecksum(s, t)
				if err != nil {
					return err
				}
				part += x
			}
		}
		sum.Add(part)
		return nil
	})
	if err != nil || !full {
		return err
	}
	return v.compareChecksum(sum.Load())
}

func (v *View) compareChecksum(sum uint32) error {
	if sum != v.Header.Checksum {
		return format.Invalidf("the weights' checksum is %08x, the header says %08x", sum, v.Header.Checksum)
	}
	return nil
}

// decodedChecksum is the checksum of tile t's weights.
func (v *View) decodedChecksum(s *scratch, t uint64) (uint32, error) {
	b := v.grid.tile(t)
	top := b.mb * tileRows
	out := rows{row0: top, row1: top + uint64(b.rows), kb0: b.kb, dst: s.out[:], stride: tileStride}
	if err := v.decodeTile(s, t, out); err != nil {
		return 0, err
	}
	return s.tileChecksum(b.mb, b.kb, s.out[:], tileStride, b.rows, b.cols), nil
}

// CheckLists proves of a blob what a decoder without checks of its own needs, so that it reads nothing but the blob: header, tile headers, and
// that each list lies where it should and says so itself. It reads these alone, some 3 % of the bytes.
func CheckLists(ctx context.Context, blob []byte) error {
	v, err := Parse(blob)
	if err != nil || v.Header.Mode == format.Raw {
		return err
	}
	return parallel(ctx, v.sec.Tiles, 8*tileGrain, func(_ *scratch, lo, hi uint64) error {
		for t := lo; t < hi; t++ {
			_, l, err := v.listOf(t)
			if err == nil {
				err = l.checkLiterals()
			}
			if err != nil {
				return format.InTile(t, err)
			}
		}
		return nil
	})
}

// checkLiterals wants no entry with a literal byte behind those that have none: there are no bytes for it.
func (l list) checkLiterals() error {
	found := uint16(0)
	for rest := l.entries[min(2*len(l.literals), len(l.entries)):]; len(rest) >= 2; rest = rest[2:] {
		found |= (le.Uint16(rest)>>12 + 1) & (format.SymbolLiteral + 1)
	}
	if found != 0 {
		return errLiteralOrder
	}
	return nil
}

// listOf finds a tile's list. Each list ends where the next begins, the first begins at 0, the last ends the section: so no two overlap and
// nothing is hidden between.
func (v *View) listOf(t uint64) (format.TileHeader, list, error) {
	h, l, err := v.tileList(t)
	if err != nil {
		return h, l, err
	}
	if t == 0 && h.EscOffset != 0 {
		return h, l, format.Invalidf("the first list starts at unit %d, not 0", h.EscOffset)
	}
	end := uint64(h.EscOffset) + uint64(l.size/format.EscapeUnit)
	next := v.Header.EscapeBytes / format.EscapeUnit
	if t+1 < v.sec.Tiles {
		next = uint64(format.ReadTileHeader(v.blob[v.sec.TileHeaders+(t+1)*format.TileHeaderSize:]).EscOffset)
	}
	if end != next {
		return h, l, format.Invalidf("its list ends at unit %d, what follows starts at %d", end, next)
	}
	return h, l, nil
}

func (v *View) checkTile(s *scratch, t uint64) error {
	h, l, err := v.listOf(t)
	if err != nil {
		return err
	}
	b, fixed := v.grid.tile(t), v.fixed(t)
	if !b.whole() {
		if err := checkPadding(fixed, b, v.Header.DType); err != nil {
			return err
		}
	}
	if h.Dense() {
		return l.checkDense(fixed, b, v.Header.DType)
	}
	if b.whole() && l.isRight(fixed, v.Header.DType, h.Base) {
		return nil
	}
	return l.check(s, fixed, b, v.Header.DType, h.Base)
}

// checkPadding wants all bits of padding to be 0.
func checkPadding(fixed []byte, b block, dt format.DType) error {
	for r := range tileRows {
		start := 0
		if r < b.rows {
			start = b.cols
		}
		for c := start; c < tileCols; c++ {
			p := r*tileCols + c
			o, swapped := format.PlaceOf(r, c).SignMantissa()
			mask := uint16(format.MaskA)
			if swapped {
				mask = format.MaskB
			}
			if le.Uint16(fixed[o:])&mask != 0 || code(fixed[format.BitmapOffset:], p) != 0 ||
				dt == format.FP16 && code(fixed[format.LowBitmapOffset:], p) != 0 {
				return format.Invalidf("padding in row %d, column %d is not 0", r, c)
			}
		}
	}
	return nil
}

// codePlaces are, for each position in a block tile, the place of its three code bits: looked up, because Check does it for each escape.
var codePlaces = func() (places [tileWeights]struct {
	word uint16 // plane k: k * 128 bytes on
	bit  [format.Planes]uint8
}) {
	for p := range places {
		for k := range format.Planes {
			o, bit := format.PlaceOf(p/tileCols, p%tileCols).PlaneBit(k)
			places[p].word = uint16(o - k*planeBytes)
			places[p].bit[k] = uint8(bit)
		}
	}
	return places
}()

const planeBytes = 4 * format.Lanes

// code reads the three bits of the weight at a position from bitmaps.
func code(bitmaps []byte, position int) uint32 {
	p := &codePlaces[position]
	b := bitmaps[p.word:][:2*planeBytes+4]
	return le.Uint32(b)>>(p.bit[0]&31)&1 | le.Uint32(b[planeBytes:])>>(p.bit[1]&31)&1<<1 | le.Uint32(b[2*planeBytes:])>>(p.bit[2]&31)&1<<2
}

func (l list) checkDense(fixed []byte, b block, dt format.DType) error {
	for _, x := range fixed[format.BitmapOffset:format.LowBitmapOffset] {
		if x != 0 {
			return format.Invalidf("dense tile has code bits that are not 0")
		}
	}
	for p, e := range l.dense {
		if int(e) > dt.MaxExponent() {
			return format.Invalidf("exponent %d at position %d, the largest of %v is %d", e, p, dt, dt.MaxExponent())
		}
		if e != 0 && (p/tileCols >= b.rows || p%tileCols >= b.cols) {
			return format.Invalidf("padding at position %d has exponent %d", p, e)
		}
	}
	return nil
}

// isRight is check for a whole tile, without its words: true means that check finds nothing. It looks at all entries and decides at the end,
// which takes half the time of asking at each.
func (l list) isRight(fixed []byte, dt format.DType, base uint8) bool {
	n := 2 * len(l.literals)
	bitmaps := fixed[format.BitmapOffset:]
	bad, last := uint32(0), -1
	for i, e := range l.literals {
		position := int(le.Uint16(l.entries[2*i:]) & 0xFFF)
		d := int(e) - int(base)
		inWindow := d >= 0 && d < format.WindowSize
		if position <= last || inWindow || format.Symbol(base, e) != format.SymbolLiteral || int(e) > dt.MaxExponent() {
			return false
		}
		last = position
		bad |= code(bitmaps, position)
	}
	// The next position that has a literal: the others must step over it.
	literals, literal := l.entries[:n], -1
	allowed := allowedSymbols[dt&1][base]
	last = -1
	for rest := l.entries[n:]; len(rest) >= 2; rest = rest[2:] {
		entry := le.Uint16(rest)
		position := int(entry & 0xFFF)
		bad |= uint32(position-last-1) >> 31
		bad |= uint32(^allowed>>(entry>>12)) & 1
		bad |= code(bitmaps, position)
		last = position
		for literal < position {
			literal = tileWeights
			if len(literals) > 0 {
				literal = int(le.Uint16(literals) & 0xFFF)
				literals = literals[2:]
			}
		}
		if literal == position {
			return false
		}
	}
	for _, x := range l.padding {
		bad |= uint32(x)
	}
	return bad == 0
}

// allowedSymbols are, for each dtype (its lowest bit) and base, the symbols of a list without a literal byte, one bit each.
var allowedSymbols = func() (table [2][256]uint16) {
	for _, dt := range []format.DType{format.BF16, format.FP16} {
		for base := range table[dt&1] {
			for symbol := range uint8(format.SymbolLiteral) {
				if e := format.SymbolExponent(uint8(base), symbol); e >= 0 && e <= dt.MaxExponent() {
					table[dt&1][base] |= 1 << symbol
				}
			}
		}
	}
	return table
}()

func (l list) check(s *scratch, fixed []byte, b block, dt format.DType, base uint8) error {
	last := -1
	clear(s.masks[:])
	for i := 0; i < len(l.entries); i += 2 {
		entry := le.Uint16(l.entries[i:])
		position, symbol := int(entry&0xFFF), uint8(entry>>12)
		literal := i/2 < len(l.literals)
		if i/2 == len(l.literals) {
			last = -1
		}
		if !literal && symbol == format.SymbolLiteral {
			return errLiteralOrder
		}
		if position <= last {
			return format.Invalidf("escape at position %d follows one at %d", position, last)
		}
		last = position
		r, c := position/tileCols, position%tileCols
		if r >= b.rows || c >= b.cols {
			return format.Invalidf("escape at position %d is in the padding of a tile of %d x %d weights", position, b.rows, b.cols)
		}
		// Both groups rise, so only one with a literal and one without can meet.
		if s.masks[r]>>c&1 != 0 {
			return format.Invalidf("two escapes at position %d", position)
		}
		s.masks[r] |= 1 << c
		e := format.SymbolExponent(base, symbol)
		if literal {
			e = int(l.literals[i/2])
			if d := e - int(base); d >= 0 && d < format.WindowSize || format.Symbol(base, uint8(e)) != format.SymbolLiteral {
				return format.Invalidf("literal exponent %d at position %d has a code or a symbol at base %d", e, position, base)
			}
		}
		if e < 0 || e > dt.MaxExponent() {
			return format.Invalidf("escape at position %d has exponent %d, allowed are 0 to %d", position, e, dt.MaxExponent())
		}
		if code(fixed[format.BitmapOffset:], position) != 0 {
			return format.Invalidf("escape at position %d has a code that is not 0", position)
		}
	}
	for _, x := range l.padding {
		if x != 0 {
			return format.Invalidf("bytes behind an escape list are not 0")
		}
	}
	return nil
}

// Stats counts what a blob holds. It reads headers and lists; it does not check them as Check does.
func (v *View) Stats(ctx context.Context) (Stats, error) {
	st := Stats{Weights: v.Header.M * v.Header.K, Tiles: v.sec.Tiles, Bytes: v.sec.Total}
	var escapes, literals, dense atomic.Uint64
	err := parallel(ctx, v.sec.Tiles, 8*tileGrain, func(_ *scratch, lo, hi uint64) error {
		for t := lo; t < hi; t++ {
			h, l, err := v.tileList(t)
			if err != nil {
				return format.InTile(t, err)
			}
			escapes.Add(uint64(len(l.entries) / 2))
			literals.Add(uint64(len(l.literals)))
			if h.Dense() {
				dense.Add(1)
			}
		}
		return nil
	})
	st.Escapes, st.Literals, st.DenseTiles = escapes.Load(), literals.Load(), dense.Load()
	return st, err
}
