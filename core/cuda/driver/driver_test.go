// SPDX-License-Identifier: Apache-2.0

package driver_test

import (
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/zipserv/zipserv/core/cuda/driver"
	"github.com/zipserv/zipserv/core/cuda/drivertest"
)

func TestNoDriverSaysSoAndHowToCureIt(t *testing.T) {
	t.Setenv(driver.EnvLibrary, filepath.Join(t.TempDir(), "libcuda.so.1"))
	_, err := driver.Open()
	require.ErrorIs(t, err, driver.ErrNoDriver)
	assert.Contains(t, err.Error(), "no NVIDIA driver")
	assert.Contains(t, err.Error(), driver.EnvLibrary)
}

func TestAFailedOpenIsNotRemembered(t *testing.T) {
	path := filepath.Join(t.TempDir(), "libcuda.so.1")
	t.Setenv(driver.EnvLibrary, path)
	_, err := driver.Open()
	require.Error(t, err)
	data, err := os.ReadFile(drivertest.New(t).Path)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(path, data, 0o700))
	d, err := driver.Open()
	require.NoError(t, err)
	assert.Equal(t, 2, d.DeviceCount())
	again, err := driver.Open()
	require.NoError(t, err)
	assert.Same(t, d, again)
}

func TestALibraryThatLacksACallIsTooOld(t *testing.T) {
	_, err := driver.OpenPath("libm.so.6")
	require.Error(t, err)
	assert.NotErrorIs(t, err, driver.ErrNoDriver)
	assert.Contains(t, err.Error(), "too old")
	assert.Contains(t, err.Error(), "cuInit")
}

func TestAnOldVersionIsTooOld(t *testing.T) {
	f := drivertest.New(t)
	t.Setenv("FAKECUDA_VERSION", "11080")
	_, err := driver.OpenPath(f.Path)
	require.Error(t, err)
	assert.Contains(t, err.Error(), "CUDA 11.8")
	assert.Contains(t, err.Error(), "12.0")
}

func TestADriverThatDoesNotStart(t *testing.T) {
	f := drivertest.New(t)
	f.Fail("cuInit", 100, 0)
	_, err := driver.OpenPath(f.Path)
	var failed *driver.Error
	require.ErrorAs(t, err, &failed)
	assert.Equal(t, "cuInit", failed.Call)
	assert.Equal(t, 100, failed.Code)
}

func TestDeviceProperties(t *testing.T) {
	d := drivertest.New(t).Open()
	assert.Equal(t, "13.0", d.VersionString())
	p, err := d.Device(1)
	require.NoError(t, err)
	assert.Equal(t, driver.Device{
		Ordinal: 1, Name: "Fake GPU 1", Memory: 2 << 30, Major: 9, Minor: 0, SMs: 100, SmemBlock: 232448, SmemSM: 233472, L2: 60 << 20,
		ClockKHz: 1980000, MemoryKHz: 3201000, BusBits: 6144,
	}, p)
	assert.InDelta(t, 4.917e12, p.Bandwidth(), 1e9)
	for _, ordinal := range []int{-1, 2} {
		_, err = d.Device(ordinal)
		assert.ErrorContains(t, err, "there is no CUDA device")
	}
}

