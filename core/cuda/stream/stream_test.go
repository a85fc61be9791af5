// SPDX-License-Identifier: Apache-2.0

package stream_test

import (
	"bytes"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/zipserv/zipserv/core/cuda/driver"
	"github.com/zipserv/zipserv/core/cuda/drivertest"
	"github.com/zipserv/zipserv/core/cuda/stream"
)

const size = 4096

func open(t *testing.T) (*drivertest.Fake, *driver.Context, *stream.Pool, *stream.Workspaces) {
	t.Helper()
	f := drivertest.New(t)
	ctx, err := f.Open().PrimaryContext(0)
	require.NoError(t, err)
	p, err := stream.NewPool(ctx)
	require.NoError(t, err)
	return f, ctx, p, stream.NewWorkspaces(ctx, p.Side(0))
}

func TestFollowMakesNothingNew(t *testing.T) {
	f, _, p, _ := open(t)
	streams, events := f.Live(drivertest.Streams), f.Live(drivertest.Events)
	assert.NotEqual(t, p.Side(0), p.Side(1))
	assert.Equal(t, p.Side(0), p.Side(2))
	f.Reset()
	for range 100 {
		require.NoError(t, p.Follow(p.Side(1), 0x77))
	}
	assert.Equal(t, []string{"record", "wait"}, f.Log()[:2])
	assert.Equal(t, streams, f.Live(drivertest.Streams))
	assert.Equal(t, events, f.Live(drivertest.Events))
	f.Fail("cuEventRecord", 1, 0)
	assert.ErrorContains(t, p.Follow(p.Side(1), 0x77), "cuEventRecord")
	f.Reset()
	require.NoError(t, p.Follow(p.Side(1), 0x77))
	assert.Equal(t, events, f.Live(drivertest.Events), "a failed call gives its event back")
}

func TestManyFollowersAtOnce(t *testing.T) {
	_, _, p, _ := open(t)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 100 {
				assert.NoError(t, p.Follow(p.Side(1), 1))
			}
		})
	}
	wg.Wait()
}

func TestEveryStreamHasAWorkspaceOfItsOwnFilledWithOnes(t *testing.T) {
	f, ctx, _, w := open(t)
	before := f.Live(drivertest.Allocations)
	seen := map[driver.Pointer]bool{}
	for _, s := range []driver.Stream{0, 0x10, 0x20} {
		p, err := w.Get(s, size)
		require.NoError(t, err)
		seen[p] = true
		got := make([]byte, size)
		require.NoError(t, ctx.Read(0, got, p))
		assert.Equal(t, bytes.Repeat([]byte{0xFF}, size), got)
		again, err := w.Get(s, size)
		require.NoError(t, err)
		assert.Equal(t, p, again)
	}
	assert.Len(t, seen, 3)
	assert.Equal(t, before+3, f.Live(drivertest.Allocations))
	assert.Equal(t, 3, w.Count())
}

func TestACaptureHasAWorkspaceOfItsOwn(t *testing.T) {
	f, _, _, w := open(t)
	eager, err := w.Get(0x10, size)
	require.NoError(t, err)
	f.Capture(0x10, 1)
	first, err := w.Get(0x10, size)
	require.NoError(t, err)
	assert.NotEqual(t, eager, first)
	again, err := w.Get(0x10, size)
	require.NoError(t, err)
	assert.Equal(t, first, again, "launches of one capture in one stream follow each other")

	f.Capture(0x10, 2)
	second, err := w.Get(0x10, size)
	require.NoError(t, err)
	assert.NotEqual(t, first, second, "the first graph may be replayed at any time")
	f.Capture(0, 0)
	p, err := w.Get(0x10, size)
	require.NoError(t, err)
	assert.Equal(t, eager, p)

	// Both graphs go: their workspaces serve the next captures, and nothing new is made.
	f.DestroyGraphs()
	count := w.Count()
	f.Capture(0x10, 3)
	third, err := w.Get(0x10, size)
	require.NoError(t, err)
	assert.Contains(t, []driver.Pointer{first, second}, third)
	f.Capture(0x20, 3)
	fourth, err := w.Get(0x20, size)
	require.NoError(t, err)
	assert.Contains(t, []driver.Pointer{first, second}, fourth)
	assert.NotEqual(t, third, fourth, "streams of one capture may overlap")
	assert.Equal(t, count, w.Count())
}

func TestALargerProblemGetsALargerWorkspace(t *testing.T) {
	f, ctx, _, w := open(t)
	small, err := w.Get(0x10, 1<<20)
	require.NoError(t, err)
	large, err := w.Get(0x10, 1<<20+1)
	require.NoError(t, err)
	assert.NotEqual(t, small, large)
	got := make([]byte, 2<<20)
	require.NoError(t, ctx.Read(0, got, large))
	assert.Equal(t, bytes.Repeat([]byte{0xFF}, 2<<20), got)
	again, err := w.Get(0x10, 1)
	require.NoError(t, err)
	assert.Equal(t, large, again)

	f.Capture(0x10, 1)
	first, err := w.Get(0x10, 1)
	require.NoError(t, err)
	second, err := w.Get(0x10, 3<<20)
	require.NoError(t, err)
	third, err := w.Get(0x10, 2)
	require.NoError(t, err)
	assert.Equal(t, first, third)
	f.DestroyGraphs()
	f.Capture(0x10, 2)
	next, err := w.Get(0x10, 4<<20)
	require.NoError(t, err)
	assert.Equal(t, second, next, "reused by size")
}

func TestFailuresLeaveNothingBehind(t *testing.T) {
	f, _, _, w := open(t)
	f.Fail("cuMemAlloc_v2", driver.OutOfMemory, 0)
	_, err := w.Get(0x10, size)
	require.ErrorContains(t, err, "a workspace of 1048576 bytes: cuMemAlloc_v2: CUDA_ERROR_OUT_OF_MEMORY")
	f.Reset()
	_, err = w.Get(0x10, size)
	require.NoError(t, err)

	f.Capture(0x30, 9)
	f.Fail("cuUserObjectCreate", 1, 0)
	_, err = w.Get(0x30, size)
	require.ErrorContains(t, err, "cuUserObjectCreate")
	f.Reset()
	_, err = w.Get(0x30, size)
	require.NoError(t, err)
}

func TestWorkspacesFromManyThreads(t *testing.T) {
	_, _, _, w := open(t)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for range 100 {
				_, err := w.Get(driver.Stream(i%3), size)
				assert.NoError(t, err)
			}
		})
	}
	wg.Wait()
	assert.Equal(t, 3, w.Count())
}

func BenchmarkGet(b *testing.B) {
	f := drivertest.New(b)
	ctx, err := f.Open().PrimaryContext(0)
	require.NoError(b, err)
	p, err := stream.NewPool(ctx)
	require.NoError(b, err)
	w := stream.NewWorkspaces(ctx, p.Side(0))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := w.Get(0x10, size); err != nil {
			b.Fatal(err)
		}
	}
}
