// SPDX-License-Identifier: Apache-2.0

package nvrtc

import (
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strings"
)

// EnvLibrary names the variable that says which NVRTC to use: a library file, or the directory that holds it.
const EnvLibrary = "ZIPSERV_NVRTC"

// Find opens the first usable NVRTC. It looks, in this order, at
//
//  1. ZIPSERV_NVRTC, alone when it is set;
//  2. the directories that the caller passes (Python passes those of the pip packages nvidia-cuda-nvrtc, nvidia-cuda-nvrtc-cu12 and torch);
//  3. CUDA_HOME and CUDA_PATH: lib64, lib, targets/*/lib;
//  4. the dynamic loader's path, CUDA 13 before 12;
//  5. /usr/local/cuda and /usr/local/cuda-*, newest first.
//
// maxMajor is the driver's CUDA version: a newer NVRTC's code would not load. 0 means that any will do.
func Find(dirs []string, maxMajor int) (*Library, error) {
	var tried []string
	for _, path := range candidates(dirs) {
		l, err := OpenPath(path)
		if err != nil {
			if filepath.IsAbs(path) {
				tried = append(tried, err.Error())
			}
			continue
		}
		if maxMajor > 0 && l.major > maxMajor {
			tried = append(tried, fmt.Sprintf("%s is of CUDA %s, newer than the driver's CUDA %d", path, l.VersionString(), maxMajor))
			continue
		}
		if l.major < 12 {
			tried = append(tried, fmt.Sprintf("%s is of CUDA %s, older than 12.0", path, l.VersionString()))
			continue
		}
		return l, nil
	}
	reason := "none was found"
	if len(tried) > 0 {
		reason = strings.Join(tried, "; ")
	}
	return nil, fmt.Errorf("no NVRTC library can be used to compile the GPU kernels (%s): install torch with CUDA or the pip package "+
		"nvidia-cuda-nvrtc, or set CUDA_HOME or %s", reason, EnvLibrary)
}

func candidates(dirs []string) []string {
	if p := os.Getenv(EnvLibrary); p != "" {
		if st, err := os.Stat(p); err == nil && st.IsDir() {
			if found := inDir(p); len(found) > 0 {
				return found
			}
		}
		return []string{p}
	}
	var out []string
	for _, d := range dirs {
		out = append(out, inDir(d)...)
	}
	for _, v := range []string{"CUDA_HOME", "CUDA_PATH"} {
		if home := os.Getenv(v); home != "" {
			out = append(out, inToolkit(home)...)
		}
	}
	out = append(out, "libnvrtc.so.13", "libnvrtc.so.12")
	out = append(out, inToolkit("/usr/local/cuda")...)
	versions, _ := filepath.Glob("/usr/local/cuda-*")
	sort.Sort(sort.Reverse(sort.StringSlice(versions)))
	for _, v := range versions {
		out = append(out, inToolkit(v)...)
	}
	return out
}

func inToolkit(home string) []string {
	out := append(inDir(filepath.Join(home, "lib64")), inDir(filepath.Join(home, "lib"))...)
	targets, _ := filepath.Glob(filepath.Join(home, "targets", "*", "lib"))
	for _, t := range targets {
		out = append(out, inDir(t)...)
	}
	return out
}

// inDir lists the NVRTC libraries of a directory, the highest major version first, each file once.
func inDir(dir string) []string {
	// torch's own copies are named libnvrtc-<hash>.so.12; builtins and the alternative build are not the library.
	plain, _ := filepath.Glob(filepath.Join(dir, "libnvrtc.so*"))
	hashed, _ := filepath.Glob(filepath.Join(dir, "libnvrtc-*.so*"))
	sort.Sort(sort.Reverse(sort.StringSlice(plain)))
	seen := map[string]bool{}
	var out []string
	for _, p := range append(plain, hashed...) {
		if strings.HasPrefix(filepath.Base(p), "libnvrtc-builtins") {
			continue
		}
		abs, err := filepath.Abs(p)
		if err != nil {
			continue
		}
		real, err := filepath.EvalSymlinks(abs)
		if err != nil || seen[real] {
			continue
		}
		seen[real] = true
		out = append(out, abs)
	}
	return out
}
