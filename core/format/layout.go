// SPDX-License-Identifier: Apache-2.0

// Package format holds the layout of docs/format.md, version 1: constants, section offsets, the place of every bit, and the two
// kinds of header. It moves no weights; package codec does.
package format

// Block tile, warp tile and fixed part (format.md sections 1 and 5).
const (
	TileRows    = 64
	TileCols    = 64
	TileWeights = TileRows * TileCols
	WarpTiles   = 4  // warp tiles of a block tile
	WarpRows    = 16 // rows of a warp tile
	Lanes       = 32
	LaneWeights = 32 // weights of one lane in one warp tile
	LanePairs   = LaneWeights / 2
	Planes      = 3
	WindowSize  = 1 << Planes // consecutive exponents with a code

	HeaderSize     = 128
	SectionAlign   = 128
	TileHeaderSize = 8

	SignMantissaSize     = 4096 // of a block tile
	WarpSignMantissaSize = 1024
	WarpBitmapSize       = 384
	BitmapOffset         = SignMantissaSize // inside the fixed part
	BitmapSize           = WarpTiles * WarpBitmapSize
	LowBitmapOffset      = BitmapOffset + BitmapSize // FP16 only: the three lowest mantissa bits
	FixedBF16            = LowBitmapOffset
	FixedFP16            = LowBitmapOffset + BitmapSize

	EscapeUnit = 16   // escape lists start and end at multiples of this
	DenseSize  = 4096 // list of a tile in dense mode
	MaxDim     = 1<<31 - 1
	MaxDims    = 8
)

// Masks of one 16-bit half of a sign-and-mantissa word (format.md section 5).
const (
	MaskA = 0x807F // pair q: sign 15, mantissa 6..0
	MaskB = 0x7F80 // pair q+8, byte-swapped: mantissa 14..8, sign 7
)

// DType is the type of the original weights.
type DType uint8

// The types of version 1.
const (
	BF16 DType = 1
	FP16 DType = 2
)

func (d DType) String() string {
	switch d {
	case BF16:
		return "BF16"
	case FP16:
		return "FP16"
	}
	return "unknown"
}

// Valid tells whether d is a type of version 1.
func (d DType) Valid() bool { return d == BF16 || d == FP16 }

// MaxExponent is the largest value of the exponent field.
func (d DType) MaxExponent() int {
	if d == FP16 {
		return 31
	}
	return 255
}

// MaxBase is the largest base exponent of a window.
func (d DType) MaxBase() int { return d.MaxExponent() - (WindowSize - 1) }

// Exponent is the exponent field of a weight's 16 bits.
func (d DType) Exponent(w uint16) uint8 {
	if d == FP16 {
		return uint8(w >> 10 & 31)
	}
	return uint8(w >> 7)
}

// FixedSize is the size of a block tile's fixed part.
func (d DType) FixedSize() uint64 {
	if d == FP16 {
		return FixedFP16
	}
	return FixedBF16
}

// Mode tells how the payload is kept.
type Mode uint8

// The modes of version 1.
const (
	Raw   Mode = 0
	Tiled Mode = 1
)

func (m Mode) String() string {
	switch m {
	case Raw:
		return "raw"
	case Tiled:
		return "tiled"
	}
	return "unknown"
}

// Sections are the byte offsets of a blob's parts (format.md section 1).
type Sections struct {
	Tiles       uint64 // T, block tiles; 0 when raw
	TileHeaders uint64 // raw: where the weights start
	Fixed       uint64
	Escapes     uint64
	Total       uint64 // size of the blob
}

// TileCount is T, the number of block tiles of an M x K matrix.
func TileCount(m, k uint64) uint64 {
	return (m + TileRows - 1) / TileRows * ((k + TileCols - 1) / TileCols)
}

// TiledSections places the sections of a tiled blob. M and K are at most MaxDim, so nothing but an escapeBytes of 2^62 or
// more could overflow.
func TiledSections(d DType, m, k, escapeBytes uint64) Sections {
	t := TileCount(m, k)
	s := Sections{Tiles: t, TileHeaders: HeaderSize}
	s.Fixed = HeaderSize + roundUp(t*TileHeaderSize, SectionAlign)
	s.Escapes = s.Fixed + t*d.FixedSize()
	s.Total = s.Escapes + escapeBytes
	return s
}

// RawSize is the size of a raw blob.
func RawSize(m, k uint64) uint64 { return HeaderSize + 2*m*k }

// Place is where a weight of a block tile stands in the fixed part (format.md section 5).
type Place struct {
	Warp, Lane, N int // warp tile, lane, weight n = 8 i + j of the lane
}

// PlaceOf inverts the formula of section 5: row = 16 w + 8 floor(f/8) + l mod 8, column = 8 (f mod 8) + j, f = 4 i + floor(l/8).
func PlaceOf(row, col int) Place {
	f := row%WarpRows/8*8 + col/8
	return Place{Warp: row / WarpRows, Lane: f%4*8 + row%8, N: f/4*8 + col%8}
}

// SignMantissa is the byte offset in the fixed part of the 16-bit half that carries the weight, and whether the weight stands
// there byte-swapped (the MaskB bits).
func (p Place) SignMantissa() (offset int, swapped bool) {
	pair, half := p.N/2, p.N%2
	q := pair % 8
	return p.Warp*WarpSignMantissaSize + q/4*512 + p.Lane*16 + q%4*4 + half*2, pair >= 8
}

// PlaneBit is the byte offset, from the start of the bitmaps, of the 32-bit word that holds bit `plane` of the weight's code, and the
// bit's number in that word.
func (p Place) PlaneBit(plane int) (offset, bit int) {
	pair, half := p.N/2, p.N%2
	return p.Warp*WarpBitmapSize + plane*128 + p.Lane*4, 16*half + (pair+plane)%16
}

func roundUp(n, unit uint64) uint64 { return (n + unit - 1) / unit * unit }
