// SPDX-License-Identifier: Apache-2.0

// Package driver is the CUDA driver API as the engine needs it: libcuda is opened at run time, calls are grouped so that each runs
// with its context current on one OS thread, and every failure says which call failed, with which code, and what the driver says of it.
package driver

// #cgo LDFLAGS: -ldl
// #cgo noescape zs_launch
// #cgo nocallback zs_launch
// #cgo noescape zs_stream_capture
// #cgo nocallback zs_stream_capture
// #include <stdlib.h>
// #include "shim.h"
import "C"

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"unsafe"
)

// EnvLibrary names the variable that overrides where libcuda is looked for.
const EnvLibrary = "ZIPSERV_LIBCUDA"

// MinVersion is the oldest CUDA version (as cuDriverGetVersion counts) of a driver that the engine works with: 12.0, driver 525.
const MinVersion = 12000

// ErrNoDriver is wrapped by Open's error where no NVIDIA driver is installed.
var ErrNoDriver = errors.New("no NVIDIA driver")

// Driver is an opened libcuda. It is safe for use by many goroutines.
type Driver struct {
	cu      *C.zs_cu // in C memory: it is passed on every call and holds C pointers
	path    string
	version int
	devices int
}

// Error is a failed driver call.
type Error struct {
	Call string // for example cuLaunchKernelEx
	Code int
	Name string // for example CUDA_ERROR_INVALID_VALUE
	Text string // the driver's own description
}

// OutOfMemory is the driver's code for device memory that is used up.
const OutOfMemory = 2

func (e *Error) Error() string {
	return fmt.Sprintf("%s: %s (%d): %s", e.Call, e.Name, e.Code, e.Text)
}

var (
	openMu sync.Mutex
	opened *Driver
)

// Open opens the system's libcuda, once for the process. A failure is not remembered, so that a driver which is installed or made
// visible later is found.
func Open() (*Driver, error) {
	openMu.Lock()
	defer openMu.Unlock()
	if opened != nil {
		return opened, nil
	}
	var first error
	for _, path := range candidates() {
		d, err := OpenPath(path)
		if err == nil {
			opened = d
			return d, nil
		}
		if !errors.Is(err, ErrNoDriver) {
			return nil, err
		}
		if first == nil {
			first = err
		}
	}
	return nil, fmt.Errorf("%w: %s (install one of CUDA 12.0, driver 525, or newer, or set %s to the path of libcuda.so.1)", ErrNoDriver, first, EnvLibrary)
}

func candidates() []string {
	if p := os.Getenv(EnvLibrary); p != "" {
		return []string{p}
	}
	return []string{"libcuda.so.1", "libcuda.so", "/usr/lib/wsl/lib/libcuda.so.1"}
}

type notLoaded struct{ text string }

func (e notLoaded) Error() string        { return e.text }
func (e notLoaded) Is(target error) bool { return target == ErrNoDriver }

// OpenPath opens one library and initialises the driver.
func OpenPath(path string) (*Driver, error) {
	cpath := C.CString(path)
	defer C.free(unsafe.Pointer(cpath))
	cu := (*C.zs_cu)(C.malloc(C.sizeof_zs_cu))
	var text [256]C.char
	var missing C.int
	if C.zs_cu_open(cu, cpath, &text[0], C.size_t(len(text)), &missing) != 0 {
		C.free(unsafe.Pointer(cu))
		if missing != 0 {
			return nil, fmt.Errorf("the NVIDIA driver is too old: %s; CUDA 12.0 (driver 525) or newer is needed", C.GoString(&text[0]))
		}
		return nil, notLoaded{C.GoString(&text[0])}
	}
	d := &Driver{cu: cu, path: path}
	var version, devices C.int
	r := C.zs_init(cu, &version, &devices)
	d.version, d.devices = int(version), int(devices)
	if d.version != 0 && d.version < MinVersion {
		return nil, fmt.Errorf("the NVIDIA driver is too old: it offers CUDA %s; 12.0 (driver 525) or newer is needed", d.VersionString())
	}
	if err := d.check(r); err != nil {
		return nil, fmt.Errorf("the NVIDIA driver (%s) is there but does not start: %w", path, err)
	}
	return d, nil
}

// Path is the library as it was named to the loader.
func (d *Driver) Path() string { return d.path }

// Version is the newest CUDA version that the driver supports, 1000*major + 10*minor.
func (d *Driver) Version() int { return d.version }

// VersionString is Version in words, for example 13.0.
func (d *Driver) VersionString() string {
	return fmt.Sprintf("%d.%d", d.version/1000, d.version%1000/10)
}

// DeviceCount is the number of visible devices.
func (d *Driver) DeviceCount() int { return d.devices }

func (d *Driver) check(r C.zs_result) error {
	if r.code == 0 {
		return nil
	}
	return &Error{
		Call: C.GoString(C.zs_cu_symbol(r.call)),
		Code: int(r.code),
		Name: C.GoString(C.zs_cu_error_name(d.cu, r.code)),
		Text: C.GoString(C.zs_cu_error_text(d.cu, r.code)),
	}
}
