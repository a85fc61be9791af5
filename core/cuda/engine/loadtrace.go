// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"fmt"
	"os"
	"strconv"
	"time"
)

// For measuring alone, and no part of the interface: with ZIPSERV_LOAD_TRACE=1 each load tells on stderr where its lanes' time went, in milliseconds a lane;
// ZIPSERV_LOAD_PIECE_KIB and ZIPSERV_LOAD_BUFFERS set the size and number of buffers. They are read at the start of the process.
var loadTracing = loadSetting("TRACE", 0, 1) != 0

func loadSetting(name string, otherwise, most int) int {
	if n, err := strconv.Atoi(os.Getenv("ZIPSERV_LOAD_" + name)); err == nil && n > 0 && n <= most {
		return n
	}
	return otherwise
}

// loadTrace is a lane's time: page-locking buffers, waiting for its copies, reading, waiting for the queue, queuing.
type loadTrace struct{ alloc, wait, read, lock, queue time.Duration }

func (t *loadTrace) start() time.Time {
	if !loadTracing {
		return time.Time{}
	}
	return time.Now()
}

func (t *loadTrace) lap(to *time.Duration, from time.Time) time.Time {
	if !loadTracing {
		return time.Time{}
	}
	now := time.Now()
	*to += now.Sub(from)
	return now
}

func (l *Load) tell() {
	if !loadTracing || len(l.pieces) == 0 {
		return
	}
	var all loadTrace
	lanes := 0
	for _, lane := range l.device.loader.lanes {
		t := &lane.trace
		all.alloc, all.wait, all.read, all.lock, all.queue = all.alloc+t.alloc, all.wait+t.wait, all.read+t.read, all.lock+t.lock, all.queue+t.queue
		if *t != (loadTrace{}) {
			lanes++
		}
		lane.trace = loadTrace{}
	}
	mean := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1e3 / float64(max(lanes, 1)) }
	fmt.Fprintf(os.Stderr, "load: %d parts, %d pieces of at most %d KiB, %d lanes, %d buffers each; last piece queued after %.2f ms, all copied and checked after %.2f; "+
		"a lane: page-lock %.2f, await copy %.2f, read %.2f, await queue %.2f, queue %.2f\n", len(l.parts), len(l.pieces), loadPiece>>10, lanes, loadBuffers,
		float64(l.lastSent.Sub(l.begun).Microseconds())/1e3, float64(time.Since(l.begun).Microseconds())/1e3,
		mean(all.alloc), mean(all.wait), mean(all.read), mean(all.lock), mean(all.queue))
}
