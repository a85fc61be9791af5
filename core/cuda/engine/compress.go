// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"encoding/binary"

	"github.com/zipserv/zipserv/core/cuda/driver"
	"github.com/zipserv/zipserv/core/cuda/plan"
	"github.com/zipserv/zipserv/core/format"
)

// Compression is a BF16 matrix in device memory that is to be compressed, row-major, its rows ld elements apart.
type Compression struct {
	Stream  driver.Stream
	Src     driver.Pointer
	Ld      uint64
	Header  format.Header  // M, K and Shape; the rest is filled in by CompressPlan
	Scratch driver.Pointer // CompressScratch bytes, which belong to the compression from CompressPlan to the end of CompressWrite's work
}

type compressor struct {
	plan              plan.Compression
	first, scan, last *kernel
}

type compressKey struct{ m, k uint64 }

func (d *Device) compressor(m, k uint64) (*compressor, error) {
	key := compressKey{m, k}
	if c, known := d.codecs.Load(key); known {
		return c.(*compressor), nil
	}
	c := &compressor{plan: plan.Compress(d.planDevice, m, k)}
	var err error
	for _, part := range []struct {
		to   **kernel
		from plan.Kernel
	}{{&c.first, c.plan.Plan}, {&c.scan, c.plan.Scan}, {&c.last, c.plan.Write}} {
		if *part.to, err = d.prepare(part.from); err != nil {
			return nil, err
		}
	}
	d.codecs.Store(key, c)
	return c, nil
}

func (p *Compression) check() error {
	p.Header.DType = format.BF16
	p.Header.Mode = format.Raw
	if err := p.Header.Validate(); err != nil {
		return badArgument("%v", err)
	}
	if p.Ld < p.Header.K {
		return badArgument("rows of %d elements do not fit at a distance of %d", p.Header.K, p.Ld)
	}
	if plan.Tiles(p.Header.M, p.Header.K) >= 1<<31 {
		return badArgument("a matrix of %d x %d is too large for a GPU", p.Header.M, p.Header.K)
	}
	return nil
}

// CompressScratch is the bytes of device memory that a compression needs beside the blob.
func (d *Device) CompressScratch(m, k uint64) uint64 {
	return plan.Compress(d.planDevice, m, k).Scratch
}

// CompressPlan reads the weights, waits for the result and fills in the header, whose Sections then tell the blob's size.
func (d *Device) CompressPlan(p *Compression) error {
	if err := p.check(); err != nil {
		return err
	}
	h := &p.Header
	c, err := d.compressor(h.M, h.K)
	if err != nil {
		return err
	}
	if err := d.launch(c.first, p.Stream, uint64(p.Src), p.Ld, h.M, h.K, uint64(p.Scratch)); err != nil {
		return err
	}
	if err := d.launch(c.scan, p.Stream, uint64(c.plan.Blocks), uint64(p.Scratch)); err != nil {
		return err
	}
	var totals [16]byte
	if err := d.ctx.Read(p.Stream, totals[:], p.Scratch); err != nil {
		return err
	}
	h.Checksum = binary.LittleEndian.Uint32(totals[8:])
	h.EscapeBytes = 16 * binary.LittleEndian.Uint64(totals[:])
	if format.TiledSections(h.DType, h.M, h.K, h.EscapeBytes).Total < format.RawSize(h.M, h.K) {
		h.Mode = format.Tiled
	} else {
		h.EscapeBytes = 0
	}
	return nil
}

// CompressWrite queues the writing of the blob that CompressPlan has planned. Of a raw blob it writes the header only: the matrix is a
// copy, which the caller makes.
func (d *Device) CompressWrite(p *Compression, blob driver.Pointer) error {
	h := p.Header
	if err := h.Validate(); err != nil {
		return badArgument("%v", err)
	}
	if h.Mode == format.Tiled {
		if blob%16 != 0 {
			return badArgument("the blob at %#x is not aligned to 16 bytes", blob)
		}
		c, err := d.compressor(h.M, h.K)
		if err != nil {
			return err
		}
		d.Changed(blob)
		if err := d.launch(c.last, p.Stream, uint64(p.Src), p.Ld, h.M, h.K, uint64(p.Scratch), uint64(blob)); err != nil {
			return err
		}
	}
	head := h.Marshal()
	return d.ctx.Write(p.Stream, blob, head[:])
}
