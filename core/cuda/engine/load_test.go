// SPDX-License-Identifier: Apache-2.0

package engine_test

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/zipserv/zipserv/core/cuda/driver"
	"github.com/zipserv/zipserv/core/cuda/drivertest"
	"github.com/zipserv/zipserv/core/cuda/engine"
)

func TestLoad(t *testing.T) {
	f := drivertest.New(t)
	e, err := engine.NewFrom(f.Open(), stubs)
	require.NoError(t, err)
	data := make([]byte, 23<<20)
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range data {
		data[i] = byte(rng.Uint32())
	}
	path := filepath.Join(t.TempDir(), "file")
	require.NoError(t, os.WriteFile(path, data, 0o600))
	file, err := os.Open(path)
	require.NoError(t, err)
	defer file.Close()
	to := make([]byte, len(data))
	at := func(i int) driver.Pointer { return driver.Pointer(uintptr(unsafe.Pointer(&to[i]))) }
	part := func(begin, end int) engine.LoadPart {
		return engine.LoadPart{File: int(file.Fd()), Offset: uint64(begin), Bytes: uint64(end - begin), To: at(begin)}
	}
	cuts := []int{0, 3, 9 << 20, 9 << 20, 13<<20 + 1, len(data)}
	var parts []engine.LoadPart
	for i := range cuts[1:] {
		parts = append(parts, part(cuts[i], cuts[i+1]))
	}
	d := device(t, e, 1)
	events := f.Live(drivertest.Events)
	for range 3 {
		clear(to)
		l, err := d.StartLoad(0x77, parts, 3)
		require.NoError(t, err)
		for i := range parts {
			failed, err := l.Await(i, 0x77)
			require.NoError(t, err)
			require.Equal(t, -1, failed)
			assert.True(t, bytes.Equal(data[cuts[i]:cuts[i+1]], to[cuts[i]:cuts[i+1]]), i)
		}
		require.NoError(t, l.Finish(false))
	}
	assert.LessOrEqual(t, f.Live(drivertest.Events), events+3*2, "the buffers are used again")

	l, err := d.StartLoad(0, []engine.LoadPart{part(0, 1), {File: int(file.Fd()), Offset: uint64(len(data)) - 1, Bytes: 2, To: at(0)}}, 2)
	require.NoError(t, err)
	failed, err := l.Await(1, 0)
	require.NoError(t, err)
	assert.Equal(t, 1, failed)
	require.ErrorContains(t, l.Finish(true), "the file was cut short")

	l, err = d.StartLoad(0, parts, 1)
	require.NoError(t, err)
	require.NoError(t, l.Finish(true), "stopped half way")

	// One lane, two buffers: the first part's is in use again when the second part is queued, so its copy is known to be done.
	l, err = d.StartLoad(0, []engine.LoadPart{part(0, 4<<20), part(4<<20, 12<<20)}, 1)
	require.NoError(t, err)
	waits := func() (n int) {
		for _, call := range f.Log() {
			if call == "wait" {
				n++
			}
		}
		return n
	}
	for i, more := range map[int]int{1: 1, 0: 0} {
		before := waits()
		_, err = l.Await(1, 0x77) // both are queued
		require.NoError(t, err)
		between := waits()
		assert.Equal(t, before+1, between)
		_, err = l.Await(i, 0x77)
		require.NoError(t, err)
		assert.Equal(t, between+more, waits(), "part %d", i)
	}
	f.Fail("cuStreamWaitEvent", 700, 0)
	_, err = l.Await(1, 0x77)
	require.ErrorContains(t, err, "cuStreamWaitEvent")
	f.Reset()
	require.NoError(t, l.Finish(false))

	f.Fail("cuEventRecord", 700, 0)
	_, err = d.StartLoad(0, parts, 1)
	require.ErrorContains(t, err, "cuEventRecord")
	f.Reset()
	l, err = d.StartLoad(0, nil, 1)
	require.NoError(t, err, "the failed start has let the buffers go")
	require.NoError(t, l.Finish(false))
	_, err = d.StartLoad(0, parts, 0)
	require.ErrorContains(t, err, "lanes")
}
