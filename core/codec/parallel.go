// SPDX-License-Identifier: Apache-2.0

package codec

import (
	"context"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
)

// tileGrain is how many block tiles a worker takes at a time: 1 MiB of weights, so that a cancelled context is noticed within
// a fraction of a millisecond and a matrix of a few tiles starts no goroutine.
const tileGrain = 128

// parallel calls work for consecutive ranges [lo, hi) that cover [0, n), on up to GOMAXPROCS goroutines, each with a scratch of its
// own. It returns the first error, or the context's. A panic of a worker, also that of a fault in memory (a mapped file that was cut short),
// reaches the caller in its own goroutine, once no worker touches the memory any more.
func parallel(ctx context.Context, n, grain uint64, work func(s *scratch, lo, hi uint64) error) error {
	return parallelOn(ctx, 0, nil, n, grain, work)
}

// parallelOn is parallel on up to `most` goroutines, GOMAXPROCS if most is below 1, or on a team's threads (Product.Team).
func parallelOn(ctx context.Context, most int, team func(int, func()) bool, n, grain uint64, work func(s *scratch, lo, hi uint64) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	var next atomic.Uint64
	var stop atomic.Bool
	var once sync.Once
	var first error
	var failure any
	worker := func() {
		defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
		defer func() {
			if r := recover(); r != nil {
				once.Do(func() { failure = r })
				stop.Store(true)
			}
		}()
		s := scratchPool.Get().(*scratch)
		defer scratchPool.Put(s)
		s.reset()
		for !stop.Load() {
			lo := next.Add(grain) - grain
			if lo >= n {
				return
			}
			err := ctx.Err()
			if err == nil {
				err = work(s, lo, min(lo+grain, n))
			}
			if err != nil {
				once.Do(func() { first = err })
				stop.Store(true)
				return
			}
		}
	}
	if most < 1 {
		most = runtime.GOMAXPROCS(0)
	}
	workers := min(uint64(most), (n+grain-1)/grain)
	// A team always has all of its threads: one of another size would be made anew.
	if workers < 2 || team == nil || !team(most, worker) {
		var wg sync.WaitGroup
		for range max(workers, 1) - 1 {
			wg.Go(worker)
		}
		worker()
		wg.Wait()
	}
	if failure != nil {
		panic(failure)
	}
	return first
}

// scratch is what one worker needs; nothing is allocated per tile.
type scratch struct {
	tile    [tileBytes]byte // a padded tile, or the tile of an FP16 weight's sign, exponent and upper mantissa
	low     [tileBytes]byte // FP16: the lower mantissa bits, at the place of the exponent
	fixed   [fixedBytes]byte
	out     [tileBytes]byte         // a decoded tile that only its checksum is wanted of
	exps    [tileWeights]byte       // exponent fields, in an order of the kernel's own
	masks   [tileRows]uint64        // escapes of each row, column c at bit c
	work    kernelWork              // everything up to here stands at multiples of 64 bytes
	escaped [tileWeights + 4]uint16 // positions of the escapes
	rowA    [tileRows]uint32        // checksum factors of the rows of tile row mb
	colB    [tileCols]uint16        // checksum factors of the columns of tile column kb
	rowTag  uint64                  // mb + 1 of rowA, 0 = none
	colTag  uint64
}

var scratchPool = sync.Pool{New: func() any { return new(scratch) }}

func (s *scratch) reset() { s.rowTag, s.colTag = 0, 0 }
