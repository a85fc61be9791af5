// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/zipserv/zipserv/core/cuda/driver"
)

// LoadPart is bytes of an open file and the device memory they go to.
type LoadPart struct {
	File   int
	Offset uint64
	Bytes  uint64
	To     driver.Pointer
}

const (
	// MostLoadLanes bounds the host memory of the buffers, which stay.
	MostLoadLanes = 16
	copyStream    = 1 // side stream of copies; workspaces are filled on the other
)

var (
	// loadPiece is large enough for the bus, and small enough that a tensor is work for many lanes.
	loadPiece = uint64(loadSetting("PIECE_KIB", 4<<10, 1<<20)) << 10
	// loadBuffers is the buffers of a lane: one is filled while the other is copied.
	loadBuffers = loadSetting("BUFFERS", 2, 64)
)

// loader is a device's ring of page-locked buffers. One load at a time has it.
type loader struct {
	mu    sync.Mutex
	lanes []*loadLane
}

type loadLane struct {
	slots []*loadSlot
	trace loadTrace
}

type loadSlot struct {
	buffer []byte
	sent   driver.Event
	turn   uint64 // how often `sent` was recorded
}

// Load is a load under way: lanes read pieces of files into page-locked buffers and queue their copies on a side stream.
type Load struct {
	device *Device
	stream driver.Stream
	parts  []LoadPart
	pieces []loadPiecePlace
	next   atomic.Int64
	stop   atomic.Bool
	lanes  sync.WaitGroup

	mu      sync.Mutex
	changed sync.Cond
	left    []int // pieces of each part that are not queued yet
	last    []loadSent
	failed  int // the part that could not be read, or -1
	err     error

	begun, lastSent time.Time // of a trace
}

type loadPiecePlace struct {
	part       int
	begin, end uint64
}

// loadSent is the copy of a part that was queued last.
type loadSent struct {
	slot *loadSlot
	turn uint64
}

// StartLoad begins to load; work that is in the stream `after` now comes before the first copy. Finish must follow.
func (d *Device) StartLoad(after driver.Stream, parts []LoadPart, lanes int) (*Load, error) {
	if lanes < 1 || lanes > MostLoadLanes {
		return nil, badArgument("1 to %d lanes, got %d", MostLoadLanes, lanes)
	}
	l := &Load{device: d, stream: d.pool.Side(copyStream), parts: parts, left: make([]int, len(parts)), last: make([]loadSent, len(parts)), failed: -1}
	l.changed.L = &l.mu
	for i, p := range parts {
		for begin := uint64(0); begin < p.Bytes; begin += loadPiece {
			l.pieces = append(l.pieces, loadPiecePlace{i, begin, min(begin+loadPiece, p.Bytes)})
			l.left[i]++
		}
	}
	d.loader.mu.Lock()
	if err := d.pool.Follow(l.stream, after); err != nil {
		d.loader.mu.Unlock()
		return nil, err
	}
	l.begun = time.Now()
	lanes = min(lanes, len(l.pieces))
	for len(d.loader.lanes) < lanes {
		d.loader.lanes = append(d.loader.lanes, &loadLane{})
	}
	for _, lane := range d.loader.lanes[:lanes] {
		l.lanes.Go(func() { l.run(lane) })
	}
	return l, nil
}

// Parts is the number of parts.
func (l *Load) Parts() int { return len(l.parts) }

// Await waits until all copies of a part are queued; work that comes into `after` from then on waits for them, and not for those of later parts, of which
// some milliseconds may be queued as well. It returns -1, or the part that could not be read; the reason comes with Finish.
func (l *Load) Await(part int, after driver.Stream) (failed int, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.failed < 0 && l.left[part] > 0 {
		l.changed.Wait()
	}
	if last := l.last[part]; l.failed < 0 && last.slot != nil && last.slot.turn == last.turn { // else its lane has waited for the copy
		err = l.device.ctx.Wait(after, last.slot.sent)
	}
	return l.failed, err
}

// Finish waits for what is under way; with stop nothing new begins. When it returns all copies are done.
func (l *Load) Finish(stop bool) error {
	defer l.device.loader.mu.Unlock()
	if stop {
		l.stop.Store(true)
	}
	l.lanes.Wait()
	for _, lane := range l.device.loader.lanes {
		for _, s := range lane.slots {
			if err := l.device.ctx.Await(s.sent); err != nil && l.err == nil {
				l.err = err
			}
		}
	}
	l.tell()
	return l.err
}

func (l *Load) run(lane *loadLane) {
	lane.trace = loadTrace{}
	for turn := 0; !l.stop.Load(); turn++ {
		i := int(l.next.Add(1)) - 1
		if i >= len(l.pieces) {
			return
		}
		place := l.pieces[i]
		slot, piece, err := l.read(lane, turn%loadBuffers, place)
		clock := lane.trace.start()
		l.mu.Lock()
		clock = lane.trace.lap(&lane.trace.lock, clock)
		if err == nil {
			err = l.send(slot, piece, place)
		}
		l.lastSent = lane.trace.lap(&lane.trace.queue, clock)
		l.left[place.part]--
		if err != nil && l.failed < 0 {
			l.failed, l.err = place.part, err
			l.stop.Store(true)
		}
		if err != nil || l.left[place.part] == 0 {
			l.changed.Broadcast()
		}
		l.mu.Unlock()
	}
}

// read fills a buffer of the lane, once the copy from it is done.
func (l *Load) read(lane *loadLane, turn int, place loadPiecePlace) (*loadSlot, []byte, error) {
	ctx, clock := l.device.ctx, lane.trace.start()
	if turn == len(lane.slots) { // the lane makes its own buffers: page-locking takes its time, and so the others can begin
		s, err := newLoadSlot(ctx)
		if err != nil {
			return nil, nil, err
		}
		lane.slots = append(lane.slots, s)
		clock = lane.trace.lap(&lane.trace.alloc, clock)
	}
	s, p := lane.slots[turn], l.parts[place.part]
	if err := ctx.Await(s.sent); err != nil {
		return nil, nil, err
	}
	clock = lane.trace.lap(&lane.trace.wait, clock)
	piece := s.buffer[:place.end-place.begin]
	err := readAll(p.File, piece, p.Offset+place.begin)
	lane.trace.lap(&lane.trace.read, clock)
	return s, piece, err
}

// send queues the copy of a piece. Under the lock, so that the event of a part's last one comes after all others of the part in the stream.
func (l *Load) send(s *loadSlot, piece []byte, place loadPiecePlace) error {
	if err := l.device.ctx.Write(l.stream, l.parts[place.part].To+driver.Pointer(place.begin), piece); err != nil {
		return err
	}
	s.turn++
	l.last[place.part] = loadSent{s, s.turn}
	return l.device.ctx.Record(s.sent, l.stream)
}

func newLoadSlot(ctx *driver.Context) (*loadSlot, error) {
	buffer, err := ctx.AllocHost(int(loadPiece))
	if err != nil {
		return nil, fmt.Errorf("%d bytes of page-locked host memory: %w", loadPiece, err)
	}
	sent, err := ctx.NewSleepEvent()
	return &loadSlot{buffer: buffer, sent: sent}, err
}

func readAll(file int, to []byte, at uint64) error {
	for len(to) > 0 {
		n, err := syscall.Pread(file, to, int64(at))
		switch {
		case err == syscall.EINTR:
			continue
		case err != nil:
			return fmt.Errorf("reading: %w", err)
		case n == 0:
			return fmt.Errorf("the file was cut short: %w", io.ErrUnexpectedEOF)
		}
		to, at = to[n:], at+uint64(n)
	}
	return nil
}
