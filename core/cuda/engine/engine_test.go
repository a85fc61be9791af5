// SPDX-License-Identifier: Apache-2.0

package engine_test

import (
	"fmt"
	"math"
	"strings"
	"sync"
	"testing"
	"testing/fstest"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/zipserv/zipserv/core/cuda/driver"
	"github.com/zipserv/zipserv/core/cuda/drivertest"
	"github.com/zipserv/zipserv/core/cuda/engine"
	"github.com/zipserv/zipserv/core/cuda/jit"
	"github.com/zipserv/zipserv/core/cuda/plan"
	"github.com/zipserv/zipserv/core/cuda/tuned"
	"github.com/zipserv/zipserv/core/format"
)

// stubs have the kernels' names and nothing in them: they compile in no time.
var stubs = fstest.MapFS{
	"zipgemm_mma.cu":     {Data: []byte(`extern "C" __global__ void zs_zipgemm_mma() {}`)},
	"zipgemm_wgmma.cu":   {Data: []byte(`extern "C" __global__ void zs_zipgemm_wgmma() {}`)},
	"decompress.cu":      {Data: []byte(`extern "C" __global__ void zs_decompress() {}`)},
	"gather.cu":          {Data: []byte(`extern "C" __global__ void zs_gather() {}`)},
	"zipgemm_grouped.cu": {Data: []byte(`extern "C" __global__ void zs_zipgemm_grouped() {}`)},
	"moe.cu": {Data: []byte(`extern "C" __global__ void zs_moe_route() {}
extern "C" __global__ void zs_moe_combine() {}`)},
	"zipgemm_relay.cu": {Data: []byte(`extern "C" __global__ void zs_zipgemm_relay() {}`)},
	"zipgemm_pair.cu":  {Data: []byte(`extern "C" __global__ void zs_zipgemm_pair() {}`)},
	"compress.cu": {Data: []byte(`extern "C" __global__ void zs_compress_sample() {}
extern "C" __global__ void zs_compress() {}`)},
}

// open makes an engine over a fake driver. Kernels are really compiled; the cache lives as long as the test binary, so each is once.
func open(t testing.TB) (*drivertest.Fake, *engine.Engine) {
	t.Helper()
	drivertest.Compiler(t)
	t.Setenv(jit.EnvCacheDir, cacheDir(t))
	engine.SetCompilerDirs(drivertest.CompilerDirs())
	f := drivertest.New(t)
	e, err := engine.NewFrom(f.Open(), stubs)
	require.NoError(t, err)
	return f, e
}

func device(t testing.TB, e *engine.Engine, ordinal int) *engine.Device {
	t.Helper()
	d, err := e.Device(ordinal)
	require.NoError(t, err)
	return d
}

func launches(f *drivertest.Fake) (out []string) {
	for _, line := range f.Log() {
		if strings.HasPrefix(line, "launch ") {
			out = append(out, line)
		}
	}
	return out
}

func count(f *drivertest.Fake, word string) (n int) {
	for _, line := range f.Log() {
		if strings.HasPrefix(line, word) {
			n++
		}
	}
	return n
}

func job() engine.Matmul {
	return engine.Matmul{Stream: 0x77, Blob: 0x1000, M: 1024, K: 512, N: 5, X: 0x20000, LdX: 512, Y: 0x30000, LdY: 1024}
}

func TestLinearLaunchesOnceOnTheStreamItWasGiven(t *testing.T) {
	f, e := open(t)
	d := device(t, e, 0)
	p := job()
	needs, err := d.Linear(&p)
	require.NoError(t, err)
	assert.Zero(t, needs)
	require.Len(t, launches(f), 1)
	assert.Regexp(t, `^launch 0 zs_zipgemm_wgmma grid \d+,1,1 block \d+ smem \d+ stream 77 pdl [01] args 1000 20000 200 0$`, launches(f)[0])
	assert.Contains(t, f.Log(), "tensor 5x512 ld 512 box 8x64")

	f.Reset()
	for range 10 {
		_, err = d.Linear(&p)
		require.NoError(t, err)
	}
	assert.Len(t, launches(f), 10)
	for _, word := range []string{"alloc", "synchronize", "load", "record"} {
		assert.Zero(t, count(f, word), "the hot path does not %s", word)
	}
}

