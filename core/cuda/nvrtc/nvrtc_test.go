// SPDX-License-Identifier: Apache-2.0

package nvrtc_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/zipserv/zipserv/core/cuda/drivertest"
	"github.com/zipserv/zipserv/core/cuda/nvrtc"
)

const source = `#include "twice.cuh"
extern "C" __global__ void k(float *x) { x[threadIdx.x] = twice(x[threadIdx.x]) + ADD; }`

var headers = map[string]string{"twice.cuh": "__device__ inline float twice(float v) { return 2 * v; }", "unused.cuh": "#error not to be included"}

func TestCompileToCubinAndPTX(t *testing.T) {
	lib := drivertest.Compiler(t)
	major, _ := lib.Version()
	assert.GreaterOrEqual(t, major, 12)
	assert.Contains(t, lib.Archs(), 80)
	r, err := lib.Compile("k.cu", source, headers, []string{"-arch=sm_80", "-DADD=3"}, false)
	require.NoError(t, err)
	assert.Equal(t, "\x7fELF", string(r.Image[:4]))
	r, err = lib.Compile("k.cu", source, headers, []string{"-arch=compute_80", "-DADD=3"}, true)
	require.NoError(t, err)
	assert.Contains(t, string(r.Image), ".entry k(")
	assert.Zero(t, r.Image[len(r.Image)-1], "the driver needs the ending zero")
}

func TestErrorsCarryTheCompilersWords(t *testing.T) {
	lib := drivertest.Compiler(t)
	_, err := lib.Compile("k.cu", source, nil, []string{"-arch=sm_80"}, false)
	var failed *nvrtc.CompileError
	require.ErrorAs(t, err, &failed)
	assert.Contains(t, failed.Log, "twice.cuh")
	_, err = lib.Compile("k.cu", source, headers, []string{"-arch=sm_80"}, false)
	assert.ErrorContains(t, err, `identifier "ADD" is undefined`)
	assert.ErrorContains(t, err, "k.cu(2)")
	_, err = lib.Compile("k.cu", source, headers, []string{"-arch=sm_80", "-DADD=1", "--no-such-option"}, false)
	assert.ErrorContains(t, err, "NVRTC_ERROR_INVALID_OPTION")
	_, err = lib.Compile("k.cu", source, headers, []string{"-arch=compute_80", "-DADD=1"}, false)
	assert.ErrorContains(t, err, "real architecture")
}

func TestFindTakesTheFirstThatWorks(t *testing.T) {
	real := drivertest.Compiler(t)
	// A directory of links to a working library, as a pip package lays them out.
	dir := t.TempDir()
	for _, pattern := range []string{"libnvrtc.so.*", "libnvrtc-builtins.so.*"} {
		found, err := filepath.Glob(filepath.Join(filepath.Dir(real.Path()), pattern))
		require.NoError(t, err)
		for _, p := range found {
			require.NoError(t, os.Symlink(p, filepath.Join(dir, filepath.Base(p))))
		}
	}
	broken := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(broken, "libnvrtc.so.13"), []byte("not a library"), 0o600))
	t.Setenv(nvrtc.EnvLibrary, "")

	lib, err := nvrtc.Find([]string{"/nowhere", broken, dir}, 0)
	require.NoError(t, err)
	assert.True(t, strings.HasPrefix(lib.Path(), dir), "%s", lib.Path())

	t.Setenv(nvrtc.EnvLibrary, dir) // a directory
	lib, err = nvrtc.Find(nil, 0)
	require.NoError(t, err)
	assert.True(t, strings.HasPrefix(lib.Path(), dir))

	t.Setenv(nvrtc.EnvLibrary, real.Path()) // a file
	lib, err = nvrtc.Find([]string{dir}, 0)
	require.NoError(t, err)
	assert.Equal(t, real.Path(), lib.Path())

	t.Setenv(nvrtc.EnvLibrary, filepath.Join(broken, "libnvrtc.so.13")) // it alone counts
	_, err = nvrtc.Find([]string{dir}, 0)
	require.ErrorContains(t, err, nvrtc.EnvLibrary)
	assert.ErrorContains(t, err, broken)

	home := t.TempDir()
	require.NoError(t, os.MkdirAll(filepath.Join(home, "targets", "x86_64-linux"), 0o700))
	require.NoError(t, os.Symlink(dir, filepath.Join(home, "targets", "x86_64-linux", "lib")))
	t.Setenv(nvrtc.EnvLibrary, "")
	t.Setenv("CUDA_HOME", home)
	lib, err = nvrtc.Find([]string{broken}, 0)
	require.NoError(t, err)
	assert.True(t, strings.HasPrefix(lib.Path(), home))
}

func TestACompilerNewerThanTheDriverIsNotTaken(t *testing.T) {
	real := drivertest.Compiler(t)
	major, _ := real.Version()
	t.Setenv(nvrtc.EnvLibrary, real.Path())
	_, err := nvrtc.Find(nil, major)
	require.NoError(t, err)
	_, err = nvrtc.Find(nil, major-1)
	require.Error(t, err)
	assert.ErrorContains(t, err, "newer than the driver's CUDA")
}

func TestNoCompilerNamesTheCure(t *testing.T) {
	t.Setenv(nvrtc.EnvLibrary, filepath.Join(t.TempDir(), "libnvrtc.so"))
	_, err := nvrtc.Find(nil, 0)
	require.Error(t, err)
	for _, word := range []string{"nvidia-cuda-nvrtc", "CUDA_HOME", nvrtc.EnvLibrary} {
		assert.ErrorContains(t, err, word)
	}
}
