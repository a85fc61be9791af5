// SPDX-License-Identifier: Apache-2.0

package codec

import "golang.org/x/sys/cpu"

// productSets are the sets that this machine can run.
func productSets() []products {
	sets := []products{portableProducts}
	if cpu.X86.HasAVX2 && cpu.X86.HasFMA {
		sets = append(sets, avx2Products)
	}
	if hasAVX512() {
		sets = append(sets, avx512Products)
	}
	if hasAVX512() && cpu.X86.HasAVX512BF16 {
		sets = append(sets, bf16Products)
	}
	if hasAVX512() && cpu.X86.HasAVX512BF16 && cpu.X86.HasAVX512GFNI {
		sets = append(sets, gfniProducts)
	}
	return sets
}