func TestManyTokens(t *testing.T) {
	f, e := open(t)
	d := device(t, e, 0)
	p := job()
	p.N = 8192
	p.X += 2 // else it would be the relay kernel's
	needs, err := d.Linear(&p)
	require.NoError(t, err)
	assert.EqualValues(t, engine.NeedsExpand, needs)
	assert.Empty(t, launches(f))
	p.X -= 2

	engine.SetInvariant(true)
	defer engine.SetInvariant(false)
	p.N = 200
	needs, err = d.Linear(&p)
	require.NoError(t, err)
	assert.Zero(t, needs)
	require.Len(t, launches(f), 2, "128 + 72 tokens")
	for i, line := range launches(f) {
		assert.Contains(t, line, fmt.Sprintf("args 1000 %x 200 0", 0x20000+2*512*128*i), "the activations move on")
	}
	assert.Contains(t, f.Log(), "tensor 72x512 ld 512 box 72x64", "and so does their map")
}

// One launch in clusters takes any number of tokens, with boxes of the layout's own and one plan for a class.
func TestManyTokensInOneLaunch(t *testing.T) {
	f, e := open(t)
	d := device(t, e, 0)
	for _, c := range []struct {
		n          uint64
		want       string // grid, block
		xbox, ybox int
		clusters   string
	}{
		{129, "grid 132,1,1 block 512", 48, 192, ""}, {130, "grid 132,1,1 block 512", 48, 192, ""}, {192, "grid 132,1,1 block 512", 48, 192, ""},
		{256, "grid 132,1,1 block 384", 64, 256, ""}, {512, "grid 132,1,1 block 384", 128, 256, "cluster 2 "},
	} {
		f.Reset()
		p := engine.Matmul{Stream: 0x77, Blob: 0x1000, M: 28672, K: 4096, N: c.n, X: 0x20000, LdX: 4096, Y: 0x3000000, LdY: 28672}
		needs, err := d.Linear(&p)
		require.NoError(t, err)
		assert.Zero(t, needs)
		require.Len(t, launches(f), 1)
		assert.Contains(t, launches(f)[0], "zs_zipgemm_pair "+c.want)
		assert.Equal(t, c.clusters != "", strings.Contains(launches(f)[0], "cluster"))
		assert.Contains(t, launches(f)[0], c.clusters+"args 1080 39080 9a39080 20000 1000 0 3000000 7000 7000 7000 1000 ")
		assert.Contains(t, f.Log(), fmt.Sprintf("tensor %dx4096 ld 4096 box %dx64", c.n, c.xbox))
		assert.Contains(t, f.Log(), fmt.Sprintf("tensor %dx28672 ld 28672 box %dx64", c.n, c.ybox), "the results")
		if c.n != 129 && c.n != 256 && c.n != 512 {
			assert.Zero(t, count(f, "load"), "of a class one plan")
		}
	}

	// Smaller grids where there is less work; boxes are whole where there are fewer tokens.
	p := engine.Matmul{Stream: 0x77, Blob: 0x1000, M: 6144, K: 4096, N: 200, X: 0x20000, LdX: 4096, Y: 0x3000000, LdY: 6144}
	f.Reset()
	_, err := d.Linear(&p)
	require.NoError(t, err)
	assert.Contains(t, launches(f)[0], "zs_zipgemm_pair grid 96,1,1 block 512")
	assert.Contains(t, f.Log(), "tensor 200x4096 ld 4096 box 64x64")
	large := plan.Choice{Kernel: plan.Pair, MW: 2, KW: 4, Blocks: 96}
	require.NoError(t, d.Choose(tuned.Problem{M: 6144, K: 4096, Tokens: 256}, &large))
	f.Reset()
	_, err = d.Linear(&p)
	require.NoError(t, err)
	assert.Contains(t, f.Log(), "tensor 200x4096 ld 4096 box 128x64")
	require.NoError(t, d.Choose(tuned.Problem{M: 6144, K: 4096, Tokens: 256}, nil))
	p.X += 2
	f.Reset()
	_, err = d.Linear(&p)
	require.NoError(t, err)
	for _, line := range launches(f) {
		assert.Contains(t, line, "zs_zipgemm_mma", "unaligned activations")
	}

	engine.SetInvariant(true)
	defer engine.SetInvariant(false)
	p.X -= 2
	f.Reset()
	_, err = d.Linear(&p)
	require.NoError(t, err)
	require.Len(t, launches(f), 2)
	assert.Contains(t, launches(f)[0], "zs_zipgemm_wgmma")
}

