// SPDX-License-Identifier: Apache-2.0

package plan

import "fmt"

// Problem is y[N,M] = x[N,K] W[M,K]^T.
type Problem struct {
	M, K, N   uint64
	Invariant bool // a token's result must not depend on N
}

// Linear says how a problem is solved.
type Linear struct {
	// Expand: decompress W into memory and leave the product to cuBLAS. The fields below are then empty.
	Expand bool
	Kernel Kernel
	Tokens uint64 // per launch; a larger N takes several launches
	// Workspace is the bytes for partial sums, all of them 0xFF between launches.
	Workspace uint64
}

// mmaVariants, in order of preference. Eight warps have room for the sums of 64 tokens in registers; twelve spill.
var mmaVariants = []variant{
	{mw: 2, kw: 4, blocks: 1, xstages: 2},
	{mw: 3, kw: 2, blocks: 1, xstages: 2},
	{mw: 2, kw: 2, blocks: 1, xstages: 2},
}

// maxTokens is the most tokens that one launch of the few-token kernel serves.
const maxTokens = 64

// Class rounds N to the variant that serves it; problems of a class share a plan.
func Class(n uint64) uint64 {
	if n <= maxTokens {
		return mma.class(n)
	}
	return ceilDiv(n, maxTokens) * maxTokens
}

// ForLinear plans a product.
func ForLinear(d Device, p Problem) (Linear, error) {
	if p.M == 0 || p.K == 0 || p.N == 0 {
		return Linear{}, fmt.Errorf("a product needs M, K and N of at least 1, got %d, %d and %d", p.M, p.K, p.N)
	}
	v, err := mma.first(d, mmaVariants, maxTokens)
	if err != nil {
		return Linear{}, err
	}
	fused, err := mma.launch(d, v, p.M, p.K, mma.class(p.N))
	if err != nil {
		return Linear{}, err
	}
	if !p.Invariant && expandTime(d, p) < fusedTime(d, p, fused.Tokens) {
		return Linear{Expand: true}, nil
	}
	return fused, nil
}

// Workspace bounds the workspace over all problems of a device, so that one serves them all and never grows.
func Workspace(d Device) uint64 {
	v, err := mma.first(d, mmaVariants, maxTokens)
	if err != nil {
		return 0
	}
	return partialBytes(v, uint32(d.SMs*v.blocks), maxTokens)
}
