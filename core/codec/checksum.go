// SPDX-License-Identifier: Apache-2.0

package codec

import (
	"context"
	"encoding/binary"
	"sync/atomic"

	"github.com/zipserv/zipserv/core/format"
)

const columnStep = 0x9E3779B1

// rowFactor is A(r) of format.md section 7.
func rowFactor(r uint32) uint32 {
	r ^= r >> 16
	r *= 0x7FEB352D
	r ^= r >> 15
	r *= 0x846CA68B
	r ^= r >> 16
	return r | 1
}

// factors fills the checksum factors A(r) and B(c) of tile (mb, kb); those of the last tile's row or column are kept.
func (s *scratch) factors(mb, kb uint64) {
	if s.rowTag != mb+1 {
		for i := range s.rowA {
			s.rowA[i] = rowFactor(uint32(mb)*tileRows + uint32(i))
		}
		s.rowTag = mb + 1
	}
	if s.colTag != kb+1 {
		x := uint32(kb) * tileCols
		x *= columnStep
		for i := range s.colB {
			s.colB[i] = uint16(x>>16) | 1
			x += columnStep
		}
		s.colTag = kb + 1
	}
}

// tileChecksum sums the rows x cols weights at src, part of tile (mb, kb).
func (s *scratch) tileChecksum(mb, kb uint64, src []byte, stride, rows, cols int) uint32 {
	s.factors(mb, kb)
	if cols == tileCols {
		sum, _, _ := kern.scan(s, src, stride, rows)
		return sum
	}
	var sum uint32
	for r := range rows {
		row := src[r*stride : r*stride+2*cols]
		var part int32
		for c := range cols {
			part += int32(int16(binary.LittleEndian.Uint16(row[2*c:]))) * int32(int16(s.colB[c]))
		}
		sum += uint32(part) * s.rowA[r]
	}
	return sum
}

// Checksum is the checksum of an m x k matrix of 16-bit weights (format.md section 7).
func Checksum(ctx context.Context, src []byte, m, k uint64) (uint32, error) {
	if err := checkMatrix(src, m, k); err != nil {
		return 0, err
	}
	var sum atomic.Uint32
	g := newGrid(m, k)
	err := parallel(ctx, g.tiles, tileGrain, func(s *scratch, lo, hi uint64) error {
		var part uint32
		for t := lo; t < hi; t++ {
			b := g.tile(t)
			part += s.tileChecksum(b.mb, b.kb, src[b.offset:], g.stride, b.rows, b.cols)
		}
		sum.Add(part)
		return nil
	})
	return sum.Load(), err
}

func checkMatrix(src []byte, m, k uint64) error {
	if m < 1 || m > format.MaxDim || k < 1 || k > format.MaxDim {
		return format.Argumentf("matrix is %d x %d, allowed are 1 to %d rows and columns", m, k, uint64(format.MaxDim))
	}
	if uint64(len(src)) != 2*m*k {
		return format.Argumentf("%d bytes of weights, a matrix of %d x %d 16-bit weights has %d", len(src), m, k, 2*m*k)
	}
	return nil
}