// Every entry point, made to fail, must come back with its own name, and leave the thread's context stack as it was.
func TestEveryErrorCarriesCallCodeAndText(t *testing.T) {
	image := append([]byte("\x7fELF"), make([]byte, 60)...)
	type step struct {
		call string
		run  func(d *driver.Driver, c *driver.Context) error
	}
	fn := func(c *driver.Context) (driver.Function, error) {
		m, err := c.Load(image)
		if err != nil {
			return 0, err
		}
		return c.Function(m, "k", 100<<10)
	}
	steps := []step{
		{"cuDeviceGetAttribute", func(d *driver.Driver, _ *driver.Context) error { _, err := d.Device(0); return err }},
		{"cuDeviceGetName", func(d *driver.Driver, _ *driver.Context) error { _, err := d.Device(0); return err }},
		{"cuDevicePrimaryCtxRetain", func(d *driver.Driver, _ *driver.Context) error { _, err := d.PrimaryContext(0); return err }},
		{"cuCtxGetCurrent", func(_ *driver.Driver, c *driver.Context) error { _, err := c.Load(image); return err }},
		{"cuCtxPushCurrent_v2", func(_ *driver.Driver, c *driver.Context) error { _, err := c.Load(image); return err }},
		{"cuModuleLoadData", func(_ *driver.Driver, c *driver.Context) error { _, err := c.Load(image); return err }},
		{"cuModuleGetFunction", func(_ *driver.Driver, c *driver.Context) error { _, err := fn(c); return err }},
		{"cuFuncSetAttribute", func(_ *driver.Driver, c *driver.Context) error { _, err := fn(c); return err }},
		{"cuOccupancyMaxActiveBlocksPerMultiprocessor", func(_ *driver.Driver, c *driver.Context) error { _, err := c.Occupancy(1, 32, 0); return err }},
		{"cuOccupancyMaxActiveClusters", func(_ *driver.Driver, c *driver.Context) error {
			f, err := fn(c)
			if err != nil {
				return err
			}
			_, err = c.ClusterOccupancy(f, 32, 0, 2)
			return err
		}},
		{"cuLaunchKernelEx", func(_ *driver.Driver, c *driver.Context) error {
			f, err := fn(c)
			if err != nil {
				return err
			}
			return c.Launch(&driver.Launch{Function: f, Grid: [3]uint32{1, 1, 1}, Block: 32, NumArgs: 4})
		}},
		{"cuStreamCreateWithPriority", func(_ *driver.Driver, c *driver.Context) error { _, err := c.NewStream(); return err }},
		{"cuStreamSynchronize", func(_ *driver.Driver, c *driver.Context) error { return c.Synchronize(0) }},
		{"cuStreamWaitEvent", func(_ *driver.Driver, c *driver.Context) error { return c.Wait(0, 1) }},
		{"cuStreamGetCaptureInfo_v2", func(_ *driver.Driver, c *driver.Context) error { _, _, _, err := c.Capture(1); return err }},
		{"cuEventCreate", func(_ *driver.Driver, c *driver.Context) error { _, err := c.NewEvent(); return err }},
		{"cuEventCreate", func(_ *driver.Driver, c *driver.Context) error { _, err := c.NewSleepEvent(); return err }},
		{"cuEventSynchronize", func(_ *driver.Driver, c *driver.Context) error { return c.Await(1) }},
		{"cuMemHostAlloc", func(_ *driver.Driver, c *driver.Context) error { _, err := c.AllocHost(16); return err }},
		{"cuEventRecord", func(_ *driver.Driver, c *driver.Context) error { return c.Record(1, 0) }},
		{"cuMemGetInfo_v2", func(_ *driver.Driver, c *driver.Context) error { _, _, err := c.MemoryInfo(); return err }},
		{"cuMemAlloc_v2", func(_ *driver.Driver, c *driver.Context) error { _, err := c.AllocFilled(0, 16, 0); return err }},
		{"cuMemsetD8Async", func(_ *driver.Driver, c *driver.Context) error { _, err := c.AllocFilled(0, 16, 0); return err }},
		{"cuStreamSynchronize", func(_ *driver.Driver, c *driver.Context) error { _, err := c.AllocFilled(0, 16, 0); return err }},
		{"cuMemFree_v2", func(_ *driver.Driver, c *driver.Context) error { return c.Free(0) }},
		{"cuMemcpyDtoHAsync_v2", func(_ *driver.Driver, c *driver.Context) error { return c.Read(0, make([]byte, 1), 0) }},
		{"cuMemcpyHtoDAsync_v2", func(_ *driver.Driver, c *driver.Context) error { return c.Write(0, 0, make([]byte, 1)) }},
		{"cuUserObjectCreate", func(_ *driver.Driver, c *driver.Context) error { _, err := c.OnRelease(1); return err }},
		{"cuGraphRetainUserObject", func(_ *driver.Driver, c *driver.Context) error { _, err := c.OnRelease(1); return err }},
	}
	f := drivertest.New(t)
	d := f.Open()
	c, err := d.PrimaryContext(0)
	require.NoError(t, err)
	for _, s := range steps {
		t.Run(s.call, func(t *testing.T) {
			f.Reset()
			before := f.Live(drivertest.Allocations)
			f.Fail(s.call, driver.OutOfMemory, 0)
			err := s.run(d, c)
			var failed *driver.Error
			require.ErrorAs(t, err, &failed)
			assert.Equal(t, &driver.Error{Call: s.call, Code: 2, Name: "CUDA_ERROR_OUT_OF_MEMORY", Text: "out of memory"}, failed)
			assert.Equal(t, s.call+": CUDA_ERROR_OUT_OF_MEMORY (2): out of memory", err.Error())
			assert.Equal(t, before, f.Live(drivertest.Allocations), "nothing leaks")
			f.Reset()
			_, _, err = c.MemoryInfo()
			assert.NoError(t, err, "the next call works")
		})
	}
	f.Fail("cuMemGetInfo_v2", 12345, 0)
	_, _, err = c.MemoryInfo()
	assert.EqualError(t, err, "cuMemGetInfo_v2: unknown (12345): no description")
}