// Some rows of a blob: the kernels for many tokens are given these rows' sections, the others leave such products alone.
func TestProductsOfSomeRows(t *testing.T) {
	f, e := open(t)
	d := device(t, e, 0)
	p := engine.Matmul{Stream: 0x77, Blob: 0x1000, M: 5000, K: 4096, N: 512, X: 0x20000, LdX: 4096, Y: 0x3000000, LdY: 4096, Row0: 128, Rows: 4096}
	needs, err := d.Linear(&p)
	require.NoError(t, err)
	assert.Zero(t, needs)
	// 79 strips of 64 tiles: headers 8 bytes, 5632 of the fixed part; 128 tiles are passed over.
	assert.Contains(t, launches(f)[0], "args 1480 bae80 1b32e80 20000 1000 0 3000000 1000 1000 1000 1000 200 ")
	assert.Contains(t, f.Log(), "tensor 512x4096 ld 4096 box 128x64")

	f.Reset()
	p.N = 64
	needs, err = d.Linear(&p)
	require.NoError(t, err)
	assert.EqualValues(t, engine.NeedsExpand, needs)
	assert.Empty(t, launches(f))
	p.Row0, p.Rows, p.M = 0, 4096, 4096
	needs, err = d.Linear(&p)
	require.NoError(t, err)
	assert.Zero(t, needs, "all rows")

	for _, bad := range [][2]uint64{{100, 64}, {4096, 1}, {64, 4096}, {1 << 40, 64}, {64, 0}, {64, math.MaxUint64 - 63}} {
		p.Row0, p.Rows = bad[0], bad[1]
		_, err = d.Linear(&p)
		assert.ErrorContains(t, err, "row", "%v", bad)
	}
}

// Results of several layers' rows: a matrix for each, where the kernel is one for many tokens.
func TestProductsInParts(t *testing.T) {
	f, e := open(t)
	d := device(t, e, 0)
	p := engine.Matmul{Stream: 0x77, Blob: 0x1000, M: 28672, K: 4096, N: 500, X: 0x20000, LdX: 4096, Y: 0x3000000, LdY: 14336, PartRows: 14336}
	needs, err := d.Linear(&p)
	require.NoError(t, err)
	assert.Zero(t, needs)
	assert.Contains(t, launches(f)[0], " 0 3000000 3800 7000 3800 1000 1f4 ")
	assert.Contains(t, f.Log(), "2 of tensor 500x14336 ld 14336 box 256x64")

	// Some rows, in parts.
	f.Reset()
	p.Row0, p.Rows, p.PartRows, p.LdY = 4096, 3*2048, 2048, 2048
	needs, err = d.Linear(&p)
	require.NoError(t, err)
	assert.Zero(t, needs)
	assert.Contains(t, f.Log(), "3 of tensor 500x2048 ld 2048 box 256x64")

	f.Reset()
	p.N = 128
	needs, err = d.Linear(&p)
	require.NoError(t, err)
	assert.EqualValues(t, engine.NeedsExpand, needs, "few tokens")
	p.Row0, p.Rows, p.N, p.PartRows = 0, 0, 5, 28672
	needs, err = d.Linear(&p)
	require.NoError(t, err)
	assert.Zero(t, needs, "one part is the whole")
	p.N = 500
	for _, bad := range []uint64{1, 100, 14336 - 64, 28672 + 64, math.MaxUint64} {
		p.PartRows = bad
		_, err = d.Linear(&p)
		assert.ErrorContains(t, err, "parts of", "%d", bad)
	}
}

