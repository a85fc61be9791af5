// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"errors"
	"sync"

	"github.com/zipserv/zipserv/core/cuda/driver"
	"github.com/zipserv/zipserv/core/cuda/plan"
	"github.com/zipserv/zipserv/core/format"
)

// Matmul is one product y[N,M] = x[N,K] W[M,K]^T + bias on device memory, BF16.
type Matmul struct {
	Stream  driver.Stream
	Blob    driver.Pointer // 16-byte aligned
	M, K, N uint64
	X       driver.Pointer
	LdX     uint64 // elements from one token to the next
	Bias    driver.Pointer
	Y       driver.Pointer
	LdY     uint64
	// Where not both are 0: of so many Rows of W alone, from Row0 on, a multiple of 64. Bias and y are of these rows.
	Row0, Rows uint64
	// Where not 0, y is not one matrix, but one of N rows for each PartRows of these rows, a multiple of 64 that divides them; one behind the other.
	PartRows uint64
	// Gated: of all rows, M a multiple of 128, y is [N, M/2]: SiLU of the first half of them times the second, rounded where separate kernels would.
	Gated bool
	// Scratch is memory for the time of the product, or 0.
	Scratch      driver.Pointer
	ScratchBytes uint64
}

// NeedsExpand is what Linear says of a product that it leaves to another library.
const NeedsExpand = 1

type linearKey struct {
	m, k, class          uint64
	invariant, unaligned bool
	gated                bool
}

type linearPlan struct {
	plan   plan.Linear
	kernel *kernel
}

const maxSide = 1<<31 - 1

const scratchAlign = 16

// Linear queues a product. The kernels fetch their first weights before the work ahead of them in the stream has ended, which must
// therefore not be what writes the weights: the first product with a blob waits for everything, later ones do not.
//
// It returns 0, or does nothing and says what it needs: NeedsExpand where the plan is to decompress the weights and leave the product to cuBLAS, or where Rows are
// fewer than M, or y is in parts, and its kernel knows whole matrices only, or no kernel applies gates; a larger number where that many bytes of scratch memory have to come with the product.
func (d *Device) Linear(p *Matmul) (needs uint64, err error) {
	if p.M-1 >= maxSide || p.K-1 >= maxSide || p.N-1 >= maxSide {
		return 0, badArgument("M, K and N must be 1 to 2^31-1, got %d, %d and %d", p.M, p.K, p.N)
	}
	if p.Blob%16 != 0 {
		return 0, badArgument("the blob at %#x is not aligned to 16 bytes", p.Blob)
	}
	rows := p.Rows
	if p.Row0 == 0 && rows == 0 {
		rows = p.M
	}
	if err := checkRows(p.M, p.Row0, rows); err != nil {
		return 0, err
	}
	partRows := p.PartRows
	if partRows == 0 {
		partRows = rows
	}
	if partRows != rows && (partRows%tileRows != 0 || rows%partRows != 0) {
		return 0, badArgument("parts of %d of %d rows: they must be multiples of %d, and all alike", partRows, rows, tileRows)
	}
	if p.Gated {
		if rows != p.M || partRows != p.M || p.M%(2*tileRows) != 0 {
			return 0, badArgument("gates need all rows, a multiple of %d, in one result, not %d of %d in parts of %d", 2*tileRows, rows, p.M, partRows)
		}
		partRows = p.M / 2
	}
	whole := p.Gated || rows == p.M && partRows == rows
	if !whole && plan.Class(p.N) <= plan.FewTokens {
		return NeedsExpand, nil
	}
	matrices := rows / partRows
	if p.Gated {
		matrices = 1
	}
	unaligned := p.X%16 != 0 || (p.N > 1 && p.LdX%8 != 0)
	l, err := d.linear(linearKey{rows, p.K, plan.Class(p.N), Invariant(), unaligned, p.Gated})
	if err != nil {
		return 0, err
	}
	if l.plan.Expand || (!whole && !l.plan.ByRows) {
		return NeedsExpand, nil
	}
	if l.plan.Scratch > 0 && (p.Scratch == 0 || p.ScratchBytes < l.plan.Scratch) {
		return l.plan.Scratch, nil
	}
	if p.Scratch%scratchAlign != 0 {
		return 0, badArgument("the scratch memory at %#x is not aligned to %d bytes", p.Scratch, scratchAlign)
	}
	ws, err := d.workspaces.Get(p.Stream, l.plan.Workspace)
	if err != nil {
		return 0, err
	}
	_, early := d.read.Load(p.Blob)
	for first := uint64(0); first < p.N; first += l.plan.Tokens {
		n := min(p.N-first, l.plan.Tokens)
		x := p.X + driver.Pointer(2*first*p.LdX)
		launch := d.prepared(l.kernel, p.Stream, early)
		args := p.weights(launch.Args[:0], l.plan.ByRows)
		args = append(args, uint64(x), p.LdX, uint64(p.Bias), uint64(p.Y)+2*first*p.LdY, p.LdY, rows)
		if l.plan.ByRows {
			args = append(args, partRows)
		}
		args = append(args, p.K, n, uint64(ws))
		if l.plan.Scratch != 0 {
			args = append(args, uint64(ws)+l.plan.Flags, uint64(p.Scratch))
		}
		launch.NumArgs = len(args)
		if box := l.plan.TensorRows; box != 0 {
			ld := p.LdX
			if p.N == 1 { // the distance to a next row means nothing then
				ld = p.K
			}
			if !l.plan.WholeBoxes {
				box = min(box, uint32(n+7)/8*8)
			}
			launch.Tensors[0] = driver.Tensor{Data: x, Ld: ld, Rows: uint32(n), Columns: uint32(p.K), Box: box}
		}
		if box := l.plan.ResultRows; box != 0 {
			y := &launch.Tensors[1] // of a y that no copy can write the kernel does not look at it
			*y = launch.Tensors[0]
			if p.Y%16 == 0 && p.LdY%8 == 0 {
				*y = driver.Tensor{Data: p.Y, Ld: p.LdY, Rows: uint32(n), Columns: uint32(partRows), Box: box, Matrices: uint32(matrices)}
			}
		}
		if err := d.ctx.Launch(&launch); err != nil {
			return 0, err
		}
		if !early {
			d.read.Store(p.Blob, struct{}{})
			early = true
		}
	}
	return 0, nil
}