func TestLaunchPassesEverythingOn(t *testing.T) {
	f := drivertest.New(t)
	d := f.Open()
	c, err := d.PrimaryContext(1)
	require.NoError(t, err)
	m, err := c.Load([]byte("\x7fELF............................"))
	require.NoError(t, err)
	fn, err := c.Function(m, "kernel", 200<<10)
	require.NoError(t, err)
	f.Reset()
	l := driver.Launch{Function: fn, Stream: 0x55, Grid: [3]uint32{7, 2, 1}, Block: 96, Smem: 200 << 10, Programmatic: true, NumArgs: 4}
	copy(l.Args[:], []uint64{0xAB, 1 << 40, 3, 1<<64 - 1})
	require.NoError(t, c.Launch(&l))
	assert.Equal(t, []string{"launch 1 kernel grid 7,2,1 block 96 smem 204800 stream 55 pdl 1 args ab 10000000000 3 ffffffffffffffff"}, f.Log())
	l.Cluster, l.Grid = 2, [3]uint32{8, 2, 1}
	f.Reset()
	require.NoError(t, c.Launch(&l))
	assert.Equal(t, []string{"launch 1 kernel grid 8,2,1 block 96 smem 204800 stream 55 pdl 1 cluster 2 args ab 10000000000 3 ffffffffffffffff"}, f.Log())
	l.Programmatic = false
	f.Reset()
	require.NoError(t, c.Launch(&l))
	assert.Contains(t, f.Log()[0], " pdl 0 cluster 2 args")
	for _, wrong := range [][2]uint32{{2, 7}, {16, 16}} {
		l.Cluster, l.Grid[0] = wrong[0], wrong[1]
		assert.ErrorContains(t, c.Launch(&l), "CUDA_ERROR_INVALID_CLUSTER_SIZE (912)")
	}
	l.Cluster = 0
	l.Block = 0
	assert.ErrorContains(t, c.Launch(&l), "cuLaunchKernelEx: CUDA_ERROR_INVALID_VALUE (1): invalid argument")
}

