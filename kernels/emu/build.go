// SPDX-License-Identifier: Apache-2.0

// Package emu runs CUDA kernels on the CPU: it compiles the very sources that NVRTC compiles for a GPU as host C++, one CUDA thread a
// fiber, and checks while it runs them what a GPU would let pass in silence: bounds, races, missing waits, fences and barriers.
package emu

import (
	"bytes"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"sort"
	"strings"
	"sync"
	"time"
)

//go:embed *.h host/*.h host/*.cc
var hostFiles embed.FS

// Source names what to compile.
type Source struct {
	Files   fs.FS    // the folder that a GPU build would see
	Main    string   // the .cu file
	Defines []string // NAME=VALUE
	Kernels []string // its __global__ functions that a Launch may name
	// Constants are macros and constants of the source that Program.Constant tells.
	Constants []string
}

// Program is a compiled Source. Its launches may run in parallel.
type Program struct {
	path      string
	constants map[string]int
}

// Constant is the value of one of Source.Constants.
func (p *Program) Constant(name string) int {
	v, ok := p.constants[name]
	if !ok {
		panic("emu: the program has no constant " + name)
	}
	return v
}

// Compiled code calls the emulator before every memory access because of -fsanitize=thread, whose hooks the emulator defines itself. The
// optimiser must not merge accesses, or the checks of alignment and bounds would see accesses that the source does not make.
var kernelFlags = []string{
	"-std=c++17", "-O1", "-g1", "-DZS_EMU", "-fsanitize=thread", "-fno-omit-frame-pointer", "-fno-exceptions", "-fno-rtti",
	"-fno-strict-aliasing", "-ffp-contract=off", "-fPIE", "-w",
}
var kernelFlagsGCC = []string{"-fno-tree-vectorize", "-fno-store-merging", "-fno-tree-loop-distribute-patterns", "-fno-ipa-icf"}
var kernelFlagsClang = []string{"-fno-vectorize", "-fno-slp-vectorize", "-fno-builtin", "-fno-sanitize=undefined"}

// -O3, since GCC 12 and older vectorise the clocks' loops at no lower level.
var hostFlags = []string{"-std=c++17", "-O3", "-g1", "-fno-omit-frame-pointer", "-fPIE", "-fno-exceptions", "-Wall", "-Wextra", "-Werror"}

type compiler struct {
	command []string
	version string
	clang   bool
}

// findCompiler takes ZS_EMU_CXX, else g++, clang++, or the C++ compiler of the Python package ziglang.
var findCompiler = sync.OnceValues(func() (compiler, error) {
	candidates := [][]string{{"g++"}, {"clang++"}, {"python3", "-m", "ziglang", "c++"}}
	if s := strings.Fields(os.Getenv("ZS_EMU_CXX")); len(s) > 0 {
		candidates = [][]string{s}
	}
	for _, c := range candidates {
		if out, err := exec.Command(c[0], append(c[1:len(c):len(c)], "--version")...).Output(); err == nil {
			return compiler{c, string(out), bytes.Contains(out, []byte("clang"))}, nil
		}
	}
	return compiler{}, errors.New("emu: no C++ compiler: install g++ or clang++, or `pip install ziglang`, or set ZS_EMU_CXX")
})

func (c compiler) run(dir string, args ...string) error {
	cmd := exec.Command(c.command[0], append(c.command[1:len(c.command):len(c.command)], args...)...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("emu: %s: %w\n%s", strings.Join(cmd.Args, " "), err, out)
	}
	return nil
}

// cacheDir returns the folder of one key, and whether it is complete. A folder appears by rename, so it is always complete.
func cacheDir(key string) (string, bool) {
	dir := filepath.Join(os.TempDir(), fmt.Sprintf("zipserv-emu-%d", os.Getuid()), key[:24])
	_, err := os.Stat(dir)
	return dir, err == nil
}

var building sync.Map // key -> *sync.Mutex

// cached runs build in a scratch folder, unless the folder of that key is there already.
func cached(key string, build func(dir string) error) (string, error) {
	dir, ok := cacheDir(key)
	if ok {
		now := time.Now()
		return dir, os.Chtimes(dir, now, now)
	}
	mu, _ := building.LoadOrStore(key, new(sync.Mutex))
	mu.(*sync.Mutex).Lock()
	defer mu.(*sync.Mutex).Unlock()
	if _, ok := cacheDir(key); ok {
		return dir, nil
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return "", err
	}
	scratch, err := os.MkdirTemp(filepath.Dir(dir), "building-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(scratch)
	prune(filepath.Dir(dir))
	if err := build(scratch); err != nil {
		return "", err
	}
	if err := os.Rename(scratch, dir); err != nil {
		if _, ok := cacheDir(key); !ok { // another process may have been first
			return "", err
		}
	}
	return dir, nil
}

// prune removes what nobody has used for days.
func prune(cache string) {
	entries, _ := os.ReadDir(cache)
	for _, e := range entries {
		if info, err := e.Info(); err == nil && time.Since(info.ModTime()) > 72*time.Hour {
			os.RemoveAll(filepath.Join(cache, e.Name()))
		}
	}
}

// hashTree hashes the names and contents of all files, and the parts.
func hashTree(fsys fs.FS, parts ...string) (string, error) {
	h := sha256.New()
	err := fs.WalkDir(fsys, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := fs.ReadFile(fsys, path)
		fmt.Fprintf(h, "%s %d\n", path, len(data))
		h.Write(data)
		return err
	})
	for _, p := range parts {
		fmt.Fprintf(h, "%q\n", p)
	}
	return hex.EncodeToString(h.Sum(nil)), err
}

