// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"github.com/zipserv/zipserv/core/cuda/driver"
	"github.com/zipserv/zipserv/core/cuda/plan"
)

type codecKey struct{ m, k uint64 }

func (d *Device) decompressor(m, k uint64) (*kernel, error) {
	key := codecKey{m, k}
	if l, known := d.codecs.Load(key); known {
		return l.(*kernel), nil
	}
	l, err := d.prepare(plan.Decompress(d.planDevice, m, k))
	if err != nil {
		return nil, err
	}
	d.codecs.Store(key, l)
	return l, nil
}

// Decompress queues the decoding of a tiled BF16 blob into out, whose rows start ld elements apart.
func (d *Device) Decompress(s driver.Stream, blob driver.Pointer, m, k uint64, out driver.Pointer, ld uint64) error {
	if m-1 >= maxSide || k-1 >= maxSide {
		return badArgument("M and K must be 1 to 2^31-1, got %d and %d", m, k)
	}
	if blob%16 != 0 {
		return badArgument("the blob at %#x is not aligned to 16 bytes", blob)
	}
	if ld < k {
		return badArgument("rows of %d elements do not fit at a distance of %d", k, ld)
	}
	l, err := d.decompressor(m, k)
	if err != nil {
		return err
	}
	return d.launch(l, s, uint64(blob), uint64(out), ld, m, k)
}
