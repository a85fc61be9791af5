// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"fmt"
	"sync"

	"github.com/zipserv/zipserv/core/cuda/driver"
	"github.com/zipserv/zipserv/core/cuda/jit"
	"github.com/zipserv/zipserv/core/cuda/plan"
	"github.com/zipserv/zipserv/core/cuda/stream"
)

// Device is one GPU: its primary context, loaded kernels, plans, streams and workspaces.
type Device struct {
	engine     *Engine
	props      driver.Device
	planDevice plan.Device
	early      bool // the driver knows programmatic dependent launches, also in captures
	ctx        *driver.Context
	pool       *stream.Pool
	workspaces *stream.Workspaces

	// read holds the blobs that a product has read before: see Linear.
	read sync.Map // driver.Pointer -> struct{}

	mu      sync.Mutex
	modules map[string]*loading // by source and defines
	linears sync.Map            // linearKey -> *linearPlan
	codecs  sync.Map            // see ready
	mails   mailbox
	choices choices
	loader  loader
}

// kernel is a variant that is ready to launch.
type kernel struct {
	fn   driver.Function
	plan plan.Kernel
	grid uint32
}

// ready gives what a device keeps under a key of a type of its own: it is made by the first call that needs it, and again by the next where that failed.
func ready[T any](d *Device, key any, prepare func() (T, error)) (T, error) {
	if known, ok := d.codecs.Load(key); ok {
		return known.(T), nil
	}
	made, err := prepare()
	if err != nil {
		var none T
		return none, err
	}
	d.codecs.Store(key, made)
	return made, nil
}

type loading struct {
	once   sync.Once
	module driver.Module
	err    error
}

// programmaticVersion is the CUDA version from which on a programmatic dependent launch can be captured.
const programmaticVersion = 12030

func openDevice(e *Engine, ordinal int) (*Device, error) {
	props, err := e.driver.Device(ordinal)
	if err != nil {
		return nil, err
	}
	cc := 10*props.Major + props.Minor
	if cc < jit.MinCapability {
		return nil, fmt.Errorf("%s has compute capability %d.%d; 8.0 (Ampere) or newer is needed", props.Name, props.Major, props.Minor)
	}
	ctx, err := e.driver.PrimaryContext(ordinal)
	if err != nil {
		return nil, err
	}
	pool, err := stream.NewPool(ctx)
	if err != nil {
		return nil, err
	}
	d := &Device{
		engine: e, props: props, ctx: ctx, pool: pool, modules: map[string]*loading{},
		early: e.driver.Version() >= programmaticVersion,
		planDevice: plan.Device{
			Capability: cc, SMs: props.SMs, SmemBlock: props.SmemBlock, SmemSM: props.SmemSM,
			Bandwidth: props.Bandwidth(), ClockHz: float64(props.ClockKHz) * 1e3,
		},
	}
	d.workspaces = stream.NewWorkspaces(ctx, pool.Side(0))
	return d, nil
}

// Properties are the driver's words on the device.
func (d *Device) Properties() driver.Device { return d.props }

// load compiles and loads a variant of a source once.
func (d *Device) load(spec jit.Spec) (driver.Module, error) {
	id := spec.String()
	d.mu.Lock()
	l, known := d.modules[id]
	if !known {
		l = &loading{}
		d.modules[id] = l
	}
	d.mu.Unlock()
	l.once.Do(func() {
		var image jit.Image
		if image, l.err = d.engine.compiler.Compile(context.Background(), spec, d.props.Major, d.props.Minor); l.err != nil {
			return
		}
		if l.module, l.err = d.ctx.Load(image.Data); l.err != nil {
			l.err = fmt.Errorf("loading %s for %s: %w", spec, image.Arch.Name, l.err)
		}
	})
	if l.err != nil {
		d.mu.Lock()
		if d.modules[id] == l {
			delete(d.modules, id) // the next call tries again
		}
		d.mu.Unlock()
	}
	return l.module, l.err
}

// prepare loads a kernel and settles its grid.
func (d *Device) prepare(k plan.Kernel) (*kernel, error) {
	spec := jit.Spec{Source: k.Source, Defines: k.Defines}
	module, err := d.load(spec)
	if err != nil {
		return nil, err
	}
	fn, err := d.ctx.Function(module, k.Entry, k.Smem)
	if err != nil {
		return nil, fmt.Errorf("%s, kernel %s with %d bytes of shared memory: %w", spec, k.Entry, k.Smem, err)
	}
	resident, err := d.ctx.Occupancy(fn, k.Block, k.Smem)
	if err != nil {
		return nil, err
	}
	if resident < max(1, int(k.Resident)) {
		return nil, fmt.Errorf("%s: %d blocks of %d threads and %d bytes of shared memory do not fit on an SM of %s, which holds %d", k.Source,
			max(1, k.Resident), k.Block, k.Smem, d.props.Name, resident)
	}
	out := &kernel{fn: fn, plan: k, grid: k.Grid}
	if k.PerSM > 0 {
		out.grid = min(k.Grid, uint32(d.props.SMs)*min(k.PerSM, uint32(resident)))
	}
	if k.Cluster > 1 {
		if out.grid, err = d.clustered(out, k); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// clustered is the grid of a kernel in clusters: whole ones, and where its blocks have to be on the device all at once, no more than that holds, which may
// be less than what its SMs hold.
func (d *Device) clustered(l *kernel, k plan.Kernel) (uint32, error) {
	grid := l.grid / k.Cluster * k.Cluster
	if k.Grid%k.Cluster != 0 || grid == 0 {
		return 0, fmt.Errorf("%s: a grid of %d blocks is not of clusters of %d", k.Source, l.grid, k.Cluster)
	}
	clusters, err := d.ctx.ClusterOccupancy(l.fn, k.Block, k.Smem, k.Cluster)
	if err != nil {
		return 0, err
	}
	if clusters == 0 {
		return 0, fmt.Errorf("%s: no cluster of %d blocks of %d threads and %d bytes of shared memory fits on %s", k.Source, k.Cluster, k.Block, k.Smem, d.props.Name)
	}
	if k.Resident > 0 || k.PerSM > 0 {
		grid = min(grid, uint32(clusters)*k.Cluster)
	}
	return grid, nil
}

// launch queues a kernel that waits for all work before it.
func (d *Device) launch(k *kernel, s driver.Stream, args ...uint64) error {
	return d.launchEarly(k, s, false, args...)
}

// launchEarly queues a kernel that, with early, may start before the one ahead of it has ended, if its plan says that it can.
func (d *Device) launchEarly(k *kernel, s driver.Stream, early bool, args ...uint64) error {
	l := d.prepared(k, s, early, args...)
	return d.ctx.Launch(&l)
}

func (d *Device) prepared(k *kernel, s driver.Stream, early bool, args ...uint64) driver.Launch {
	l := driver.Launch{
		Function: k.fn, Stream: s, Grid: [3]uint32{k.grid, 1, 1}, Block: k.plan.Block, Smem: k.plan.Smem, Cluster: k.plan.Cluster,
		Programmatic: early && k.plan.Programmatic && d.early, NumArgs: len(args),
	}
	copy(l.Args[:], args)
	return l
}

// SideStream is side stream i of the device, which the engine owns.
func (d *Device) SideStream(i int) driver.Stream { return d.pool.Side(i) }

// Follow makes later work of one stream wait for the present work of another.
func (d *Device) Follow(after, before driver.Stream) error { return d.pool.Follow(after, before) }