// runtime compiles the emulator itself, once.
func runtime(c compiler) (string, error) {
	key, err := hashTree(hostFiles, append(hostFlags, c.version)...)
	if err != nil {
		return "", err
	}
	return cached(key, func(dir string) error {
		if err := os.CopyFS(filepath.Join(dir, "emu"), hostFiles); err != nil {
			return err
		}
		units, err := fs.Glob(hostFiles, "host/*.cc")
		if err != nil {
			return err
		}
		sort.Strings(units)
		var all strings.Builder
		for _, u := range units {
			fmt.Fprintf(&all, "#include \"emu/%s\"\n", u)
		}
		if err := os.WriteFile(filepath.Join(dir, "all.cc"), []byte(all.String()), 0o600); err != nil {
			return err
		}
		return c.run(dir, append(append([]string{}, hostFlags...), "-I.", "-c", "all.cc", "-o", "runtime.o")...)
	})
}

// Compile builds a program, or finds it in the cache.
func Compile(src Source) (*Program, error) {
	c, err := findCompiler()
	if err != nil {
		return nil, err
	}
	host, err := runtime(c)
	if err != nil {
		return nil, err
	}
	parts := append([]string{host, src.Main}, src.Defines...)
	parts = append(append(append(parts, src.Kernels...), src.Constants...), kernelFlags...)
	key, err := hashTree(src.Files, parts...)
	if err != nil {
		return nil, err
	}
	dir, err := cached(key, func(dir string) error {
		if err := os.CopyFS(filepath.Join(dir, "src"), src.Files); err != nil {
			return err
		}
		var main strings.Builder
		fmt.Fprintf(&main, "#include \"%s\"\n#include \"emu/host/entry.h\"\n", src.Main)
		for _, k := range src.Kernels {
			fmt.Fprintf(&main, "ZS_EMU_ENTRY(%s)\n", k)
		}
		for _, k := range src.Constants {
			fmt.Fprintf(&main, "ZS_EMU_CONSTANT(%s)\n", k)
		}
		if err := os.WriteFile(filepath.Join(dir, "program.cc"), []byte(main.String()), 0o600); err != nil {
			return err
		}
		args := append([]string{}, kernelFlags...)
		if c.clang {
			args = append(args, kernelFlagsClang...)
		} else {
			args = append(args, kernelFlagsGCC...)
		}
		for _, d := range src.Defines {
			args = append(args, "-D"+d)
		}
		args = append(args, "-Isrc", "-I"+host, "-c", "program.cc", "-o", "program.o")
		if err := c.run(dir, args...); err != nil {
			return err
		}
		return c.run(dir, "-pie", "program.o", filepath.Join(host, "runtime.o"), "-o", "program")
	})
	if err != nil {
		return nil, err
	}
	p := &Program{filepath.Join(dir, "program"), map[string]int{}}
	if len(src.Constants) == 0 {
		return p, nil
	}
	out, err := exec.Command(p.path, "--constants").Output()
	if err != nil {
		return nil, fmt.Errorf("emu: the constants of %s: %w", src.Main, err)
	}
	for line := range strings.Lines(string(out)) {
		var name string
		var value int
		if _, err := fmt.Sscan(line, &name, &value); err != nil {
			return nil, fmt.Errorf("emu: the constants of %s: %w", src.Main, err)
		}
		p.constants[name] = value
	}
	return p, nil
}

// Mutate returns files with a piece of one file replaced, for seeding bugs: match number nth (from 0; -1 is the last) of a regular
// expression, whose groups the replacement may name as $1.
func Mutate(files fs.FS, name, pattern string, nth int, replacement string) (fs.FS, error) {
	data, err := fs.ReadFile(files, name)
	if err != nil {
		return nil, err
	}
	re, err := regexp.Compile(pattern)
	if err != nil {
		return nil, err
	}
	matches := re.FindAllSubmatchIndex(data, -1)
	if nth < 0 {
		nth += len(matches)
	}
	if nth < 0 || nth >= len(matches) {
		return nil, fmt.Errorf("emu: %q has %d matches in %s", pattern, len(matches), name)
	}
	m := matches[nth]
	out := append([]byte{}, data[:m[0]]...)
	out = re.Expand(out, []byte(replacement), data, m)
	return overlay{files, name, append(out, data[m[1]:]...)}, nil
}
