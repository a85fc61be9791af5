// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"encoding/binary"
	"sync"

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

// mailbox is the mails that no compression waits for.
type mailbox struct {
	mu   sync.Mutex
	free []driver.Mail
}

const moreMails = 64 // a time

func (b *mailbox) take(ctx *driver.Context) (driver.Mail, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.free) == 0 {
		more, err := ctx.AllocMail(moreMails)
		if err != nil {
			return 0, err
		}
		b.free = more
	}
	last := len(b.free) - 1
	m := b.free[last]
	b.free = b.free[:last]
	return m, nil
}

func (b *mailbox) give(m driver.Mail) {
	b.mu.Lock()
	b.free = append(b.free, m)
	b.mu.Unlock()
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
	return plan.CompressScratch(m, k)
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
	mail, err := d.mails.take(d.ctx)
	if err != nil {
		return err
	}
	d.ctx.ClearMail(mail)
	if err := d.launchEarly(c.scan, p.Stream, true, uint64(c.plan.Blocks), uint64(p.Scratch), uint64(mail)); err != nil {
		d.mails.give(mail)
		return err
	}
	totals, there, err := d.ctx.AwaitMail(p.Stream, mail)
	if err != nil {
		return err // and the mail is lost: a kernel may still write it
	}
	d.mails.give(mail)
	if !there {
		var bytes [16]byte
		if err := d.ctx.Read(p.Stream, bytes[:], p.Scratch); err != nil {
			return err
		}
		totals = [3]uint32{binary.LittleEndian.Uint32(bytes[:]), binary.LittleEndian.Uint32(bytes[4:]), binary.LittleEndian.Uint32(bytes[8:])}
	}
	h.Checksum = totals[2]
	h.EscapeBytes = 16 * (uint64(totals[1])<<32 | uint64(totals[0]))
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
		args := []uint64{uint64(p.Src), p.Ld, h.M, h.K, uint64(p.Scratch), uint64(blob)}
		for head := h.Marshal(); len(args) < 6+format.HeaderSize/8; {
			args = append(args, binary.LittleEndian.Uint64(head[8*(len(args)-6):]))
		}
		return d.launch(c.last, p.Stream, args...)
	}
	head := h.Marshal()
	return d.ctx.Write(p.Stream, blob, head[:])
}
