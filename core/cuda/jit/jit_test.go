// SPDX-License-Identifier: Apache-2.0

package jit_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"testing/fstest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/zipserv/zipserv/core/cuda/drivertest"
	"github.com/zipserv/zipserv/core/cuda/jit"
	"github.com/zipserv/zipserv/core/cuda/nvrtc"
)

func sources(body string) fstest.MapFS {
	return fstest.MapFS{
		"one.cu":     {Data: []byte("#include \"common.cuh\"\nextern \"C\" __global__ void one(float *x) { x[threadIdx.x] += COMMON + VARIANT; }")},
		"common.cuh": {Data: []byte("#define COMMON " + body + "\n")},
		"README.md":  {Data: []byte("not a source")},
	}
}

func compiler(t *testing.T, dir, body string) *jit.Compiler {
	t.Helper()
	cache, err := jit.NewCache(dir, 64<<20)
	require.NoError(t, err)
	lib := drivertest.Compiler(t)
	c, err := jit.NewCompiler(sources(body), cache, func() (*nvrtc.Library, error) { return lib, nil })
	require.NoError(t, err)
	return c
}

var spec = jit.Spec{Source: "one.cu", Defines: []string{"VARIANT=1", "B=2"}}

func cached(t *testing.T, dir string) []string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(dir, "*.kernel"))
	require.NoError(t, err)
	return found
}

func TestCompilesForEveryArchitecture(t *testing.T) {
	dir := t.TempDir()
	c := compiler(t, dir, "1")
	for _, cc := range [][2]int{{8, 0}, {8, 6}, {8, 9}, {9, 0}, {10, 0}, {12, 0}} {
		image, err := c.Compile(context.Background(), spec, cc[0], cc[1])
		require.NoError(t, err, "%v", cc)
		assert.False(t, image.Cached)
		assert.Equal(t, "\x7fELF", string(image.Data[:4]))
	}
	assert.Len(t, cached(t, dir), 6)
	// Unknown and newer: PTX of the newest that is known.
	image, err := c.Compile(context.Background(), spec, 19, 0)
	require.NoError(t, err)
	assert.True(t, image.Arch.PTX)
	assert.Contains(t, string(image.Data), ".entry one(")
	_, err = c.Compile(context.Background(), spec, 7, 5)
	assert.ErrorContains(t, err, "compute capability 7.5 is too old")
}

func TestTarget(t *testing.T) {
	known := []int{75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121}
	for _, c := range []struct {
		major, minor int
		known        []int
		want         string
		ptx          bool
	}{
		{8, 0, known, "sm_80", false},
		{8, 6, known, "sm_86", false},
		{8, 7, known, "sm_87", false},
		{8, 9, known, "sm_89", false},
		{9, 0, known, "sm_90a", false},
		{10, 0, known, "sm_100a", false},
		{10, 3, known, "sm_103a", false},
		{12, 0, known, "sm_120", false},
		{12, 1, known, "sm_121", false},
		{12, 9, known, "sm_121", false},       // a minor version that is not known: the nearest older one of the major
		{8, 8, known, "sm_87", false},         // the same
		{13, 0, known, "compute_121", true},   // a major version that is not known
		{9, 0, known[:5], "compute_89", true}, // an NVRTC that is older than the GPU
		{10, 3, known[:7], "sm_100", false},   // without "a": that code would not run on 10.3
	} {
		got, err := jit.Target(c.major, c.minor, c.known)
		require.NoError(t, err)
		assert.Equal(t, jit.Arch{Name: c.want, PTX: c.ptx}, got, "%d.%d", c.major, c.minor)
	}
	for _, cc := range [][2]int{{7, 5}, {7, 0}, {0, 0}} {
		_, err := jit.Target(cc[0], cc[1], known)
		assert.ErrorContains(t, err, "8.0 (Ampere) or newer")
	}
	_, err := jit.Target(8, 0, []int{90, 100})
	assert.ErrorContains(t, err, "none of which runs on compute capability 8.0")
}

func TestCacheHitAndWhatTheKeyDependsOn(t *testing.T) {
	dir := t.TempDir()
	ctx := context.Background()
	first, err := compiler(t, dir, "1").Compile(ctx, spec, 8, 0)
	require.NoError(t, err)
	assert.False(t, first.Cached)

	again, err := compiler(t, dir, "1").Compile(ctx, jit.Spec{Source: "one.cu", Defines: []string{"B=2", "VARIANT=1"}}, 8, 0)
	require.NoError(t, err)
	assert.True(t, again.Cached, "another process, defines in another order")
	assert.Equal(t, first.Data, again.Data)

	for name, run := range map[string]func() (jit.Image, error){
		"a header's text": func() (jit.Image, error) { return compiler(t, dir, "2").Compile(ctx, spec, 8, 0) },
		"a define": func() (jit.Image, error) {
			return compiler(t, dir, "1").Compile(ctx, jit.Spec{Source: "one.cu", Defines: []string{"VARIANT=3", "B=2"}}, 8, 0)
		},
		"the architecture": func() (jit.Image, error) { return compiler(t, dir, "1").Compile(ctx, spec, 8, 6) },
	} {
		image, err := run()
		require.NoError(t, err)
		assert.False(t, image.Cached, name)
	}
	assert.Len(t, cached(t, dir), 4)
}