// The fake has GPCs of 18 SMs, and device 1 has 100 SMs.
func TestClustersThatFit(t *testing.T) {
	f := drivertest.New(t)
	c, err := f.Open().PrimaryContext(1)
	require.NoError(t, err)
	m, err := c.Load([]byte("\x7fELF............................"))
	require.NoError(t, err)
	fn, err := c.Function(m, "kernel", 200<<10)
	require.NoError(t, err)
	for cluster, want := range map[uint32]int{1: 100, 2: 50, 4: 5*4 + 2, 8: 5*2 + 1} {
		n, err := c.ClusterOccupancy(fn, 96, 200<<10, cluster)
		require.NoError(t, err)
		assert.Equal(t, want, n, "clusters of %d", cluster)
	}
	_, err = c.ClusterOccupancy(fn, 96, 200<<10, 16)
	require.ErrorContains(t, err, "cuOccupancyMaxActiveClusters: CUDA_ERROR_INVALID_CLUSTER_SIZE (912)")
}

func TestMemory(t *testing.T) {
	f := drivertest.New(t)
	c, err := f.Open().PrimaryContext(0)
	require.NoError(t, err)
	s, err := c.NewStream()
	require.NoError(t, err)
	p, err := c.AllocFilled(s, 1000, 0)
	require.NoError(t, err)
	got := make([]byte, 1000)
	require.NoError(t, c.Read(s, got, p))
	assert.Equal(t, make([]byte, 1000), got)
	require.NoError(t, c.Write(s, p+10, []byte("zipserv")))
	require.NoError(t, c.Read(s, got[:9], p+9))
	assert.Equal(t, "\x00zipserv\x00", string(got[:9]))
	require.NoError(t, c.Free(p))
	require.NoError(t, c.DestroyStream(s))
	assert.Zero(t, f.Live(drivertest.Allocations)+f.Live(drivertest.Streams))
	_, err = c.AllocFilled(s, 1<<40, 0)
	var failed *driver.Error
	require.True(t, errors.As(err, &failed) && failed.Code == driver.OutOfMemory)
}

func TestLoadingWorksDuringACapture(t *testing.T) {
	f := drivertest.New(t)
	c, err := f.Open().PrimaryContext(0)
	require.NoError(t, err)
	s, err := c.NewStream()
	require.NoError(t, err)
	f.Capture(0x99, 1)
	defer f.Capture(0, 0)
	_, err = c.Load([]byte("\x7fELF............................"))
	require.NoError(t, err)
	_, err = c.AllocFilled(s, 16, 0)
	require.NoError(t, err)
	active, id, g, err := c.Capture(0x99)
	require.NoError(t, err)
	assert.True(t, active)
	assert.EqualValues(t, 1, id)
	assert.NotZero(t, g)
	active, _, _, err = c.Capture(s)
	require.NoError(t, err)
	assert.False(t, active)
}

func TestContextsOfManyThreadsDoNotMix(t *testing.T) {
	f := drivertest.New(t)
	d := f.Open()
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			c, err := d.PrimaryContext(i % 2)
			if !assert.NoError(t, err) {
				return
			}
			for range 50 {
				m, err := c.Load([]byte("\x7fELF............................"))
				if !assert.NoError(t, err) {
					return
				}
				fn, err := c.Function(m, "k", 0)
				assert.NoError(t, err)
				assert.NoError(t, c.Launch(&driver.Launch{Function: fn, Grid: [3]uint32{1, 1, 1}, Block: 32, NumArgs: 4}))
				assert.NoError(t, c.Unload(m))
			}
		})
	}
	wg.Wait()
	assert.Zero(t, f.Live(drivertest.Modules))
}

func BenchmarkLaunch(b *testing.B) {
	f := drivertest.New(b)
	c, err := f.Open().PrimaryContext(0)
	require.NoError(b, err)
	m, err := c.Load([]byte("\x7fELF............................"))
	require.NoError(b, err)
	fn, err := c.Function(m, "", 0) // the fake does not spell out parameters of a kernel without a name
	require.NoError(b, err)
	l := driver.Launch{Function: fn, Grid: [3]uint32{1, 1, 1}, Block: 32, NumArgs: 11}
	b.ReportAllocs()
	for b.Loop() {
		if err := c.Launch(&l); err != nil {
			b.Fatal(err)
		}
	}
}
