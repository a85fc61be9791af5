// SPDX-License-Identifier: Apache-2.0

// Package engine runs the jobs of the package on GPUs: it brings driver, compiler, plans, streams and workspaces together. Work is
// queued on the stream that the caller names; nothing waits for the device unless it says so.
package engine

import (
	"fmt"
	"io/fs"
	"sync"
	"sync/atomic"

	"github.com/zipserv/zipserv/core/cuda/driver"
	"github.com/zipserv/zipserv/core/cuda/jit"
	"github.com/zipserv/zipserv/core/cuda/nvrtc"
	"github.com/zipserv/zipserv/kernels"
)

// MaxDevices is the most devices that an engine serves.
const MaxDevices = 64

// Engine serves all devices of the process.
type Engine struct {
	driver   *driver.Driver
	compiler *jit.Compiler
	cacheErr error // why the disk cache is off

	mu      sync.Mutex
	devices [MaxDevices]atomic.Pointer[Device]
}

// ArgumentError is an error of the caller's, not of the GPU's.
type ArgumentError string

func (e ArgumentError) Error() string { return string(e) }

func badArgument(format string, args ...any) error {
	return ArgumentError(fmt.Sprintf(format, args...))
}

// New opens an engine over a driver, with the kernels of the package.
func New(d *driver.Driver) (*Engine, error) { return NewFrom(d, kernels.Sources) }

// NewFrom is New with other sources of the same kernels.
func NewFrom(d *driver.Driver, sources fs.FS) (*Engine, error) {
	e := &Engine{driver: d}
	cache, err := jit.OpenCache()
	e.cacheErr = err
	e.compiler, err = jit.NewCompiler(sources, cache, e.findCompiler)
	if err != nil {
		return nil, err
	}
	return e, nil
}

func (e *Engine) findCompiler() (*nvrtc.Library, error) {
	return nvrtc.Find(compilerDirs(), e.driver.Version()/1000)
}

// Device opens a device at its first use.
func (e *Engine) Device(ordinal int) (*Device, error) {
	if ordinal < 0 || ordinal >= min(MaxDevices, e.driver.DeviceCount()) {
		return nil, badArgument("there is no CUDA device %d: the driver shows %d", ordinal, e.driver.DeviceCount())
	}
	if d := e.devices[ordinal].Load(); d != nil {
		return d, nil
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if d := e.devices[ordinal].Load(); d != nil {
		return d, nil
	}
	d, err := openDevice(e, ordinal)
	if err != nil {
		return nil, fmt.Errorf("CUDA device %d: %w", ordinal, err)
	}
	e.devices[ordinal].Store(d)
	return d, nil
}

var (
	defaultMu     sync.Mutex
	defaultEngine atomic.Pointer[Engine]
)

// Default is the engine of the process, over the system's driver. It opens at the first call that succeeds.
func Default() (*Engine, error) {
	if e := defaultEngine.Load(); e != nil {
		return e, nil
	}
	defaultMu.Lock()
	defer defaultMu.Unlock()
	if e := defaultEngine.Load(); e != nil {
		return e, nil
	}
	d, err := driver.Open()
	if err != nil {
		return nil, err
	}
	e, err := New(d)
	if err != nil {
		return nil, err
	}
	defaultEngine.Store(e)
	return e, nil
}
