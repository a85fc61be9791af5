// SPDX-License-Identifier: Apache-2.0

package codec

import "golang.org/x/sys/cpu"

// kernelSets are the sets that this machine can run.
func kernelSets() []kernels {
	sets := []kernels{portable}
	if cpu.X86.HasAVX2 {
		sets = append(sets, avx2)
	}
	if hasAVX512() {
		sets = append(sets, avx512)
	}
	return sets
}