func TestADamagedFileIsCompiledAgain(t *testing.T) {
	for name, damage := range map[string]func([]byte) []byte{
		"one bit of the image": func(b []byte) []byte { b[len(b)/2] ^= 4; return b },
		"one bit of the key":   func(b []byte) []byte { b[20] ^= 1; return b },
		"cut short":            func(b []byte) []byte { return b[:len(b)-7] },
		"cut in the header":    func(b []byte) []byte { return b[:30] },
		"longer":               func(b []byte) []byte { return append(b, 0) },
		"empty":                func([]byte) []byte { return nil },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			good, err := compiler(t, dir, "1").Compile(context.Background(), spec, 8, 0)
			require.NoError(t, err)
			file := cached(t, dir)[0]
			data, err := os.ReadFile(file)
			require.NoError(t, err)
			require.NoError(t, os.WriteFile(file, damage(data), 0o600))

			image, err := compiler(t, dir, "1").Compile(context.Background(), spec, 8, 0)
			require.NoError(t, err)
			assert.False(t, image.Cached)
			assert.Equal(t, good.Data, image.Data)
			image, err = compiler(t, dir, "1").Compile(context.Background(), spec, 8, 0)
			require.NoError(t, err)
			assert.True(t, image.Cached, "and it is repaired")
		})
	}
}

func TestAnUnusableDirectoryMeansNoCache(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	cache, err := jit.NewCache(filepath.Join(file, "cache"), 1<<20)
	require.Error(t, err)
	lib := drivertest.Compiler(t)
	c, err := jit.NewCompiler(sources("1"), cache, func() (*nvrtc.Library, error) { return lib, nil })
	require.NoError(t, err)
	image, err := c.Compile(context.Background(), spec, 8, 0)
	require.NoError(t, err)
	assert.NotEmpty(t, image.Data)

	// A directory that is there but may not be written. The superuser may write anywhere but into /proc.
	cache, _ = jit.NewCache("/proc/self", 1<<20)
	c, err = jit.NewCompiler(sources("1"), cache, func() (*nvrtc.Library, error) { return lib, nil })
	require.NoError(t, err)
	image, err = c.Compile(context.Background(), spec, 8, 0)
	require.NoError(t, err)
	assert.NotEmpty(t, image.Data)
}

func TestEnvironment(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	t.Setenv(jit.EnvCacheDir, dir)
	t.Setenv(jit.EnvCacheSize, "3")
	c, err := jit.OpenCache()
	require.NoError(t, err)
	assert.Equal(t, dir, c.Dir())
	assert.EqualValues(t, 3<<20, c.Limit())

	t.Setenv(jit.EnvCacheDir, "")
	t.Setenv("XDG_CACHE_HOME", dir)
	c, err = jit.OpenCache()
	require.NoError(t, err)
	assert.Equal(t, filepath.Join(dir, "zipserv"), c.Dir())

	t.Setenv(jit.EnvCacheDir, "off")
	c, err = jit.OpenCache()
	assert.ErrorContains(t, err, "switched off")
	assert.Empty(t, c.Dir())
}

func TestTheOldestKernelsGoWhenTheLimitIsReached(t *testing.T) {
	dir := t.TempDir()
	c, err := jit.NewCache(dir, 5000)
	require.NoError(t, err)
	var keys [][32]byte
	for i := range 5 {
		key := [32]byte{byte(i)}
		keys = append(keys, key)
		c.Put(fmt.Sprintf("k%d", i), key, make([]byte, 1500))
		for _, f := range cached(t, dir) {
			if filepath.Base(f)[:2] == fmt.Sprintf("k%d", i) {
				age := time.Now().Add(time.Duration(i-100) * time.Minute)
				require.NoError(t, os.Chtimes(f, age, age))
			}
		}
	}
	files, bytes := c.Size()
	assert.Equal(t, 3, files)
	assert.LessOrEqual(t, bytes, c.Limit())
	for i, key := range keys {
		assert.Equal(t, i >= 2, c.Get(fmt.Sprintf("k%d", i), key) != nil, "kernel %d", i)
	}
	c.Put("huge", [32]byte{99}, make([]byte, 6000)) // does not fit at all: nothing is dropped for it
	files, _ = c.Size()
	assert.Equal(t, 3, files)
	require.NoError(t, c.Clear())
	files, _ = c.Size()
	assert.Zero(t, files)
}

