// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"github.com/zipserv/zipserv/core/cuda/driver"
	"github.com/zipserv/zipserv/core/cuda/plan"
	"github.com/zipserv/zipserv/core/format"
)

// Lookup is rows of a compressed table by their numbers: out[i] = row ids[i] of the tiled blob, on device memory.
type Lookup struct {
	Stream  driver.Stream
	Blob    driver.Pointer // 16-byte aligned
	DType   format.DType
	M, K, N uint64
	IDs     driver.Pointer // N signed integers of IDBytes
	IDBytes uint64         // 4 or 8
	Out     driver.Pointer // [N, K], without gaps
}

type gatherKey struct{ dtype format.DType }

// Gather queues a lookup. It starts early, for it reads nothing, the blob included, before the work ahead of it has ended. A number that is no row ends the
// kernel with a failed assertion, as one of nn.Embedding does.
func (d *Device) Gather(p *Lookup) error {
	if p.M-1 >= maxSide || p.K-1 >= maxSide {
		return badArgument("M and K must be 1 to 2^31-1, got %d and %d", p.M, p.K)
	}
	if p.Blob%16 != 0 {
		return badArgument("the blob at %#x is not aligned to 16 bytes", p.Blob)
	}
	if p.DType != format.BF16 && p.DType != format.FP16 {
		return badArgument("dtype %d is neither BF16 nor FP16", p.DType)
	}
	if err := checkNumbers("row", p.IDs, p.IDBytes); err != nil {
		return err
	}
	l, err := d.gatherer(p.DType)
	if err != nil {
		return err
	}
	for first, most := uint64(0), plan.GatherTokens(p.K); first < p.N; first += most {
		pieces, blocks := plan.GatherPieces(min(p.N-first, most), p.K)
		launch := d.prepared(l, p.Stream, true, uint64(p.Blob), uint64(p.IDs)+first*p.IDBytes, p.IDBytes, uint64(p.Out)+2*first*p.K, p.M, p.K, pieces)
		launch.Grid[0] = blocks
		if err := d.ctx.Launch(&launch); err != nil {
			return err
		}
	}
	return nil
}

func (d *Device) gatherer(dtype format.DType) (*kernel, error) {
	return ready(d, gatherKey{dtype}, func() (*kernel, error) { return d.prepare(plan.Gather(d.planDevice, dtype == format.FP16)) })
}

// checkNumbers of rows or experts: the kernels read them one by one.
func checkNumbers(of string, ids driver.Pointer, idBytes uint64) error {
	if idBytes != 4 && idBytes != 8 || uint64(ids)%idBytes != 0 {
		return badArgument("%s numbers are aligned integers of 4 or 8 bytes, not of %d at %#x", of, idBytes, ids)
	}
	return nil
}
