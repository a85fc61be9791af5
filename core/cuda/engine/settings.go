// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"os"
	"sync/atomic"

	"github.com/zipserv/zipserv/core/cuda/jit"
)

// Settings of the process. They can be made before there is a driver.
var (
	dirs      atomic.Pointer[[]string]
	invariant atomic.Bool
)

// EnvInvariant names the variable that switches batch invariance on at start; it is vLLM's.
const EnvInvariant = "VLLM_BATCH_INVARIANT"

// packageVersion is part of what tuned choices hold for.
var packageVersion string

// SetVersion tells the engine which version of the package it is in. It is called before anything else.
func SetVersion(v string) { packageVersion = v }

func init() { invariant.Store(os.Getenv(EnvInvariant) == "1") }

// SetCompilerDirs says in which directories NVRTC may lie. It counts until a compiler has been found.
func SetCompilerDirs(list []string) { dirs.Store(&list) }

func compilerDirs() []string {
	if p := dirs.Load(); p != nil {
		return *p
	}
	return nil
}

// SetInvariant switches batch invariance: a token's result then has the same bits whatever N is.
func SetInvariant(on bool) { invariant.Store(on) }

// Invariant tells whether batch invariance is on.
func Invariant() bool { return invariant.Load() }

// ClearCache removes the compiled kernels on disk. What is loaded stays.
func ClearCache() error {
	cache, err := jit.OpenCache()
	if err != nil {
		return err
	}
	return cache.Clear()
}
