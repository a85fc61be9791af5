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
	ctx   *driver.Context
	side  driver.Stream
	bytes uint64

	mu       sync.RWMutex
	eager    map[driver.Stream]driver.Pointer
	captures []*capture
	free     []driver.Pointer
	total    int
}

// empty is each byte of a workspace between launches.
const empty = 0xFF

type capture struct {
	id       uint64
	streams  map[driver.Stream]driver.Pointer
	released *driver.Released
}

// NewWorkspaces prepares workspaces of the given size; side is a stream that no one captures.
func NewWorkspaces(ctx *driver.Context, side driver.Stream, bytes uint64) *Workspaces {
	return &Workspaces{ctx: ctx, side: side, bytes: bytes, eager: map[driver.Stream]driver.Pointer{}}
}

// Get returns the workspace for work on the stream. It allocates only the first time that a stream or a capture asks.
func (w *Workspaces) Get(s driver.Stream) (driver.Pointer, error) {
	// The legacy default stream cannot be captured, and asking about it while another stream is would be an error.
	if s != 0 {
		active, id, graph, err := w.ctx.Capture(s)
		if err != nil {
			return 0, err
		}
		if active {
			return w.captured(s, id, graph)
		}
	}
	w.mu.RLock()
	p, known := w.eager[s]
	w.mu.RUnlock()
	if known {
		return p, nil
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if p, known := w.eager[s]; known {
		return p, nil
	}
	p, err := w.take()
	if err == nil {
		w.eager[s] = p
	}
	return p, err
}

func (w *Workspaces) captured(s driver.Stream, id uint64, graph driver.Graph) (driver.Pointer, error) {
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
		c = &capture{id: id, streams: map[driver.Stream]driver.Pointer{}, released: released}
		w.captures = append(w.captures, c)
	}
	if p, known := c.streams[s]; known {
		return p, nil
	}
	p, err := w.take()
	if err == nil {
		c.streams[s] = p
	}
	return p, err
}

// reclaim frees the workspaces of graphs that are gone.
func (w *Workspaces) reclaim() {
	kept := w.captures[:0]
	for _, c := range w.captures {
		if !c.released.Done() {
			kept = append(kept, c)
			continue
		}
		for _, p := range c.streams {
			w.free = append(w.free, p)
		}
	}
	clear(w.captures[len(kept):])
	w.captures = kept
}

func (w *Workspaces) take() (driver.Pointer, error) {
	if n := len(w.free); n > 0 {
		p := w.free[n-1]
		w.free = w.free[:n-1]
		return p, nil
	}
	p, err := w.ctx.AllocFilled(w.side, w.bytes, empty)
	if err != nil {
		return 0, fmt.Errorf("a workspace of %d bytes: %w", w.bytes, err)
	}
	w.total++
	return p, nil
}

// Count is the number of workspaces that were made.
func (w *Workspaces) Count() int {
	w.mu.RLock()
	defer w.mu.RUnlock()
	return w.total
}

// Bytes is the size of one workspace.
func (w *Workspaces) Bytes() uint64 { return w.bytes }
