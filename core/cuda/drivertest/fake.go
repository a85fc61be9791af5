// SPDX-License-Identifier: Apache-2.0

// Package drivertest gives tests a libcuda of their own: a small C library, compiled on the spot, that keeps device memory on the host,
// checks what a driver checks and logs the calls.
package drivertest

// #cgo LDFLAGS: -ldl
// #include <dlfcn.h>
// #include <stdint.h>
// #include <stdlib.h>
// static const char *fake_log(void *f) { return ((const char *(*)(void))f)(); }
// static void fake_void(void *f) { ((void (*)(void))f)(); }
// static void fake_fail(void *f, const char *call, int code, int after) { ((void (*)(const char *, int, int))f)(call, code, after); }
// static long fake_live(void *f, int what) { return ((long (*)(int))f)(what); }
// static void fake_capture(void *f, uint64_t stream, uint64_t id) { ((void (*)(uint64_t, uint64_t))f)(stream, id); }
import "C"

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/require"

	"github.com/zipserv/zipserv/core/cuda/driver"
)

// Fake is one loaded copy of the library. Copies share nothing.
type Fake struct {
	Path   string
	handle unsafe.Pointer
	t      testing.TB
}

// What Live counts.
const (
	Allocations = iota
	Streams
	Events
	Modules
)

var build = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "zipserv-fakecuda-")
	if err != nil {
		return "", err
	}
	_, here, _, _ := runtime.Caller(0)
	source := filepath.Join(filepath.Dir(here), "..", "driver", "testdata", "fakecuda.c")
	out := filepath.Join(dir, "libfakecuda.so")
	args := append(compiler(), "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-fvisibility=hidden", "-o", out, source, "-lpthread")
	cmd := exec.Command(args[0], args[1:]...)
	if text, err := cmd.CombinedOutput(); err != nil {
		return "", &buildError{err, string(text)}
	}
	return out, nil
})

type buildError struct {
	err  error
	text string
}

func (e *buildError) Error() string { return e.err.Error() + ": " + e.text }

func compiler() []string {
	if cc := os.Getenv("CC"); cc != "" {
		return strings.Fields(cc)
	}
	for _, cc := range []string{"cc", "gcc", "clang"} {
		if path, err := exec.LookPath(cc); err == nil {
			return []string{path}
		}
	}
	return []string{"python3", "-m", "ziglang", "cc"}
}

// New loads a copy of the library. It is the test's alone.
func New(t testing.TB) *Fake {
	t.Helper()
	built, err := build()
	require.NoError(t, err)
	data, err := os.ReadFile(built)
	require.NoError(t, err)
	f := &Fake{Path: filepath.Join(t.TempDir(), "libfakecuda.so"), t: t}
	require.NoError(t, os.WriteFile(f.Path, data, 0o700))
	path := C.CString(f.Path)
	defer C.free(unsafe.Pointer(path))
	f.handle = C.dlopen(path, C.RTLD_NOW)
	require.NotNil(t, f.handle)
	return f
}

// Open opens the copy as a driver.
func (f *Fake) Open() *driver.Driver {
	f.t.Helper()
	d, err := driver.OpenPath(f.Path)
	require.NoError(f.t, err)
	return d
}

func (f *Fake) symbol(name string) unsafe.Pointer {
	c := C.CString(name)
	defer C.free(unsafe.Pointer(c))
	p := C.dlsym(f.handle, c)
	require.NotNil(f.t, p, name)
	return p
}

// Log lists the calls that matter, one a line.
func (f *Fake) Log() []string {
	text := strings.TrimSpace(C.GoString(C.fake_log(f.symbol("fake_log"))))
	if text == "" {
		return nil
	}
	return strings.Split(text, "\n")
}

// Reset empties the log and forgets planned failures.
func (f *Fake) Reset() { C.fake_void(f.symbol("fake_reset")) }

// Fail makes a call fail with a code after so many good ones.
func (f *Fake) Fail(call string, code, after int) {
	c := C.CString(call)
	defer C.free(unsafe.Pointer(c))
	C.fake_fail(f.symbol("fake_fail"), c, C.int(code), C.int(after))
}

// Live counts what was made and not given back.
func (f *Fake) Live(what int) int { return int(C.fake_live(f.symbol("fake_live"), C.int(what))) }

// Capture pretends that a stream is being captured; stream 0 ends it.
func (f *Fake) Capture(stream driver.Stream, id uint64) {
	C.fake_capture(f.symbol("fake_capture"), C.uint64_t(stream), C.uint64_t(id))
}

// DestroyGraphs pretends that all graphs and their instances are gone.
func (f *Fake) DestroyGraphs() { C.fake_void(f.symbol("fake_destroy_graphs")) }