// Gates: one result of half the width, by a kernel that applies them or not at all.
func TestGatedProducts(t *testing.T) {
	f, e := open(t)
	d := device(t, e, 0)
	p := engine.Matmul{Stream: 0x77, Blob: 0x1000, M: 28672, K: 4096, N: 500, X: 0x20000, LdX: 4096, Y: 0x3000000, LdY: 14336, Gated: true}
	needs, err := d.Linear(&p)
	require.NoError(t, err)
	assert.Zero(t, needs)
	assert.Contains(t, launches(f)[0], " 0 3000000 3800 7000 3800 1000 1f4 ")
	assert.Contains(t, f.Log(), "tensor 500x14336 ld 14336 box 128x64")

	f.Reset()
	p.Gated, p.LdY = false, 28672
	needs, err = d.Linear(&p)
	require.NoError(t, err)
	assert.Zero(t, needs, "without gates another plan")
	assert.Contains(t, f.Log(), "tensor 500x28672 ld 28672 box 256x64")

	f.Reset()
	p.Gated, p.LdY = true, 14336
	for _, n := range []uint64{1, 128} {
		p.N = n
		needs, err = d.Linear(&p)
		require.NoError(t, err)
		assert.Zero(t, needs, "few tokens")
	}
	assert.Contains(t, strings.Join(launches(f), " "), "zs_zipgemm_wgmma")
	f.Reset()
	for _, n := range []uint64{2, 500} {
		p.N, p.X = n, 0x20002
		needs, err = d.Linear(&p)
		require.NoError(t, err)
		assert.EqualValues(t, engine.NeedsExpand, needs, "x not aligned")
	}
	p.X = 0x20000
	engine.SetInvariant(true)
	defer engine.SetInvariant(false)
	needs, err = d.Linear(&p)
	require.NoError(t, err)
	assert.EqualValues(t, engine.NeedsExpand, needs, "batch-invariant")
	assert.Empty(t, launches(f))
	for _, bad := range []engine.Matmul{{M: 28672 - 64}, {M: 28672, Rows: 14336}, {M: 28672, PartRows: 14336}} {
		q := p
		q.M, q.Rows, q.PartRows = bad.M, bad.Rows, bad.PartRows
		_, err = d.Linear(&q)
		assert.ErrorContains(t, err, "gates need all rows", "%+v", bad)
	}
}

// The kernel that hands decoded weights on asks for memory to do so; its results have a tensor map too, where they can.
func TestScratchMemoryIsAskedFor(t *testing.T) {
	f, e := open(t)
	d := device(t, e, 0)
	p := engine.Matmul{Stream: 0x77, Blob: 0x1000, M: 4096 - 60, K: 4096, N: 8000, X: 0x20000, LdX: 4096, Y: 0x3000000, LdY: 4096}
	needs, err := d.Linear(&p)
	require.NoError(t, err)
	assert.EqualValues(t, 64*64*8192, needs, "whole pairs of strips")
	assert.Empty(t, launches(f))
	p.Scratch, p.ScratchBytes = 0x700000, needs-1
	again, err := d.Linear(&p)
	require.NoError(t, err)
	assert.Equal(t, needs, again)
	p.ScratchBytes = needs
	f.Reset()
	needs, err = d.Linear(&p)
	require.NoError(t, err)
	assert.Zero(t, needs)
	require.Len(t, launches(f), 1)
	assert.Regexp(t, `zs_zipgemm_relay grid 132,1,1 block 384 smem \d+ stream 77 pdl \d cluster 2 args 1080 9080 1609080 20000 1000 0 3000000 1000 fc4 fc4 1000 1f40 [0-9a-f]+ [0-9a-f]+ 700000$`, launches(f)[0])
	assert.Contains(t, f.Log(), "tensor 8000x4096 ld 4096 box 128x64")
	assert.Contains(t, f.Log(), "tensor 8000x4036 ld 4096 box 256x64", "the results")
	p.Y += 2
	f.Reset()
	_, err = d.Linear(&p)
	require.NoError(t, err)
	assert.Equal(t, 2, count(f, "tensor 8000x4096 ld 4096 box 128x64"), "none of results that no copy can write")
	p.Scratch += 8
	_, err = d.Linear(&p)
	assert.ErrorContains(t, err, "not aligned to 16 bytes")
}

// Without memory for its code nothing is settled: the next call gets the kernel. Where clusters have no room there is another way, for good.
func TestMemoryThatIsUsedUpSettlesNothing(t *testing.T) {
	f, e := open(t)
	d := device(t, e, 0)
	p := engine.Matmul{Stream: 0x77, Blob: 0x1000, M: 4096, K: 4096, N: 8192, X: 0x20000, LdX: 4096, Y: 0x3000000, LdY: 4096}
	f.Fail("cuModuleLoadData", driver.OutOfMemory, 0)
	_, err := d.Linear(&p)
	require.ErrorContains(t, err, "OUT_OF_MEMORY")
	f.Fail("", 0, 0)
	needs, err := d.Linear(&p)
	require.NoError(t, err)
	assert.EqualValues(t, 2*4096*4096, needs, "the kernel that hands decoded weights on")

	p.M = 8192
	f.Fail("cuOccupancyMaxActiveClusters", 1, 0)
	needs, err = d.Linear(&p)
	require.NoError(t, err)
	assert.EqualValues(t, engine.NeedsExpand, needs, "no room for clusters")
}

