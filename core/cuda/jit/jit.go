// SPDX-License-Identifier: Apache-2.0

// Package jit turns the embedded kernel sources into code for the GPU that is there: compiled by NVRTC at first use, kept in memory for
// the process and on disk for the next one.
package jit

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"sort"
	"strings"
	"sync"

	"github.com/zipserv/zipserv/core/cuda/nvrtc"
)

// Options are passed with every compilation. They are part of the key.
var baseOptions = []string{"-std=c++17", "-default-device"}

// Spec names one variant of one kernel source.
type Spec struct {
	Source  string   // file name, for example decompress.cu
	Defines []string // NAME=VALUE, in any order
}

// String names the variant as messages do.
func (s Spec) String() string { return s.Source + "[" + strings.Join(sorted(s.Defines), " ") + "]" }

func sorted(s []string) []string {
	s = slices.Clone(s)
	sort.Strings(s)
	return s
}

// Image is compiled code and where it came from.
type Image struct {
	Data   []byte
	Arch   Arch
	Cached bool // read from disk
}

// Compiler compiles and caches. It is safe for use by many goroutines.
type Compiler struct {
	headers map[string]string
	sources map[string]string
	digest  [32]byte // of all sources: a header may be included by any of them
	cache   *Cache

	mu      sync.Mutex
	lib     *nvrtc.Library
	find    func() (*nvrtc.Library, error)
	flights map[[32]byte]*flight
}

type flight struct {
	done  chan struct{}
	image Image
	err   error
}

// NewCompiler reads the sources (*.cu and *.cuh) of a file system. find is called when a compiler is needed for the first time, and
// again as long as it fails.
func NewCompiler(sources fs.FS, cache *Cache, find func() (*nvrtc.Library, error)) (*Compiler, error) {
	c := &Compiler{headers: map[string]string{}, sources: map[string]string{}, cache: cache, find: find, flights: map[[32]byte]*flight{}}
	hash := sha256.New()
	err := fs.WalkDir(sources, ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := fs.ReadFile(sources, p)
		if err != nil {
			return err
		}
		switch path.Ext(p) {
		case ".cu":
			c.sources[p] = string(data)
		case ".cuh", ".h":
			c.headers[p] = string(data)
		default:
			return nil
		}
		fmt.Fprintf(hash, "%s %d\n", p, len(data)) // WalkDir's order is lexical
		hash.Write(data)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("reading the kernel sources: %w", err)
	}
	hash.Sum(c.digest[:0])
	return c, nil
}

// Digest names the content of all sources.
func (c *Compiler) Digest() string { return hex.EncodeToString(c.digest[:12]) }

// Cache is the disk cache.
func (c *Compiler) Cache() *Cache { return c.cache }

// Library finds the compiler, once.
func (c *Compiler) Library() (*nvrtc.Library, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.lib != nil {
		return c.lib, nil
	}
	lib, err := c.find()
	if err != nil {
		return nil, err
	}
	c.lib = lib
	return lib, nil
}

// Compile returns the code of a variant for a device of the given compute capability. Callers that ask for the same variant at the same
// time wait for one compilation.
func (c *Compiler) Compile(ctx context.Context, spec Spec, major, minor int) (Image, error) {
	lib, err := c.Library()
	if err != nil {
		return Image{}, err
	}
	arch, err := Target(major, minor, lib.Archs())
	if err != nil {
		return Image{}, err
	}
	key := c.key(spec, arch, lib)
	c.mu.Lock()
	f, running := c.flights[key]
	if !running {
		f = &flight{done: make(chan struct{})}
		c.flights[key] = f
	}
	c.mu.Unlock()
	if running {
		select {
		case <-f.done:
			return f.image, f.err
		case <-ctx.Done():
			return Image{}, ctx.Err()
		}
	}
	defer func() {
		// Nothing is kept here: the module that is made of the image is. An error is not remembered either.
		c.mu.Lock()
		delete(c.flights, key)
		c.mu.Unlock()
		close(f.done)
	}()
	f.image, f.err = c.build(ctx, lib, spec, arch, key)
	return f.image, f.err
}

func (c *Compiler) key(spec Spec, arch Arch, lib *nvrtc.Library) (key [32]byte) {
	major, minor := lib.Version()
	h := sha256.New()
	fmt.Fprintf(h, "zipserv kernel\n%x\n%s\n%q\n%s %v\nnvrtc %d.%d\n%q\n", c.digest, spec.Source, sorted(spec.Defines), arch.Name, arch.PTX, major, minor,
		baseOptions)
	h.Sum(key[:0])
	return key
}

func (c *Compiler) build(ctx context.Context, lib *nvrtc.Library, spec Spec, arch Arch, key [32]byte) (Image, error) {
	source, known := c.sources[spec.Source]
	if !known {
		return Image{}, fmt.Errorf("there is no kernel source %s", spec.Source)
	}
	name := strings.TrimSuffix(path.Base(spec.Source), ".cu") + "-" + arch.Name
	if data := c.cache.Get(name, key); data != nil {
		return Image{Data: data, Arch: arch, Cached: true}, nil
	}
	unlock := c.cache.lock(ctx, key)
	defer unlock()
	if err := ctx.Err(); err != nil {
		return Image{}, err
	}
	// Another process may have compiled it while this one waited.
	if data := c.cache.Get(name, key); data != nil {
		return Image{Data: data, Arch: arch, Cached: true}, nil
	}
	options := append(slices.Clone(baseOptions), "-arch="+arch.Name)
	for _, d := range sorted(spec.Defines) {
		options = append(options, "-D"+d)
	}
	result, err := lib.Compile(spec.Source, source, c.headers, options, arch.PTX)
	if err != nil {
		return Image{}, fmt.Errorf("%s for %s with NVRTC %s: %w", spec, arch.Name, lib.VersionString(), err)
	}
	c.cache.Put(name, key, result.Image)
	return Image{Data: result.Image, Arch: arch}, nil
}
