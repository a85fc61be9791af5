// SPDX-License-Identifier: Apache-2.0

// Package stream holds what a device keeps for ordering work: side streams and events, made once and reused, and the workspaces of the
// kernels, one for each stream of work.
package stream

import (
	"sync"

	"github.com/zipserv/zipserv/core/cuda/driver"
)

// Pool holds one device's side streams and events.
type Pool struct {
	ctx   *driver.Context
	sides []driver.Stream

	mu   sync.Mutex
	free []driver.Event
}

const (
	sideStreams = 2
	firstEvents = 8
)

// NewPool makes the streams and a first stock of events, so that later calls, which may fall into a capture, make none.
func NewPool(ctx *driver.Context) (*Pool, error) {
	p := &Pool{ctx: ctx}
	for range sideStreams {
		s, err := ctx.NewStream()
		if err != nil {
			return nil, err
		}
		p.sides = append(p.sides, s)
	}
	for range firstEvents {
		e, err := ctx.NewEvent()
		if err != nil {
			return nil, err
		}
		p.free = append(p.free, e)
	}
	return p, nil
}

// Side is side stream i, counted round.
func (p *Pool) Side(i int) driver.Stream { return p.sides[i%len(p.sides)] }

// Follow makes all later work of `after` wait for the present work of `before`. Inside a capture it draws `after` into it.
func (p *Pool) Follow(after, before driver.Stream) error {
	e, err := p.take()
	if err != nil {
		return err
	}
	// An event may be recorded again as soon as the wait is queued: the wait keeps the state that it saw.
	defer p.give(e)
	if err := p.ctx.Record(e, before); err != nil {
		return err
	}
	return p.ctx.Wait(after, e)
}

func (p *Pool) take() (driver.Event, error) {
	p.mu.Lock()
	if n := len(p.free); n > 0 {
		e := p.free[n-1]
		p.free = p.free[:n-1]
		p.mu.Unlock()
		return e, nil
	}
	p.mu.Unlock()
	return p.ctx.NewEvent()
}

func (p *Pool) give(e driver.Event) {
	p.mu.Lock()
	p.free = append(p.free, e)
	p.mu.Unlock()
}