// Warm makes ready whatever a larger number of tokens may take, also where no smaller one takes it.
func TestWarmForThousandsOfTokens(t *testing.T) {
	f, e := open(t)
	d := device(t, e, 0)
	late := 0
	for m := uint64(512); m <= 4096; m += 512 {
		first := uint64(0) // of the relay kernel
		for n := uint64(256); n <= 8192; n += 64 {
			p := engine.Matmul{Stream: 0x77, Blob: 0x1000, M: m, K: 4096, N: n, X: 0x20000, LdX: 4096, Y: 0x3000000, LdY: m}
			needs, err := d.Linear(&p)
			require.NoError(t, err)
			if needs > engine.NeedsExpand && first == 0 {
				first = n
			}
		}
		if first <= 2048 {
			continue
		}
		late++
		g, e := open(t)
		d := device(t, e, 0)
		require.NoError(t, d.Warm(m, 4096, 8192, false))
		g.Reset()
		p := engine.Matmul{Stream: 0x77, Blob: 0x1000, M: m, K: 4096, N: first, X: 0x20000, LdX: 4096, Y: 0x3000000, LdY: m}
		needs, err := d.Linear(&p)
		require.NoError(t, err)
		assert.Greater(t, needs, uint64(engine.NeedsExpand))
		assert.Zero(t, count(g, "load"), "M = %d, N = %d", m, first)
	}
	assert.Positive(t, late, "no shape shows it")
	assert.NotEmpty(t, f.Log())
}

// Rows that begin anywhere are no matter for a tensor map.
func TestUnalignedActivations(t *testing.T) {
	f, e := open(t)
	d := device(t, e, 0)
	for _, change := range []func(*engine.Matmul){
		func(p *engine.Matmul) { p.X += 2 }, func(p *engine.Matmul) { p.LdX = 515 }, func(p *engine.Matmul) { p.K, p.LdX = 511, 512 },
	} {
		p := job()
		change(&p)
		f.Reset()
		_, err := d.Linear(&p)
		require.NoError(t, err)
		require.Len(t, launches(f), 1)
		assert.Contains(t, launches(f)[0], "zs_zipgemm_mma")
		assert.Zero(t, count(f, "tensor"))
	}
	p := job()
	p.N, p.LdX = 1, 515 // the distance between rows is nothing to a single one
	f.Reset()
	_, err := d.Linear(&p)
	require.NoError(t, err)
	assert.Contains(t, f.Log(), "tensor 1x512 ld 512 box 8x64")
}

func TestDevicesHaveTheirOwnState(t *testing.T) {
	f, e := open(t)
	for ordinal := range 2 {
		d := device(t, e, ordinal)
		assert.Same(t, d, device(t, e, ordinal))
		p := job()
		_, err := d.Linear(&p)
		require.NoError(t, err)
	}
	require.Len(t, launches(f), 2)
	assert.True(t, strings.HasPrefix(launches(f)[0], "launch 0 "))
	assert.True(t, strings.HasPrefix(launches(f)[1], "launch 1 "))
	assert.Equal(t, 1, count(f, "retain 0"))
	assert.Equal(t, 1, count(f, "retain 1"))
	for _, ordinal := range []int{-1, 2, 1000} {
		_, err := e.Device(ordinal)
		var wrong engine.ArgumentError
		assert.ErrorAs(t, err, &wrong)
	}
}

func TestDecompress(t *testing.T) {
	f, e := open(t)
	d := device(t, e, 0)
	require.NoError(t, d.Decompress(0x88, 0x1000, 1000, 777, 0, 1000, 0x5000, 800))
	require.Len(t, launches(f), 1)
	assert.Regexp(t, `^launch 0 zs_decompress grid \d+,1,1 block \d+ smem \d+ stream 88 pdl [01] args 1000 5000 320 `, launches(f)[0])
	assert.ErrorContains(t, d.Decompress(0, 0x1000, 1000, 777, 0, 1000, 0x5000, 776), "do not fit")
	assert.ErrorContains(t, d.Decompress(0, 0x1000, 0, 777, 0, 1, 0x5000, 777), "M and K")
	f.Reset()
	require.NoError(t, d.Decompress(0, 0x1000, 1000, 777, 64, 100, 0x5000, 777))
	assert.Contains(t, launches(f)[0], "grid 7,1,1", "26 tiles, 4 warps a block")
	for _, r := range [][2]uint64{{1, 5}, {0, 1001}, {1024, 1}, {960, 41}, {64, 0}, {64, 1<<64 - 1}} {
		assert.ErrorContains(t, d.Decompress(0, 0x1000, 1000, 777, r[0], r[1], 0x5000, 777), "multiple of 64")
	}
}

