// SPDX-License-Identifier: Apache-2.0

package jit

import (
	"fmt"
	"slices"
)

// Arch is a compiler target.
type Arch struct {
	Name string // as in -arch=: sm_90a, or compute_90 where only PTX can be made
	PTX  bool   // the driver finishes the compilation
}

// specific are the compute capabilities whose kernels use instructions of the "a" target (wgmma on 9.0, tcgen05 on 10.x).
var specific = []int{90, 100, 103}

// MinCapability is the lowest compute capability (10*major+minor) that the kernels support.
const MinCapability = 80

// Target chooses what to compile for a device of the given compute capability, out of what the compiler supports.
//
// The device's own architecture is taken where the compiler knows it. For a newer device of a known major version, code for the
// nearest older minor version runs; for a newer major version only PTX does, finished by the driver.
func Target(major, minor int, supported []int) (Arch, error) {
	cc := 10*major + minor
	if cc < MinCapability {
		return Arch{}, fmt.Errorf("compute capability %d.%d is too old: 8.0 (Ampere) or newer is needed", major, minor)
	}
	if slices.Contains(supported, cc) {
		if slices.Contains(specific, cc) {
			return Arch{Name: fmt.Sprintf("sm_%da", cc)}, nil
		}
		return Arch{Name: fmt.Sprintf("sm_%d", cc)}, nil
	}
	best := 0
	for _, s := range supported {
		if s < cc && s >= MinCapability && s > best {
			best = s
		}
	}
	if best == 0 {
		return Arch{}, fmt.Errorf("this NVRTC compiles for %v, none of which runs on compute capability %d.%d", supported, major, minor)
	}
	if best/10 == major {
		return Arch{Name: fmt.Sprintf("sm_%d", best)}, nil
	}
	return Arch{Name: fmt.Sprintf("compute_%d", best), PTX: true}, nil
}
