// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"fmt"

	"github.com/zipserv/zipserv/core/cuda/driver"
	"github.com/zipserv/zipserv/core/cuda/jit"
	"github.com/zipserv/zipserv/core/cuda/nvrtc"
	"github.com/zipserv/zipserv/core/cuda/tuned"
)

// Description is what a user wants to know when something does not work: `zipserv doctor` shows it.
type Description struct {
	Driver   DriverDescription   `json:"driver"`
	Devices  []DeviceDescription `json:"devices"`
	Compiler CompilerDescription `json:"nvrtc"`
	Cache    CacheDescription    `json:"cache"`
}

// DriverDescription says which driver there is, or why none.
type DriverDescription struct {
	Path  string `json:"path,omitempty"`
	CUDA  string `json:"cuda,omitempty"`
	Error string `json:"error,omitempty"`
}

// DeviceDescription is one GPU.
type DeviceDescription struct {
	Index      int    `json:"index"`
	Name       string `json:"name"`
	Capability string `json:"capability"`
	Memory     uint64 `json:"memory"`
	SMs        int    `json:"sms"`
	Target     string `json:"target,omitempty"` // what kernels are compiled for
	Error      string `json:"error,omitempty"`  // why it cannot be used

	Tuned *TunedDescription `json:"tuned,omitempty"` // where there is a file of tuned choices
}

// TunedDescription says what `zipserv tune` left for a GPU.
type TunedDescription struct {
	Choices int    `json:"choices"`
	Off     bool   `json:"off,omitempty"`   // ZIPSERV_TUNED keeps them out
	Error   string `json:"error,omitempty"` // why the file is not used
}

// CompilerDescription says which NVRTC is used, or why none.
type CompilerDescription struct {
	Path    string `json:"path,omitempty"`
	Version string `json:"version,omitempty"`
	Error   string `json:"error,omitempty"`
}

// CacheDescription says where compiled kernels are kept, or why nowhere.
type CacheDescription struct {
	Dir   string `json:"dir,omitempty"`
	Files int    `json:"files"`
	Bytes int64  `json:"bytes"`
	Limit int64  `json:"limit"`
	Error string `json:"error,omitempty"`
}

// Describe looks at everything and changes nothing.
func Describe() Description {
	out := Description{Devices: []DeviceDescription{}}
	e, err := Default()
	if err != nil {
		// The rest can be told without a driver.
		out.Driver.Error = err.Error()
		cache, cacheErr := jit.OpenCache()
		out.Cache = describeCache(cache, cacheErr)
		out.Compiler = describeCompiler(nvrtc.Find(compilerDirs(), 0))
		return out
	}
	return e.Describe()
}

// Describe is the same for one engine.
func (e *Engine) Describe() Description {
	out := Description{
		Driver:  DriverDescription{Path: e.driver.Path(), CUDA: e.driver.VersionString()},
		Devices: []DeviceDescription{},
		Cache:   describeCache(e.compiler.Cache(), e.cacheErr),
	}
	lib, err := e.compiler.Library()
	out.Compiler = describeCompiler(lib, err)
	for i := range e.driver.DeviceCount() {
		p, err := e.driver.Device(i)
		out.Devices = append(out.Devices, describeDevice(i, p, err, lib))
		if err == nil && lib != nil {
			out.Devices[i].Tuned = e.describeTuned(p, lib)
		}
	}
	return out
}

func describeDevice(i int, p driver.Device, err error, lib *nvrtc.Library) DeviceDescription {
	if err != nil {
		return DeviceDescription{Index: i, Error: err.Error()}
	}
	d := DeviceDescription{Index: i, Name: p.Name, Capability: fmt.Sprintf("%d.%d", p.Major, p.Minor), Memory: p.Memory, SMs: p.SMs}
	if lib == nil {
		return d
	}
	target, err := jit.Target(p.Major, p.Minor, lib.Archs())
	if err != nil {
		d.Error = err.Error()
	}
	d.Target = target.Name
	return d
}

func (e *Engine) describeTuned(props driver.Device, lib *nvrtc.Library) *TunedDescription {
	table, err := tuned.Read(e.compiler.Cache().Dir(), keyOf(e, props, lib))
	if err == nil && len(table.Entries) == 0 {
		return nil
	}
	d := &TunedDescription{Choices: len(table.Entries), Off: !tunedOn()}
	if err != nil {
		d.Error = err.Error()
	}
	return d
}

func describeCompiler(lib *nvrtc.Library, err error) CompilerDescription {
	if err != nil {
		return CompilerDescription{Error: err.Error()}
	}
	return CompilerDescription{Path: lib.Path(), Version: lib.VersionString()}
}

func describeCache(c *jit.Cache, err error) CacheDescription {
	d := CacheDescription{Dir: c.Dir(), Limit: c.Limit()}
	if err != nil {
		d.Error = err.Error()
	}
	d.Files, d.Bytes = c.Size()
	return d
}
