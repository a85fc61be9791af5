// SPDX-License-Identifier: Apache-2.0

package stream

import (
	"fmt"
	"sync"

	"github.com/zipserv/zipserv/core/cuda/driver"
)

// Workspaces gives every stream of work its own piece of device memory, filled with ones once. Kernels leave it so
// (a word of ones is a partial sum that is not there yet), so launches that follow each other in a stream may share it; launches that
// may overlap must not.
//
// A captured graph replays at any time on any stream, so a capture never uses the workspace of eager work: it gets one of its own for
// each stream in it, which comes back when the graph and all its instances are gone.
//
// The memory is the engine's own, not torch's: torch's allocator would hand out memory of the graph's pool during a capture, whose
// fill would be part of the graph.
type Workspaces struct {
	ctx  *driver.Context
	side driver.Stream

	mu       sync.RWMutex
	eager    map[driver.Stream]piece
	captures []*capture
	free     []piece
	total    int
}

// piece is one allocation.
type piece struct {
	at    driver.Pointer
	bytes uint64
}

// smallest is the size of the smallest piece; others are this times a power of two, so that they can be reused.
const smallest = 1 << 20

// empty is each byte of a workspace between launches.
const empty = 0xFF

type capture struct {
	id       uint64
	streams  map[driver.Stream][]piece // rising
	released *driver.Released
}

// NewWorkspaces prepares workspaces; side is a stream that no one captures.
func NewWorkspaces(ctx *driver.Context, side driver.Stream) *Workspaces {
	return &Workspaces{ctx: ctx, side: side, eager: map[driver.Stream]piece{}}
}

// Get returns a workspace of at least the given size for work on the stream. It allocates only when a stream or a capture asks for the
// first time, or for more than before.
func (w *Workspaces) Get(s driver.Stream, bytes uint64) (driver.Pointer, error) {
	// The legacy default stream cannot be captured, and asking about it while another stream is would be an error.
	if s != 0 {
		active, id, graph, err := w.ctx.Capture(s)
		if err != nil {
			return 0, err
		}
		if active {
			return w.captured(s, id, graph, bytes)
		}
	}
	w.mu.RLock()
	p := w.eager[s]
	w.mu.RUnlock()
	if p.bytes >= bytes {
		return p.at, nil
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if p := w.eager[s]; p.bytes >= bytes {
		return p.at, nil
	}
	// A smaller one stays allocated: work that is under way may use it.
	p, err := w.take(bytes)
	if err == nil {
		w.eager[s] = p
	}
	return p.at, err
}

func (w *Workspaces) captured(s driver.Stream, id uint64, graph driver.Graph, bytes uint64) (driver.Pointer, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	var c *capture
	for _, known := range w.captures {
		if known.id == id {
			c = known
		}
	}
	if c == nil {
		w.reclaim()
		released, err := w.ctx.OnRelease(graph)
		if err != nil {
			return 0, err
		}
		c = &capture{id: id, streams: map[driver.Stream][]piece{}, released: released}
		w.captures = append(w.captures, c)
	}
	for _, p := range c.streams[s] {
		if p.bytes >= bytes {
			return p.at, nil
		}
	}
	p, err := w.take(bytes)
	if err == nil {
		c.streams[s] = append(c.streams[s], p)
	}
	return p.at, err
}

// reclaim frees the workspaces of graphs that are gone.
func (w *Workspaces) reclaim() {
	kept := w.captures[:0]
	for _, c := range w.captures {
		if !c.released.Done() {
			kept = append(kept, c)
			continue
		}
		for _, pieces := range c.streams {
			w.free = append(w.free, pieces...)
		}
	}
	clear(w.captures[len(kept):])
	w.captures = kept
}

func (w *Workspaces) take(bytes uint64) (piece, error) {
	size := uint64(smallest)
	for size < bytes {
		size *= 2
	}
	for i, p := range w.free {
		if p.bytes == size {
			w.free = append(w.free[:i], w.free[i+1:]...)
			return p, nil
		}
	}
	at, err := w.ctx.AllocFilled(w.side, size, empty)
	if err != nil {
		return piece{}, fmt.Errorf("a workspace of %d bytes: %w", size, err)
	}
	w.total++
	return piece{at, size}, nil
}

// Count is the number of workspaces that were made.
func (w *Workspaces) Count() int {
	w.mu.RLock()
	defer w.mu.RUnlock()
	return w.total
}
