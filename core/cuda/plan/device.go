// SPDX-License-Identifier: Apache-2.0

// Package plan decides how a job is put on a GPU: which kernel in which variant, with what grid, block, shared memory and workspace. It is
// pure arithmetic over the shape and the device, so that every decision can be tested without one.
package plan

// Device is what a plan depends on.
type Device struct {
	Capability int // compute capability, 10*major+minor
	SMs        int
	SmemBlock  int     // bytes of shared memory that a block may ask for
	SmemSM     int     // bytes of shared memory of an SM
	Bandwidth  float64 // bytes/s of device memory; 0: unknown
	ClockHz    float64 // of an SM; 0: unknown
}

// bandwidth is the rate that copies reach, as a share of the memory's own.
func (d Device) bandwidth() float64 {
	const reached = 0.88 // 4.3 of 4.9 TB/s on an H200
	if d.Bandwidth > 0 {
		return d.Bandwidth * reached
	}
	return 10e9 * float64(d.SMs) // a modest GPU's
}

// tensorRate is the rate of dense BF16 matrix products in FLOP/s.
func (d Device) tensorRate() float64 {
	perClock := 1024.0 // FLOP per SM and clock: GeForce parts
	switch {
	case d.Capability == 80 || d.Capability == 87:
		perClock = 2048
	case d.Capability >= 90 && d.Capability < 100:
		perClock = 4096
	case d.Capability >= 100 && d.Capability < 120:
		perClock = 8192
	}
	return perClock * d.clock() * float64(d.SMs)
}

func (d Device) clock() float64 {
	if d.ClockHz == 0 {
		return 1.5e9
	}
	return d.ClockHz
}

// Kernel is one launch of one variant of one source.
type Kernel struct {
	Source       string
	Entry        string
	Defines      []string // NAME=VALUE
	Grid         uint32   // blocks along x
	Cluster      uint32   // blocks along x that share a cluster, 8 at most; 0 or 1: none. Grid is a multiple of it
	PerSM        uint32   // where not 0: the grid is this many blocks an SM, or fewer if fewer fit, and Grid is the most that are of use
	Block        uint32   // threads
	Resident     uint32   // where not 0: so many blocks must fit on an SM at a time
	Smem         uint32   // bytes of dynamic shared memory
	Programmatic bool     // may start before the kernel ahead of it has ended
}

// Constants of docs/format.md that sizes here depend on.
const (
	tileSide  = 64
	tileBytes = 5632 // fixed part of a BF16 tile
	tileData  = 2 * tileSide * tileSide
	// spareBytes of shared memory has every warp that patches escapes (format.cuh).
	spareBytes = 128
)

func ceilDiv(a, b uint64) uint64 { return (a + b - 1) / b }

// Tiles is the number of block tiles of a matrix.
func Tiles(m, k uint64) uint64 { return ceilDiv(m, tileSide) * ceilDiv(k, tileSide) }