func TestGather(t *testing.T) {
	f, e := open(t)
	d := device(t, e, 0)
	p := engine.Lookup{Stream: 0x88, Blob: 0x1000, DType: format.BF16, M: 1000, K: 777, N: 5, IDs: 0x4000, IDBytes: 8, Out: 0x5000}
	require.NoError(t, d.Gather(&p))
	assert.Equal(t, []string{"launch 0 zs_gather grid 3,1,1 block 128 smem 4096 stream 88 pdl 1 args 1000 4000 8 5000"}, launches(f),
		"5 tokens of 13 tiles; early from the first time on")

	f.Reset()
	p.N, p.IDBytes = 8192, 4
	require.NoError(t, d.Gather(&p))
	assert.Contains(t, launches(f)[0], "grid 3328,1,1")
	for _, word := range []string{"alloc", "synchronize", "load", "record"} {
		assert.Zero(t, count(f, word), "the hot path does not %s", word)
	}
	p.DType = format.FP16
	require.NoError(t, d.Gather(&p))
	assert.Equal(t, 1, count(f, "load"), "a variant of its own")

	f.Reset()
	p.N = 0
	require.NoError(t, d.Gather(&p))
	assert.Empty(t, launches(f))
	p.N, p.IDBytes = 1<<32/13+10, 8
	require.NoError(t, d.Gather(&p))
	require.Len(t, launches(f), 2, "pieces are counted in 32 bits")
	most := uint64(1<<32-1) / 13
	assert.Contains(t, launches(f)[1], fmt.Sprintf("grid 5,1,1 block 128 smem 4096 stream 88 pdl 1 args 1000 %x 8 %x", 0x4000+8*most, 0x5000+2*777*most))

	for _, change := range []func(*engine.Lookup){
		func(p *engine.Lookup) { p.M = 0 }, func(p *engine.Lookup) { p.K = 1 << 31 }, func(p *engine.Lookup) { p.Blob = 0x1008 },
		func(p *engine.Lookup) { p.DType = 3 }, func(p *engine.Lookup) { p.IDBytes = 2 }, func(p *engine.Lookup) { p.IDs = 0x4004 },
	} {
		wrongly := engine.Lookup{Blob: 0x1000, DType: format.BF16, M: 1000, K: 777, N: 5, IDs: 0x4000, IDBytes: 8, Out: 0x5000}
		change(&wrongly)
		var wrong engine.ArgumentError
		assert.ErrorAs(t, d.Gather(&wrongly), &wrong)
	}
}

func TestWrongArguments(t *testing.T) {
	_, e := open(t)
	d := device(t, e, 0)
	for _, change := range []func(*engine.Matmul){
		func(p *engine.Matmul) { p.M = 0 }, func(p *engine.Matmul) { p.K = 0 }, func(p *engine.Matmul) { p.N = 0 },
		func(p *engine.Matmul) { p.M = 1 << 31 }, func(p *engine.Matmul) { p.K = 1 << 40 }, func(p *engine.Matmul) { p.Blob = 0x1008 },
	} {
		p := job()
		change(&p)
		_, err := d.Linear(&p)
		var wrong engine.ArgumentError
		assert.ErrorAs(t, err, &wrong)
	}
}

func early(f *drivertest.Fake) (out []bool) {
	for _, line := range launches(f) {
		out = append(out, strings.Contains(line, "pdl 1"))
	}
	return out
}