// weights are a kernel's first arguments: the blob, or the sections of its rows.
func (p *Matmul) weights(args []uint64, byRows bool) []uint64 {
	blob := uint64(p.Blob)
	if !byRows {
		return append(args, blob)
	}
	s, skip := format.TiledSections(format.BF16, p.M, p.K, 0), format.TileCount(p.Row0, p.K)
	return append(args, blob+s.TileHeaders+skip*format.TileHeaderSize, blob+s.Fixed+skip*format.FixedBF16, blob+s.Escapes)
}

func (d *Device) linear(key linearKey) (*linearPlan, error) {
	if l, known := d.linears.Load(key); known {
		return l.(*linearPlan), nil
	}
	p := plan.Problem{M: key.m, K: key.k, N: key.class, Invariant: key.invariant, Unaligned: key.unaligned, Gated: key.gated}
	var l *linearPlan
	var err error
	if !p.Gated { // choices are of products without gates
		l, err = d.chosen(p)
	}
	if l == nil && err == nil {
		var usual plan.Linear
		if usual, err = plan.ForLinear(d.planDevice, p); err == nil {
			l, err = d.prepareLinear(usual)
		}
		// A part of a GPU may have no room for clusters; there is always another way. Memory may come back, so without it nothing is settled.
		if err != nil && usual.Kernel.Cluster > 1 && !outOfMemory(err) {
			p.Apart = true
			if usual, err = plan.ForLinear(d.planDevice, p); err == nil {
				l, err = d.prepareLinear(usual)
			}
		}
	}
	if err != nil {
		return nil, err
	}
	d.linears.Store(key, l)
	return l, nil
}

func outOfMemory(err error) bool {
	var failed *driver.Error
	return errors.As(err, &failed) && failed.Code == driver.OutOfMemory
}

func (d *Device) prepareLinear(p plan.Linear) (*linearPlan, error) {
	l := &linearPlan{plan: p}
	if p.Expand {
		return l, nil
	}
	var err error
	l.kernel, err = d.prepare(p.Kernel)
	return l, err
}

// Warm compiles and loads what products with an M x K weight of up to the given number of tokens need, so that no later call does; gated: those that apply gates, too.
func (d *Device) Warm(m, k, tokens uint64, gated bool) error {
	if m-1 >= maxSide || k-1 >= maxSide {
		return badArgument("M and K must be 1 to 2^31-1, got %d and %d", m, k)
	}
	if gated && m%(2*tileRows) != 0 {
		return badArgument("gates need two halves of whole tiles, M a multiple of %d, not %d", 2*tileRows, m)
	}
	// One goroutine a variant: the compiler uses one core for each.
	var wg sync.WaitGroup
	var mu sync.Mutex
	var all []error
	try := func(prepare func() error) {
		wg.Go(func() {
			err := prepare()
			mu.Lock()
			defer mu.Unlock()
			all = append(all, err)
		})
	}
	try(func() error { _, err := d.decompressor(m, k); return err })
	products := func(gated bool) {
		for n, last := uint64(1), min(max(tokens, 1), warmTokens); n <= last; n = plan.Class(n) + 1 {
			try(func() error {
				_, err := d.linear(linearKey{m: m, k: k, class: n, invariant: Invariant(), gated: gated})
				return err
			})
		}
		if tokens > warmTokens {
			// The layouts for many tokens are few, and none depends on the shape; which of them a larger class takes does.
			for _, l := range plan.Many(d.planDevice, plan.Problem{M: m, K: k, N: tokens, Gated: gated}) {
				try(func() error { _, err := d.prepareLinear(l); return err })
			}
		}
	}
	products(false)
	if gated {
		products(true)
	}
	try(func() error { _, err := d.workspaces.Get(0, smallWorkspace); return err })
	wg.Wait()
	return errors.Join(all...)
}

// smallWorkspace is what Warm makes ready on the legacy default stream: room for the partial sums of any kernel on 132 SMs, and for the flags of 2^18 tiles.
const smallWorkspace = 18 << 20

// Changed tells the engine that a blob has new content, written by work that may still be in the stream.
func (d *Device) Changed(blob driver.Pointer) { d.read.Delete(blob) }

// warmTokens is where Warm stops to go through all classes: beyond, it makes ready whatever there is for many tokens.
const warmTokens = 2048