func TestUsedKernelsAreKeptLonger(t *testing.T) {
	dir := t.TempDir()
	c, err := jit.NewCache(dir, 4000)
	require.NoError(t, err)
	for i := range 2 {
		c.Put(fmt.Sprintf("k%d", i), [32]byte{byte(i)}, make([]byte, 1500))
	}
	long := time.Now().Add(-1000 * time.Hour)
	for i, f := range cached(t, dir) {
		age := long.Add(time.Duration(i) * time.Hour)
		require.NoError(t, os.Chtimes(f, age, age))
	}
	require.NotNil(t, c.Get("k0", [32]byte{0})) // the older one is used
	c.Put("k2", [32]byte{2}, make([]byte, 1500))
	assert.NotNil(t, c.Get("k0", [32]byte{0}))
	assert.Nil(t, c.Get("k1", [32]byte{1}))
}

func TestTemporaryFilesOfTheDeadAreSwept(t *testing.T) {
	dir := t.TempDir()
	c, err := jit.NewCache(dir, 1<<20)
	require.NoError(t, err)
	stale, fresh := filepath.Join(dir, "tmp-1"), filepath.Join(dir, "tmp-2")
	for _, f := range []string{stale, fresh} {
		require.NoError(t, os.WriteFile(f, []byte("half"), 0o600))
	}
	old := time.Now().Add(-2 * time.Hour)
	require.NoError(t, os.Chtimes(stale, old, old))
	c.Put("k", [32]byte{1}, []byte("image"))
	assert.NoFileExists(t, stale)
	assert.FileExists(t, fresh)
}

func TestOneCompilationForManyCallers(t *testing.T) {
	dir := t.TempDir()
	c := compiler(t, dir, "1")
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			image, err := c.Compile(context.Background(), spec, 8, 0)
			assert.NoError(t, err)
			assert.NotEmpty(t, image.Data)
		})
	}
	wg.Wait()
	files, err := os.ReadDir(dir)
	require.NoError(t, err)
	for _, f := range files {
		assert.NotContains(t, f.Name(), "tmp-")
	}
}

// The test binary itself is the other process.
func TestManyProcessesShareACache(t *testing.T) {
	if dir := os.Getenv("ZIPSERV_TEST_CHILD"); dir != "" {
		image, err := compiler(t, dir, "1").Compile(context.Background(), spec, 8, 0)
		require.NoError(t, err)
		fmt.Printf("cached=%v bytes=%d\n", image.Cached, len(image.Data))
		return
	}
	drivertest.Compiler(t)
	dir := t.TempDir()
	var compiled int
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			cmd := exec.Command(os.Args[0], "-test.run=^TestManyProcessesShareACache$", "-test.v")
			cmd.Env = append(os.Environ(), "ZIPSERV_TEST_CHILD="+dir)
			out, err := cmd.CombinedOutput()
			assert.NoError(t, err, "%s", out)
			mu.Lock()
			defer mu.Unlock()
			if assert.Regexp(t, `cached=(true|false) bytes=[1-9]`, string(out)) && !bytes.Contains(out, []byte("cached=true")) {
				compiled++
			}
		})
	}
	wg.Wait()
	assert.Equal(t, 1, compiled, "one process compiles, the others wait for it")
	assert.Len(t, cached(t, dir), 1)
}

func TestWaitingForALockCanBeStopped(t *testing.T) {
	dir := t.TempDir()
	c := compiler(t, dir, "1")
	for i := range 16 { // whichever shard the key falls into
		f, err := os.Create(filepath.Join(dir, fmt.Sprintf("lock-%02d", i)))
		require.NoError(t, err)
		defer func() { _ = f.Close() }()
		require.NoError(t, unix.Flock(int(f.Fd()), unix.LOCK_EX))
	}
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	_, err := c.Compile(ctx, spec, 8, 0)
	assert.ErrorIs(t, err, context.DeadlineExceeded)
}

func TestErrors(t *testing.T) {
	c := compiler(t, t.TempDir(), "1")
	_, err := c.Compile(context.Background(), jit.Spec{Source: "two.cu"}, 8, 0)
	assert.ErrorContains(t, err, "no kernel source two.cu")
	_, err = c.Compile(context.Background(), jit.Spec{Source: "one.cu"}, 8, 0)
	assert.ErrorContains(t, err, "one.cu[] for sm_80 with NVRTC")
	assert.ErrorContains(t, err, "VARIANT")

	tries := 0
	broken, err := jit.NewCompiler(sources("1"), &jit.Cache{}, func() (*nvrtc.Library, error) { tries++; return nil, errors.New("none yet") })
	require.NoError(t, err)
	for range 2 {
		_, err = broken.Compile(context.Background(), spec, 8, 0)
		assert.EqualError(t, err, "none yet")
	}
	assert.Equal(t, 2, tries, "a compiler that is installed later is found")
}
