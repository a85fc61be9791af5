// SPDX-License-Identifier: Apache-2.0

package format

import (
	"encoding/binary"
	"hash/crc32"
	"math/bits"
)

// Magic opens every blob.
const Magic = "ZIPSERV\x00"

// Version is the only version of the format so far.
const Version = 1

// Header is the blob's header (format.md section 2).
type Header struct {
	DType       DType
	Mode        Mode
	Shape       []uint64 // 1..8 dimensions with the product M K
	M, K        uint64
	EscapeBytes uint64 // 0 when raw
	Checksum    uint32 // of the original weights, section 7
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Marshal writes the header; h must be valid (Validate).
func (h Header) Marshal() [HeaderSize]byte {
	var b [HeaderSize]byte
	le := binary.LittleEndian
	copy(b[:], Magic)
	le.PutUint32(b[8:], Version)
	b[12], b[13], b[14] = byte(h.DType), byte(h.Mode), byte(len(h.Shape))
	le.PutUint64(b[16:], h.M)
	le.PutUint64(b[24:], h.K)
	for i, n := range h.Shape {
		le.PutUint64(b[32+8*i:], n)
	}
	le.PutUint64(b[96:], h.EscapeBytes)
	le.PutUint32(b[104:], h.Checksum)
	le.PutUint32(b[124:], crc32.Checksum(b[:124], castagnoli))
	return b
}

// ParseHeader reads and checks the first 128 bytes of a blob.
func ParseHeader(b []byte) (Header, error) {
	if len(b) < HeaderSize {
		return Header{}, Invalidf("%d bytes, shorter than the header's %d", len(b), HeaderSize)
	}
	le := binary.LittleEndian
	if string(b[:8]) != Magic {
		return Header{}, Invalidf("starts with %q, not with %q", b[:8], Magic)
	}
	// The version comes before the CRC: a later version may place its CRC elsewhere.
	if v := le.Uint32(b[8:]); v != Version {
		return Header{}, Invalidf("version %d, this reader knows version %d", v, Version)
	}
	if got, want := crc32.Checksum(b[:124], castagnoli), le.Uint32(b[124:]); got != want {
		return Header{}, Invalidf("header CRC is %08x, the header says %08x", got, want)
	}
	ndim := int(b[14])
	if ndim < 1 || ndim > MaxDims {
		return Header{}, Invalidf("%d dimensions, allowed are 1 to %d", ndim, MaxDims)
	}
	h := Header{
		DType: DType(b[12]), Mode: Mode(b[13]),
		M: le.Uint64(b[16:]), K: le.Uint64(b[24:]),
		EscapeBytes: le.Uint64(b[96:]), Checksum: le.Uint32(b[104:]),
	}
	for i := range MaxDims {
		n := le.Uint64(b[32+8*i:])
		if i < ndim {
			h.Shape = append(h.Shape, n)
		} else if n != 0 {
			return Header{}, Invalidf("unused dimension %d is %d, not 0", i, n)
		}
	}
	if b[15] != 0 || !allZero(b[108:124]) {
		return Header{}, Invalidf("reserved header bytes are not 0")
	}
	if err := h.Validate(); err != nil {
		return Header{}, Invalidf("%v", err) // what is an argument to a writer is data to a reader
	}
	return h, nil
}

// Validate checks the header's fields against each other.
func (h Header) Validate() error {
	if !h.DType.Valid() {
		return Argumentf("dtype is %d, allowed are 1 (BF16) and 2 (FP16)", h.DType)
	}
	if h.Mode > Tiled {
		return Argumentf("mode is %d, allowed are 0 (raw) and 1 (tiled)", h.Mode)
	}
	if h.M < 1 || h.M > MaxDim || h.K < 1 || h.K > MaxDim {
		return Argumentf("matrix is %d x %d, allowed are 1 to %d rows and columns", h.M, h.K, uint64(MaxDim))
	}
	if len(h.Shape) < 1 || len(h.Shape) > MaxDims {
		return Argumentf("%d dimensions, allowed are 1 to %d", len(h.Shape), MaxDims)
	}
	product := uint64(1)
	for _, n := range h.Shape {
		hi, lo := bits.Mul64(product, n)
		if hi != 0 {
			return Argumentf("shape %v has more than 2^64 elements", h.Shape)
		}
		product = lo
	}
	if product != h.M*h.K {
		return Argumentf("shape %v has %d elements, the matrix %d x %d has %d", h.Shape, product, h.M, h.K, h.M*h.K)
	}
	if h.Mode == Raw && h.EscapeBytes != 0 {
		return Argumentf("a raw blob has no escapes, the header says %d bytes", h.EscapeBytes)
	}
	if h.EscapeBytes%EscapeUnit != 0 {
		return Argumentf("%d bytes of escapes, not a multiple of %d", h.EscapeBytes, EscapeUnit)
	}
	if h.EscapeBytes > TileCount(h.M, h.K)*DenseSize {
		return Argumentf("%d bytes of escapes, the matrix %d x %d has at most %d", h.EscapeBytes, h.M, h.K, TileCount(h.M, h.K)*DenseSize)
	}
	return nil
}

// Sections places the blob's parts.
func (h Header) Sections() Sections {
	if h.Mode == Raw {
		n := RawSize(h.M, h.K)
		return Sections{TileHeaders: HeaderSize, Fixed: n, Escapes: n, Total: n}
	}
	return TiledSections(h.DType, h.M, h.K, h.EscapeBytes)
}

func allZero(b []byte) bool {
	for _, x := range b {
		if x != 0 {
			return false
		}
	}
	return true
}