// The first product with a blob waits for all work before it; only later ones may fetch weights early.
func TestOnlyBlobsThatWereReadBeforeAreFetchedEarly(t *testing.T) {
	f, e := open(t)
	d := device(t, e, 0)
	p := job()
	linear := func() {
		_, err := d.Linear(&p)
		require.NoError(t, err)
	}
	linear()
	linear()
	p.Blob = 0x2000
	linear()
	p.Blob = 0x1000
	linear()
	d.Changed(p.Blob)
	linear()
	linear()
	assert.Equal(t, []bool{false, true, false, true, false, true}, early(f))
	f.Reset()
	for range 2 {
		require.NoError(t, d.Decompress(0, 0x1000, 1000, 777, 0, 1000, 0x5000, 800))
		require.NoError(t, d.Decompress(0, 0x3000, 1000, 777, 0, 1000, 0x5000, 800))
	}
	assert.Equal(t, []bool{true, false, true, true}, early(f), "decompression, of a blob that was multiplied before and of a new one")

	// A blob that is written by the engine is new again.
	f.Reset()
	scratch := hostMemory(t, f, d.CompressScratch(1000, 777))
	blob := hostMemory(t, f, 1<<20)
	p.Blob = blob
	linear()
	c := engine.Compression{Src: 0x4000, Ld: 777, Header: format.Header{M: 1000, K: 777, Shape: []uint64{1000, 777}}, Scratch: scratch}
	room, err := d.CompressPlan(&c)
	require.NoError(t, err)
	require.NoError(t, d.CompressWrite(&c, blob, room))
	linear()
	linear()
	assert.Equal(t, []bool{false, false, false, false, true}, early(f), "product, two kernels of the compression, products")
}

func TestOldGPUsFetchNothingEarly(t *testing.T) {
	t.Setenv("FAKECUDA_CC", "89")
	f, e := open(t)
	d := device(t, e, 0)
	p := job()
	for range 3 {
		_, err := d.Linear(&p)
		require.NoError(t, err)
	}
	assert.Equal(t, []bool{false, false, false}, early(f))
}

func TestWarmLeavesNothingToDo(t *testing.T) {
	f, e := open(t)
	d := device(t, e, 0)
	require.NoError(t, d.Warm(1024, 512, 64, false))
	f.Reset()
	for _, n := range []uint64{1, 8, 9, 16, 30, 64} {
		p := job()
		p.Stream, p.N = 0, n
		_, err := d.Linear(&p)
		require.NoError(t, err)
	}
	require.NoError(t, d.Decompress(0, 0x1000, 1024, 512, 0, 1024, 0x5000, 512))
	assert.Zero(t, count(f, "load"))
	assert.Zero(t, count(f, "alloc"))

	require.NoError(t, d.Warm(28672, 4096, 8192, true))
	f.Reset()
	for n := uint64(1); n <= 8192; n += 1 + n/2 {
		p := engine.Matmul{Blob: 0x1000, M: 28672, K: 4096, N: n, X: 0x20000, LdX: 4096, Y: 0x3000000, LdY: 28672}
		_, err := d.Linear(&p)
		require.NoError(t, err)
		p.Gated, p.LdY = true, 14336
		_, err = d.Linear(&p)
		require.NoError(t, err)
	}
	assert.Zero(t, count(f, "load"))
	assert.Zero(t, count(f, "alloc"))
}

// Without being asked for, what applies gates is not made ready.
func TestWarmWithoutGates(t *testing.T) {
	f, e := open(t)
	d := device(t, e, 0)
	require.NoError(t, d.Warm(256, 512, 8, false))
	loads := count(f, "load")
	require.NoError(t, d.Warm(256, 512, 8, true))
	assert.Greater(t, count(f, "load"), loads)
	assert.ErrorContains(t, d.Warm(192, 512, 8, true), "a multiple of 128, not 192")
}

func TestACaptureMayBeTheFirstUse(t *testing.T) {
	f, e := open(t)
	d := device(t, e, 0)
	f.Capture(0x77, 1)
	p := job()
	_, err := d.Linear(&p)
	require.NoError(t, err)
	assert.Len(t, launches(f), 1)
}

func TestFailuresPassAndAreNotRemembered(t *testing.T) {
	for _, call := range []string{"cuModuleLoadData", "cuModuleGetFunction", "cuOccupancyMaxActiveBlocksPerMultiprocessor", "cuMemAlloc_v2", "cuLaunchKernelEx", "cuStreamGetCaptureInfo_v2"} {
		t.Run(call, func(t *testing.T) {
			f, e := open(t)
			d := device(t, e, 0)
			f.Fail(call, driver.OutOfMemory, 0)
			p := job()
			_, err := d.Linear(&p)
			var failed *driver.Error
			require.ErrorAs(t, err, &failed)
			assert.Equal(t, call, failed.Call)
			f.Reset()
			_, err = d.Linear(&p)
			require.NoError(t, err)
			assert.Len(t, launches(f), 1)
		})
	}
	f, e := open(t)
	f.Fail("cuDevicePrimaryCtxRetain", 1, 0)
	_, err := e.Device(0)
	require.ErrorContains(t, err, "CUDA device 0: cuDevicePrimaryCtxRetain")
	f.Reset()
	device(t, e, 0)
}

