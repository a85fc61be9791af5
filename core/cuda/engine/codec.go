// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"github.com/zipserv/zipserv/core/cuda/driver"
	"github.com/zipserv/zipserv/core/cuda/plan"
)

const tileRows = 64 // of a block tile

type codecKey struct{ rows, k uint64 }

func (d *Device) decompressor(rows, k uint64) (*kernel, error) {
	return ready(d, codecKey{rows, k}, func() (*kernel, error) { return d.prepare(plan.Decompress(d.planDevice, rows, k)) })
}

// checkRows says whether a kernel can take rows row0 .. row0 + rows - 1 of a matrix of m rows.
func checkRows(m, row0, rows uint64) error {
	if row0%tileRows != 0 || row0 > m || rows < 1 || rows > m-row0 {
		return badArgument("rows %d .. %d cannot be taken of a matrix of %d rows; the first must be a multiple of %d", row0, row0+rows, m, tileRows)
	}
	return nil
}

// Decompress queues the decoding of rows row0 .. row0 + rows - 1 of a tiled BF16 blob into out, whose rows start ld elements apart. row0 is
// a multiple of 64. As with Linear, a blob's first decoding waits for all work ahead of it, later ones fetch its weights earlier.
func (d *Device) Decompress(s driver.Stream, blob driver.Pointer, m, k, row0, rows uint64, out driver.Pointer, ld uint64) error {
	if m-1 >= maxSide || k-1 >= maxSide {
		return badArgument("M and K must be 1 to 2^31-1, got %d and %d", m, k)
	}
	if blob%16 != 0 {
		return badArgument("the blob at %#x is not aligned to 16 bytes", blob)
	}
	if err := checkRows(m, row0, rows); err != nil {
		return err
	}
	if ld < k {
		return badArgument("rows of %d elements do not fit at a distance of %d", k, ld)
	}
	l, err := d.decompressor(rows, k)
	if err != nil {
		return err
	}
	_, early := d.read.Load(blob)
	if err := d.launchEarly(l, s, early, uint64(blob), uint64(out), ld, m, k, row0/tileRows, rows); err != nil {
		return err
	}
	if !early {
		d.read.Store(blob, struct{}{})
	}
	return nil
}
