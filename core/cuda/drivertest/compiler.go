// SPDX-License-Identifier: Apache-2.0

package drivertest

import (
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/zipserv/zipserv/core/cuda/nvrtc"
)

// CompilerDirs lists where tests look for NVRTC beside the usual places: in the environments of this checkout and the active one.
func CompilerDirs() []string {
	_, here, _, _ := runtime.Caller(0)
	root := filepath.Join(filepath.Dir(here), "..", "..", "..")
	var dirs []string
	for _, env := range []string{os.Getenv("VIRTUAL_ENV"), filepath.Join(root, ".venv")} {
		if env == "" {
			continue
		}
		for _, lib := range []string{"nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib", "torch/lib"} {
			found, _ := filepath.Glob(filepath.Join(env, "lib", "python3*", "site-packages", lib))
			dirs = append(dirs, found...)
		}
	}
	return dirs
}

// Compiler opens NVRTC, or skips the test where there is none.
func Compiler(t testing.TB) *nvrtc.Library {
	t.Helper()
	lib, err := nvrtc.Find(CompilerDirs(), 0)
	if err != nil {
		t.Skipf("needs NVRTC, which runs without a GPU: %v", err)
	}
	return lib
}