func TestAnOldGPUIsRefused(t *testing.T) {
	t.Setenv("FAKECUDA_CC", "75")
	_, e := open(t)
	_, err := e.Device(0)
	require.ErrorContains(t, err, "compute capability 7.5")
	facts := e.Describe()
	assert.Contains(t, facts.Devices[0].Error, "too old")
}

func TestEveryGenerationGetsItsKernels(t *testing.T) {
	for _, cc := range []string{"80", "89", "90", "100", "120"} {
		t.Run(cc, func(t *testing.T) {
			t.Setenv("FAKECUDA_CC", cc)
			f, e := open(t)
			p := job()
			_, err := device(t, e, 0).Linear(&p)
			require.NoError(t, err)
			assert.Equal(t, 1, count(f, "load 0 cubin"))
		})
	}
}

func TestTheRealKernelsCompileAndLoad(t *testing.T) {
	drivertest.Compiler(t)
	t.Setenv(jit.EnvCacheDir, cacheDir(t))
	engine.SetCompilerDirs(drivertest.CompilerDirs())
	f := drivertest.New(t)
	e, err := engine.New(f.Open())
	require.NoError(t, err)
	p := job()
	_, err = device(t, e, 0).Linear(&p)
	require.NoError(t, err)
	require.NoError(t, device(t, e, 0).Decompress(0, 0x1000, 64, 64, 0, 64, 0x5000, 64))
	require.NoError(t, device(t, e, 0).Gather(&engine.Lookup{Blob: 0x1000, DType: format.BF16, M: 64, K: 64, N: 1, IDs: 0x4000, IDBytes: 8, Out: 0x5000}))
	assert.Len(t, launches(f), 3)
}

func TestManyThreads(t *testing.T) {
	f, e := open(t)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			d, err := e.Device(i % 2)
			if !assert.NoError(t, err) {
				return
			}
			for range 20 {
				p := job()
				p.Stream = driver.Stream(0x100 + 0x10*(i/2))
				_, err := d.Linear(&p)
				assert.NoError(t, err)
				assert.NoError(t, d.Decompress(p.Stream, 0x1000, 1024, 512, 0, 1024, 0x5000, 512))
				assert.NoError(t, d.Follow(d.SideStream(i), p.Stream))
			}
		})
	}
	wg.Wait()
	assert.Equal(t, 4, count(f, "load"), "two kernels on two devices, each once")
}

func TestDescribe(t *testing.T) {
	f, e := open(t)
	facts := e.Describe()
	assert.Equal(t, f.Path, facts.Driver.Path)
	assert.Equal(t, "13.0", facts.Driver.CUDA)
	require.Len(t, facts.Devices, 2)
	assert.Equal(t, engine.DeviceDescription{Index: 0, Name: "Fake GPU 0", Capability: "9.0", Memory: 1 << 30, SMs: 132, Target: "sm_90a"}, facts.Devices[0])
	assert.NotEmpty(t, facts.Compiler.Path)
	assert.NotEmpty(t, facts.Cache.Dir)
	assert.Zero(t, count(f, "retain"), "looking changes nothing")
}

func TestDescribeWithoutADriver(t *testing.T) {
	t.Setenv(driver.EnvLibrary, "/nowhere/libcuda.so.1")
	facts := engine.Describe()
	assert.Contains(t, facts.Driver.Error, "no NVIDIA driver")
	assert.Empty(t, facts.Devices)
	assert.NotEqual(t, facts.Compiler.Path == "", facts.Compiler.Error == "")
}

func BenchmarkLinear(b *testing.B) {
	f, e := open(b)
	d := device(b, e, 0)
	p := job()
	_, err := d.Linear(&p)
	require.NoError(b, err)
	f.Reset()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := d.Linear(&p); err != nil {
			b.Fatal(err)
		}
	}
}
