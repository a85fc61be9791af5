// SPDX-License-Identifier: Apache-2.0

package format

import "encoding/binary"

// FlagDense marks a tile whose list holds every exponent (format.md section 6).
const FlagDense = 1

// TileHeader is the header of a block tile (format.md section 4).
type TileHeader struct {
	EscOffset uint32 // in units of EscapeUnit bytes
	EscCount  uint16
	Base      uint8
	Flags     uint8
}

// Dense tells whether the tile is in dense mode.
func (t TileHeader) Dense() bool { return t.Flags&FlagDense != 0 }

// Put writes the tile header to b[:8].
func (t TileHeader) Put(b []byte) {
	binary.LittleEndian.PutUint64(b, uint64(t.EscOffset)|uint64(t.EscCount)<<32|uint64(t.Base)<<48|uint64(t.Flags)<<56)
}

// ReadTileHeader reads a tile header from b[:8]; Validate checks it.
func ReadTileHeader(b []byte) TileHeader {
	v := binary.LittleEndian.Uint64(b)
	return TileHeader{EscOffset: uint32(v), EscCount: uint16(v >> 32), Base: uint8(v >> 48), Flags: uint8(v >> 56)}
}

// Validate checks the fields that need no list to be checked.
func (t TileHeader) Validate(d DType) error {
	switch {
	case t.Flags&^FlagDense != 0:
		return Invalidf("tile flags are %#x, only bit 0 is known", t.Flags)
	case t.Dense() && (t.Base != 0 || t.EscCount != 0):
		return Invalidf("dense tile has base %d and %d escapes, both must be 0", t.Base, t.EscCount)
	case int(t.Base) > d.MaxBase():
		return Invalidf("base exponent is %d, at most %d for %v", t.Base, d.MaxBase(), d)
	case t.EscCount > TileWeights:
		return Invalidf("%d escapes in a tile of %d weights", t.EscCount, TileWeights)
	}
	return nil
}

// Symbols of an escape entry (format.md section 6).
const (
	SymbolsBelow  = 12 // 0..11: exponent b-1-s
	SymbolsAbove  = 3  // 12..14: exponent b+8+(s-12)
	SymbolLiteral = 15
)

// Symbol is the symbol of an exponent outside the window of base.
func Symbol(base, exponent uint8) uint8 {
	d := int(exponent) - int(base)
	switch {
	case d < 0 && d >= -SymbolsBelow:
		return uint8(-1 - d)
	case d >= WindowSize && d < WindowSize+SymbolsAbove:
		return uint8(d - WindowSize + SymbolsBelow)
	}
	return SymbolLiteral
}

// SymbolExponent is the exponent that a symbol below 15 means; it may lie outside 0..MaxExponent in a damaged list.
func SymbolExponent(base, symbol uint8) int {
	if symbol < SymbolsBelow {
		return int(base) - 1 - int(symbol)
	}
	return int(base) + WindowSize + int(symbol) - SymbolsBelow
}

// ListSize is the size of the list of n escapes of which `literals` carry a byte of their own.
func ListSize(n, literals int) int {
	return (2*n + literals + EscapeUnit - 1) / EscapeUnit * EscapeUnit
}

// NeedsDense tells whether a tile must be in dense mode.
func NeedsDense(n, literals int) bool { return 2*n+literals > DenseSize }
