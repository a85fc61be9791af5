// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"fmt"
	"slices"
)

// Problem is y[N,M] = x[N,K] W[M,K]^T.
type Problem struct {
	M, K, N   uint64
	Invariant bool // a token's result must not depend on N
	WGMMA     bool // the wgmma kernel may be chosen: an experiment, see docs/gpu.md
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

// Layouts of the mma kernel. Up to eight warps have room for the sums of 64 tokens in registers; twelve have for those of 16.
var (
	mmaNarrow = []variant{{2, 4}, {1, 8}, {4, 2}, {3, 2}, {2, 2}}
	mmaWide   = []variant{{3, 4}, {2, 6}, {1, 12}}
)

// layouts lists those of the mma kernel that serve a class of tokens without spilling registers.
func layouts(d Device, class uint64) []variant {
	list := mmaNarrow
	if d.Capability < 90 { // the compiler needs a few registers more there; with 2 x 4 warps they suffice
		list = []variant{{3, 2}, {2, 2}}
		if eight := (variant{2, 4}); mma.fits(d, eight, class) {
			list = []variant{eight}
		}
	}
	if class <= wideTokens {
		return slices.Concat(mmaWide, list)
	}
	return list
}

const (
	wideTokens  = 16    // most tokens of twelve warps
	mmaTokens   = 64    // most tokens of a launch of the mma kernel
	wgmmaTokens = 128   // the same of the wgmma kernel
	smallTiles  = 12000 // below, a weight is small: the wgmma kernel pays from 33 tokens on, and two warpgroups a block serve it better than three
)

// classes are the numbers of tokens that kernels are compiled for.
var classes = []uint64{8, 16, 32, mmaTokens, wgmmaTokens}

// Class rounds N up so that problems of a class share a plan.
func Class(n uint64) uint64 {
	for _, c := range classes {
		if n <= c {
			return c
		}
	}
	return ceilDiv(n, mmaTokens) * mmaTokens
}

// ForLinear plans a product.
func ForLinear(d Device, p Problem) (Linear, error) {
	if p.M == 0 || p.K == 0 || p.N == 0 {
		return Linear{}, fmt.Errorf("a product needs M, K and N of at least 1, got %d, %d and %d", p.M, p.K, p.N)
	}
	if p.Invariant {
		return forInvariant(d, p)
	}
	n := Class(p.N)
	if d.Capability == 90 && p.WGMMA {
		small := Tiles(p.M, p.K) < smallTiles
		switch {
		case n > wgmmaTokens:
			return Linear{Expand: true}, nil
		case n == wgmmaTokens && small && wgmma.fits(d, variant{2, 1}, n):
			return wgmma.launch(d, variant{2, 1}, p.M, p.K, n), nil
		case n == wgmmaTokens && wgmma.fits(d, variant{3, 1}, n):
			return wgmma.launch(d, variant{3, 1}, p.M, p.K, n), nil
		case n == mmaTokens && small && wgmma.fits(d, variant{2, 2}, n):
			return wgmma.launch(d, variant{2, 2}, p.M, p.K, n), nil
		}
	}
	v, err := best(d, layouts(d, min(n, mmaTokens)), p.M, p.K, min(n, mmaTokens))
	if err != nil {
		return Linear{}, err
	}
	if n > mmaTokens && expandTime(d, p) < fusedTime(d, p, mmaTokens) {
		return Linear{Expand: true}, nil
	}
	return mma.launch(d, v, p.M, p.K, min(n, mmaTokens)), nil
}

// forInvariant takes one layout for every N, and as many launches as that needs.
func forInvariant(d Device, p Problem) (Linear, error) {
	v, err := best(d, layouts(d, mmaTokens), p.M, p.K, mmaTokens)
	if err != nil {
		return Linear{}, err
	}
	return mma.launch(d, v, p.M, p.K, min(Class(p.N), mmaTokens)), nil
}
