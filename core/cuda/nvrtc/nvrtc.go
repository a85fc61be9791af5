// SPDX-License-Identifier: Apache-2.0

// Package nvrtc compiles CUDA C++ at run time with the NVRTC library that torch, a pip package or a CUDA installation brings.
package nvrtc

// #cgo LDFLAGS: -ldl
// #include <stdlib.h>
// #include "shim.h"
import "C"

import (
	"fmt"
	"path/filepath"
	"runtime"
	"sort"
	"strings"
	"unsafe"
)

// Library is an opened NVRTC. It is safe for use by many goroutines.
type Library struct {
	n            *C.zs_nvrtc
	path         string
	major, minor int
	archs        []int
}

// OpenPath opens one NVRTC library. Its builtins are taken from the same directory.
func OpenPath(path string) (*Library, error) {
	cpath := C.CString(path)
	defer C.free(unsafe.Pointer(cpath))
	var builtins *C.char
	if b := builtinsBeside(path); b != "" {
		builtins = C.CString(b)
		defer C.free(unsafe.Pointer(builtins))
	}
	n := (*C.zs_nvrtc)(C.malloc(C.sizeof_zs_nvrtc))
	var text [512]C.char
	if C.zs_nvrtc_open(n, cpath, builtins, &text[0], C.size_t(len(text))) != 0 {
		C.free(unsafe.Pointer(n))
		return nil, fmt.Errorf("%s", C.GoString(&text[0]))
	}
	l := &Library{n: n, path: path}
	var major, minor C.int
	if err := l.check("nvrtcVersion", C.zs_nvrtc_version(n, &major, &minor)); err != nil {
		return nil, err
	}
	l.major, l.minor = int(major), int(minor)
	var count C.int
	if err := l.check("nvrtcGetNumSupportedArchs", C.zs_nvrtc_archs(n, &count, nil)); err != nil {
		return nil, err
	}
	if count > 0 {
		archs := make([]C.int, count)
		if err := l.check("nvrtcGetSupportedArchs", C.zs_nvrtc_archs(n, &count, &archs[0])); err != nil {
			return nil, err
		}
		for _, a := range archs {
			l.archs = append(l.archs, int(a))
		}
		sort.Ints(l.archs)
	}
	return l, nil
}

// builtinsBeside finds the builtins library in the directory of an NVRTC library, or "" where the loader has to find it.
func builtinsBeside(path string) string {
	if !filepath.IsAbs(path) {
		return ""
	}
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	found, _ := filepath.Glob(filepath.Join(filepath.Dir(path), "libnvrtc-builtins*.so*"))
	if len(found) == 0 {
		return ""
	}
	// torch's wheels carry one file with a hash in its name, toolkits the versioned file and links to it.
	sort.Slice(found, func(i, j int) bool { return len(found[i]) > len(found[j]) })
	return found[0]
}

// Path is the library file.
func (l *Library) Path() string { return l.path }

// Version is the NVRTC version.
func (l *Library) Version() (major, minor int) { return l.major, l.minor }

// VersionString is Version in words.
func (l *Library) VersionString() string { return fmt.Sprintf("%d.%d", l.major, l.minor) }

// Archs lists the compute capabilities (10*major+minor) that the library compiles for, rising.
func (l *Library) Archs() []int { return l.archs }

func (l *Library) check(call string, code C.int) error {
	if code == 0 {
		return nil
	}
	return fmt.Errorf("%s: %s (%d)", call, C.GoString(C.zs_nvrtc_error(l.n, code)), int(code))
}

// CompileError carries the compiler's messages.
type CompileError struct {
	Name string // of the source file
	Log  string
	err  error
}

func (e *CompileError) Error() string {
	return fmt.Sprintf("compiling %s: %v\n%s", e.Name, e.err, e.Log)
}

func (e *CompileError) Unwrap() error { return e.err }

// Result is a compiled program.
type Result struct {
	Image []byte // a cubin, or PTX that ends in a zero byte
	Log   string
}

// Compile compiles one source file. headers holds the files it may include, by name. With ptx the result is PTX, else a cubin: then the
// options must name a real architecture (-arch=sm_..).
func (l *Library) Compile(name, source string, headers map[string]string, options []string, ptx bool) (Result, error) {
	var pin cStrings
	defer pin.free()
	names := make([]string, 0, len(headers))
	for h := range headers {
		names = append(names, h)
	}
	sort.Strings(names)
	texts := make([]string, len(names))
	for i, h := range names {
		texts[i] = headers[h]
	}
	var p C.nvrtcProgram
	rc := C.zs_nvrtc_create(l.n, &p, pin.one(source), pin.one(name), C.int(len(names)), pin.list(texts), pin.list(names))
	if err := l.check("nvrtcCreateProgram", rc); err != nil {
		return Result{}, err
	}
	defer C.zs_nvrtc_destroy(l.n, p)
	compiled := l.check("nvrtcCompileProgram", C.zs_nvrtc_compile(l.n, p, C.int(len(options)), pin.list(options)))
	var size C.size_t
	var out Result
	if C.zs_nvrtc_log_size(l.n, p, &size) == 0 && size > 1 {
		log := make([]byte, size)
		if C.zs_nvrtc_log(l.n, p, (*C.char)(unsafe.Pointer(&log[0]))) == 0 {
			out.Log = strings.TrimRight(string(log), "\x00\n")
		}
	}
	if compiled != nil {
		return out, &CompileError{Name: name, Log: out.Log, err: compiled}
	}
	kind, call := C.int(0), "nvrtcGetCUBIN"
	if ptx {
		kind, call = 1, "nvrtcGetPTX"
	}
	if err := l.check(call+"Size", C.zs_nvrtc_image_size(l.n, p, kind, &size)); err != nil {
		return out, err
	}
	if size == 0 {
		return out, fmt.Errorf("%s: nothing was generated for %s; the options must name a real architecture", call, name)
	}
	out.Image = make([]byte, size)
	err := l.check(call, C.zs_nvrtc_image(l.n, p, kind, (*C.char)(unsafe.Pointer(&out.Image[0]))))
	runtime.KeepAlive(l)
	return out, err
}

// cStrings holds C copies of strings and of arrays of them until free.
type cStrings struct{ all []unsafe.Pointer }

func (c *cStrings) one(s string) *C.char {
	p := C.CString(s)
	c.all = append(c.all, unsafe.Pointer(p))
	return p
}

func (c *cStrings) list(values []string) **C.char {
	if len(values) == 0 {
		return nil
	}
	mem := C.malloc(C.size_t(len(values)) * C.size_t(unsafe.Sizeof((*C.char)(nil))))
	c.all = append(c.all, mem)
	out := unsafe.Slice((**C.char)(mem), len(values))
	for i, v := range values {
		out[i] = c.one(v)
	}
	return (**C.char)(mem)
}

func (c *cStrings) free() {
	for _, p := range c.all {
		C.free(p)
	}
}
