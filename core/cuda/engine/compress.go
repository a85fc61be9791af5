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
	Header  format.Header  // M, K and Shape; the rest is filled in by CompressWrite
	Scratch driver.Pointer // CompressScratch bytes, which belong to the compression from CompressPlan to the end of CompressWrite's work
}

// post is a mail, and a word of device memory that is 0 between two kernels that send it.
type post struct {
	mail driver.Mail
	sum  driver.Pointer
}

// mailbox is the posts that no compression waits for.
type mailbox struct {
	mu   sync.Mutex
	free []post
}

const (
	moreMails     = 64 // a time
	compressSpare = 64 // what is left behind a blob is cleared up to that part of its memory
)

func (b *mailbox) take(d *Device) (post, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.free) == 0 {
		mails, err := d.ctx.AllocMail(moreMails)
		if err != nil {
			return post{}, err
		}
		sums, err := d.ctx.AllocFilled(d.pool.Side(0), 8*moreMails, 0)
		if err != nil {
			return post{}, err
		}
		for i, m := range mails {
			b.free = append(b.free, post{m, sums + driver.Pointer(8*i)})
		}
	}
	last := len(b.free) - 1
	p := b.free[last]
	b.free = b.free[:last]
	return p, nil
}

func (b *mailbox) give(p post) {
	b.mu.Lock()
	b.free = append(b.free, p)
	b.mu.Unlock()
}

type compressor struct {
	plan          plan.Compression
	sample, write *kernel
}

type compressKey struct{ m, k uint64 }

func (d *Device) compressor(m, k uint64) (*compressor, error) {
	return ready(d, compressKey{m, k}, func() (*compressor, error) {
		c := &compressor{plan: plan.Compress(d.planDevice, m, k)}
		var err error
		if c.sample, err = d.prepare(c.plan.Sample); err == nil {
			c.write, err = d.prepare(c.plan.Write)
		}
		return c, err
	})
}

func (p *Compression) check() error {
	p.Header.DType, p.Header.Mode, p.Header.EscapeBytes = format.BF16, format.Raw, 0
	if err := p.Header.Validate(); err != nil {
		return badArgument("%v", err)
	}
	if p.Ld < p.Header.K {
		return badArgument("rows of %d elements do not fit at a distance of %d", p.Header.K, p.Ld)
	}
	if p.Scratch%16 != 0 {
		return badArgument("the scratch memory at %#x is not aligned to 16 bytes", p.Scratch)
	}
	if plan.Tiles(p.Header.M, p.Header.K) >= 1<<24 { // their lists are counted in 32 bits
		return badArgument("a matrix of %d x %d is too large for a GPU", p.Header.M, p.Header.K)
	}
	return nil
}

// CompressScratch is the bytes of device memory that a compression needs beside the blob.
func (d *Device) CompressScratch(m, k uint64) uint64 {
	return plan.CompressScratch(m, k)
}

// exchange launches a kernel that tells the host something by mail, and waits for its words. more: its arguments behind those that all have; sum: the
// post's word behind them.
func (d *Device) exchange(p *Compression, k *kernel, sum bool, more ...uint64) (a, b uint32, err error) {
	to, err := d.mails.take(d)
	if err != nil {
		return 0, 0, err
	}
	args := append([]uint64{uint64(p.Src), p.Ld, p.Header.M, p.Header.K, uint64(p.Scratch), uint64(to.mail)}, more...)
	if sum {
		args = append(args, uint64(to.sum))
	}
	d.ctx.ClearMail(to.mail)
	if err := d.launch(k, p.Stream, args...); err != nil {
		d.mails.give(to)
		return 0, 0, err
	}
	words, there, err := d.ctx.AwaitMail(p.Stream, to.mail)
	if err != nil {
		return 0, 0, err // and the mail is lost: a kernel may still write it
	}
	d.mails.give(to)
	if !there {
		var bytes [8]byte
		if err := d.ctx.Read(p.Stream, bytes[:], p.Scratch); err != nil {
			return 0, 0, err
		}
		words[0], words[1] = binary.LittleEndian.Uint32(bytes[:]), binary.LittleEndian.Uint32(bytes[4:])
	}
	return words[0], words[1], nil
}

// CompressPlan reads some of the weights, waits, and returns the bytes to allocate for the blob: as a rule enough, and at most 1 % more than it takes. 0: that
// is not certain, so CompressWrite is to be asked first. It prepares the scratch memory for one CompressWrite.
func (d *Device) CompressPlan(p *Compression) (nbytes uint64, err error) {
	if err := p.check(); err != nil {
		return 0, err
	}
	h := &p.Header
	c, err := d.compressor(h.M, h.K)
	if err != nil {
		return 0, err
	}
	clear := (plan.CompressScratch(h.M, h.K) - 16) / 16
	sum, squares, err := d.exchange(p, c.sample, true, clear, uint64(c.plan.Samples))
	if err != nil {
		return 0, err
	}
	room, certain := c.plan.Room(h.M, h.K, uint64(sum), uint64(squares))
	if nbytes = format.TiledSections(format.BF16, h.M, h.K, room).Total; !certain || nbytes >= format.RawSize(h.M, h.K) {
		return 0, nil
	}
	return nbytes, nil
}

// CompressWrite reads all weights, writes their blob if it has the room, waits for its size, and fills in the header, whose Sections tell it. The blob is
// complete (in the order of the stream) if that is at most room and the mode is tiled; what is left of the room is then set to 0 if it is at most a 64th of
// it. Scratch is as CompressPlan has left it, or 0 throughout. If not, allocate that much; a tiled one takes a CompressPlan and a CompressWrite more, a raw
// one is CompressRaw and a copy of the matrix. No blob (0, room 0): only the header is filled in.
func (d *Device) CompressWrite(p *Compression, blob driver.Pointer, room uint64) error {
	if err := p.check(); err != nil {
		return err
	}
	h := &p.Header
	units, sections := uint64(0), format.TiledSections(h.DType, h.M, h.K, 0)
	if blob != 0 {
		if blob%16 != 0 {
			return badArgument("the blob at %#x is not aligned to 16 bytes", blob)
		}
		if room < sections.Total {
			return badArgument("a blob of a matrix of %d x %d takes at least %d bytes, not %d", h.M, h.K, sections.Total, room)
		}
		units = min((room-sections.Total)/16, 1<<32-1)
		d.Changed(blob)
	}
	c, err := d.compressor(h.M, h.K)
	if err != nil {
		return err
	}
	tiled := *h
	tiled.Mode, tiled.Checksum = format.Tiled, 0
	head := tiled.Marshal() // in which the kernel writes the size and the checksum
	args := [3 + len(head)/8]uint64{uint64(blob), units, room / compressSpare / 16}
	for i := range head[:len(head)/8] {
		args[3+i] = binary.LittleEndian.Uint64(head[8*i:])
	}
	used, checksum, err := d.exchange(p, c.write, false, args[:]...)
	if err != nil {
		return err
	}
	h.Checksum = checksum
	if format.TiledSections(h.DType, h.M, h.K, 16*uint64(used)).Total >= format.RawSize(h.M, h.K) {
		return nil // as p.check has left it
	}
	h.Mode, h.EscapeBytes = format.Tiled, 16*uint64(used)
	return nil
}

// CompressRaw queues the writing of a raw blob's header, as CompressWrite has filled it in.
func (d *Device) CompressRaw(p *Compression, blob driver.Pointer) error {
	if err := p.check(); err != nil {
		return err
	}
	d.Changed(blob)
	head := p.Header.Marshal()
	return d.ctx.Write(p.Stream, blob, head[:])
}
