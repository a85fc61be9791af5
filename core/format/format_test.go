// SPDX-License-Identifier: Apache-2.0

package format

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"testing"

	"github.com/stretchr/testify/require"
)

// The formula of section 5, the other way round than PlaceOf: lane, chunk and number to row and column.
func TestPlaceOf(t *testing.T) {
	seen := map[[2]int]bool{}
	halves := map[[2]any]bool{}
	for w := range WarpTiles {
		for l := range Lanes {
			for i := range 4 {
				for j := range 8 {
					f := 4*i + l/8
					row, col := 16*w+8*(f/8)+l%8, 8*(f%8)+j
					seen[[2]int{row, col}] = true
					p := PlaceOf(row, col)
					require.Equal(t, Place{w, l, 8*i + j}, p)
					o, swapped := p.SignMantissa()
					require.Less(t, o, SignMantissaSize)
					halves[[2]any{o, swapped}] = true
					for k := range Planes {
						o, bit := p.PlaneBit(k)
						require.Less(t, o, BitmapSize)
						halves[[2]any{o*8 + bit, "plane"}] = true
					}
				}
			}
		}
	}
	require.Len(t, seen, TileWeights)
	require.Len(t, halves, TileWeights*(1+Planes), "two weights share a place")
}

func TestSymbols(t *testing.T) {
	for base := range 249 {
		for e := range 256 {
			d := e - base
			if d >= 0 && d < WindowSize {
				continue
			}
			s := Symbol(uint8(base), uint8(e))
			require.Equal(t, s != SymbolLiteral, d >= -12 && d <= 10)
			if s != SymbolLiteral {
				require.Equal(t, e, SymbolExponent(uint8(base), s))
			}
		}
	}
}

func TestTileHeader(t *testing.T) {
	b := make([]byte, 8)
	h := TileHeader{EscOffset: 0x04030201, EscCount: 0x0605, Base: 7, Flags: 8}
	h.Put(b)
	require.Equal(t, []byte{1, 2, 3, 4, 5, 6, 7, 8}, b)
	require.Equal(t, h, ReadTileHeader(b))
	require.NoError(t, TileHeader{Base: 248, EscCount: 4096}.Validate(BF16))
	require.NoError(t, TileHeader{Flags: FlagDense}.Validate(FP16))
	for _, bad := range []TileHeader{{Flags: 2}, {Flags: 1, Base: 1}, {Flags: 1, EscCount: 1}, {Base: 249}, {EscCount: 4097}} {
		require.ErrorIs(t, bad.Validate(BF16), ErrInvalid)
	}
	require.ErrorIs(t, TileHeader{Base: 25}.Validate(FP16), ErrInvalid)
}

func TestHeaderRoundTrip(t *testing.T) {
	for _, h := range []Header{
		{DType: BF16, Mode: Raw, Shape: []uint64{1}, M: 1, K: 1},
		{DType: FP16, Mode: Tiled, Shape: []uint64{2, 3, 4, 5, 6, 7, 8, 9}, M: 5040, K: 72, EscapeBytes: 1600, Checksum: 0xDEADBEEF},
		{DType: BF16, Mode: Tiled, Shape: []uint64{MaxDim, MaxDim}, M: MaxDim, K: MaxDim},
	} {
		b := h.Marshal()
		got, err := ParseHeader(b[:])
		require.NoError(t, err)
		require.Equal(t, h, got)
		for i := range 8 * HeaderSize {
			b[i/8] ^= 1 << (i % 8)
			_, err := ParseHeader(b[:])
			require.ErrorIs(t, err, ErrInvalid, "bit %d", i)
			b[i/8] ^= 1 << (i % 8)
		}
		_, err = ParseHeader(b[:HeaderSize-1])
		require.ErrorIs(t, err, ErrInvalid)
	}
}

func TestSections(t *testing.T) {
	h := Header{DType: BF16, Mode: Tiled, Shape: []uint64{65, 1100}, M: 65, K: 1100, EscapeBytes: 48}
	require.Equal(t, Sections{Tiles: 36, TileHeaders: 128, Fixed: 128 + 384, Escapes: 512 + 36*5632, Total: 512 + 36*5632 + 48}, h.Sections())
	h.Mode, h.EscapeBytes = Raw, 0
	require.EqualValues(t, 128+2*65*1100, h.Sections().Total)
	// The largest matrix does not overflow.
	h = Header{DType: FP16, Mode: Tiled, M: MaxDim, K: MaxDim}
	require.EqualValues(t, 1<<50, h.Sections().Tiles)
	require.EqualValues(t, 128+1<<53+7168<<50, h.Sections().Total)
}

func TestErrors(t *testing.T) {
	err := InTile(7, Invalidf("x is %d", 3))
	require.EqualError(t, err, "invalid ZipServ blob: block tile 7: x is 3")
	require.ErrorIs(t, err, ErrInvalid)
	require.EqualError(t, Argumentf("x is %d", 3), "x is 3")
	require.ErrorIs(t, InTile(1, Argumentf("y")), ErrArgument)
	other := errors.New("other")
	require.Equal(t, other, InTile(1, other))
	require.Equal(t, "BF16 FP16 unknown raw tiled unknown", BF16.String()+" "+FP16.String()+" "+DType(0).String()+" "+Raw.String()+" "+Tiled.String()+" "+Mode(9).String())
}

// FuzzHeader: a header that is accepted is the one that its fields give.
func FuzzHeader(f *testing.F) {
	h := Header{DType: BF16, Mode: Tiled, Shape: []uint64{64, 64}, M: 64, K: 64, EscapeBytes: 16, Checksum: 5}.Marshal()
	f.Add(h[:])
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < HeaderSize {
			return
		}
		binary.LittleEndian.PutUint32(b[124:], crc32.Checksum(b[:124], castagnoli))
		h, err := ParseHeader(b)
		if err != nil {
			require.ErrorIs(t, err, ErrInvalid)
			return
		}
		require.NoError(t, h.Validate())
		got := h.Marshal()
		require.Equal(t, b[:HeaderSize], got[:])
		require.GreaterOrEqual(t, h.Sections().Total, uint64(HeaderSize)+2)
	})
}
