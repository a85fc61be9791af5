// SPDX-License-Identifier: Apache-2.0

package plan

import "fmt"

// Problem is y[N,M] = x[N,K] W[M,K]^T.
type Problem struct {
	M, K, N   uint64
	Invariant bool // a token's result must not depend on N
	Apart     bool // no clusters: the device has no room for them
	Unaligned bool // x or a row of it begins at an address that is no multiple of 16
	Gated     bool // y[N,M/2]: SiLU of the first half of the rows times the second, where there is a kernel for that (else ForLinear says Expand)
}

// gates are the definitions of a kernel that applies them, or none.
func (p Problem) gates() []string {
	if p.Gated {
		return []string{"ZS_GATED=1"}
	}
	return nil
}

// Linear says how a problem is solved.
type Linear struct {
	// Expand: decompress W into memory and leave the product to cuBLAS. The fields below are then empty.
	Expand bool
	Kernel Kernel
	// ByRows: the kernel is given the sections of a blob, and so may multiply by some of its rows.
	ByRows bool
	Tokens uint64 // per launch; a larger N takes several launches
	// TensorRows: where not 0, the kernel reads x through a tensor map with boxes of so many rows of 64 columns, or, without WholeBoxes, of as many as there are
	// tokens, rounded up to 8, where these are fewer; x and its rows are then aligned to 16 bytes.
	TensorRows uint32
	WholeBoxes bool
	// Workspace is the bytes for partial sums and, from Flags on, for the flags and tickets of the relay kernel; all of them 0xFF between launches.
	Workspace uint64
	Flags     uint64
	// Scratch is the bytes that a launch needs for the time it runs, whatever they are before; 0 but for the relay kernel.
	Scratch uint64
	// ResultRows: where not 0, results leave by tensor copies of so many tokens, where y allows it.
	ResultRows uint32
}

// layouts lists those of the mma kernel that serve 64 tokens without spilling registers, and so every number of tokens: the order of a token's
// sums follows from the layout, which is therefore the same for all.
func layouts(d Device) []variant {
	if d.Capability >= 90 {
		return []variant{{2, 4}, {1, 8}, {4, 2}, {3, 2}, {2, 2}}
	}
	// The compiler needs a few registers more there; with 2 x 4 warps they suffice.
	if eight := (variant{2, 4}); mma.fits(d, eight, mma.tokens) {
		return []variant{eight}
	}
	return []variant{{3, 2}, {2, 2}}
}

// tensorLayout is the layout of the wgmma kernel: long runs of k, so that few blocks share a strip, and two tiles a step of the consumers.
var tensorLayout = variant{1, 2}

// wideLayout brings the activations once for two strips, which saves a sixteenth of the energy at 128 tokens, but has twice the partial sums.
var wideLayout = variant{2, 1}

// layoutFor is the layout of the wgmma kernel for so many tokens a launch.
func layoutFor(d Device, p Problem, tokens uint64) variant {
	if p.Invariant || tokens <= sameTokens {
		return tensorLayout
	}
	const worth = 200 // tiles a block from which on partial sums weigh less than activations, at 128 tokens
	v := wideLayout
	grid, groups := uint64(v.grid(d, p.M, p.K, dealingOf(wgmma, v, p, tokens))), v.groups(p.M)
	alone := groups%grid == 0 && float64(grid) >= leastShare*float64(d.SMs) // no partial sums at all
	if alone || tokens > 64 && v.units(p.M, p.K)*uint64(v.mw*v.kw) >= worth*uint64(d.SMs) {
		return v
	}
	return tensorLayout
}

// tensor says whether the wgmma kernel can solve a problem: it reads x by tensor copies, whose rows begin at multiples of 16 bytes.
func tensor(d Device, p Problem) bool { return d.Capability == 90 && p.K%8 == 0 && !p.Unaligned }

// FewTokens: the kernels for more tokens are given the sections of a blob, those for no more than these the whole.
const FewTokens = 128

// classes are the numbers of tokens that kernels are compiled for.
var classes = []uint64{8, 16, 32, 64, FewTokens}

// Class rounds N up so that problems of a class share a plan.
func Class(n uint64) uint64 {
	for _, c := range classes {
		if n <= c {
			return c
		}
	}
	return ceilDiv(n, 64) * 64
}

// ForLinear plans a product.
func ForLinear(d Device, p Problem) (Linear, error) {
	if p.M == 0 || p.K == 0 || p.N == 0 {
		return Linear{}, fmt.Errorf("a product needs M, K and N of at least 1, got %d, %d and %d", p.M, p.K, p.N)
	}
	if p.Gated {
		if p.M%(2*tileSide) != 0 {
			return Linear{}, fmt.Errorf("gates need two halves of whole tiles, M a multiple of %d, not %d", 2*tileSide, p.M)
		}
		if n := Class(p.N); n <= wgmma.tokens && tensor(d, p) && !p.Invariant && wgmma.fits(d, wideLayout, wgmma.tokens) {
			return wgmma.launch(d, wideLayout, p, n), nil // one warpgroup has the sums of both strips
		}
		if l, _ := bestPair(d, p); l != nil {
			return l.launch(p, l.clusters(d, p)), nil
		}
		return Linear{Expand: true}, nil
	}
	f, v := wgmma, tensorLayout
	if tensor(d, p) && f.fits(d, v, f.tokens) {
		v = layoutFor(d, p, min(Class(p.N), f.tokens))
	} else {
		f = mma
		var err error
		if v, err = best(d, layouts(d), p.M, p.K, f.tokens); err != nil {
			return Linear{}, err
		}
	}
	n := Class(p.N)
	if !p.Invariant && n > f.tokens {
		few, expand := fusedTime(d, p, f), expandTime(d, p)
		l, pair := bestPair(d, p)
		if relays(d, p) && relayTime(d, p) < min(few, expand, pair) {
			return relayLaunch(p, relayClusters(d)), nil
		}
		if pair < min(few, expand) {
			return l.launch(p, l.clusters(d, p)), nil
		}
		if expand < few {
			return Linear{Expand: true}, nil
		}
	}
	return f.launch(d, v, p, min(n, f.tokens)), nil
}
