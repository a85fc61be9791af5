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
	// Partials is the bytes of workspace for partial sums, of any content; Flags counts the 32-bit words that are zero between launches.
	Partials uint64
	Flags    uint32
}

// shape is how the few-token kernel lays its warps. The sums of a token follow from it and the grid, so it is chosen by device alone:
// every N of a device has the same.
type shape struct{ rows, mw, kw int }

// In order of preference: larger strips patch and store less per weight.
var shapes = []shape{{64, 2, 4}, {32, 2, 4}, {32, 4, 2}, {16, 4, 2}, {16, 2, 2}}

const (
	maxTokens = 64 // of one launch of the few-token kernel
	minStages = 2
	maxStages = 4
	xStages   = 2
)

// tokenClasses are the variants of the few-token kernel by tokens.
var tokenClasses = []uint64{8, 16, 32, maxTokens}

// gemmSmem mirrors ZS_GEMM_SMEM of zipgemm_mma.cu.
func (s shape) smem(tokens, stages int) int {
	warps := s.mw * s.kw
	return warps*s.rows*128 + warps*stages*(tileBytes*s.rows/tileSide) + xStages*s.kw*tokens*128 + warps*64 + 256
}

func (s shape) stages(tokens, limit int) int {
	for n := maxStages; n >= minStages; n-- {
		if s.smem(tokens, n) <= limit {
			return n
		}
	}
	return 0
}

func shapeFor(d Device) (shape, error) {
	for _, s := range shapes {
		if s.stages(maxTokens, d.SmemBlock) > 0 {
			return s, nil
		}
	}
	return shape{}, fmt.Errorf("a block of this GPU has %d bytes of shared memory, too little for the matrix kernel", d.SmemBlock)
}

// Class rounds N to the variant that serves it; problems of a class share a plan.
func Class(n uint64) uint64 {
	for _, c := range tokenClasses {
		if n <= c {
			return c
		}
	}
	return ceilDiv(n, maxTokens) * maxTokens
}

// ForLinear plans a product.
func ForLinear(d Device, p Problem) (Linear, error) {
	if p.M == 0 || p.K == 0 || p.N == 0 {
		return Linear{}, fmt.Errorf("a product needs M, K and N of at least 1, got %d, %d and %d", p.M, p.K, p.N)
	}
	s, err := shapeFor(d)
	if err != nil {
		return Linear{}, err
	}
	fused := fusedPlan(d, s, p)
	if !p.Invariant && expandTime(d, p) < fusedTime(d, p, fused.Tokens) {
		return Linear{Expand: true}, nil
	}
	return fused, nil
}

func fusedPlan(d Device, s shape, p Problem) Linear {
	tokens := min(Class(p.N), maxTokens)
	stages := s.stages(int(tokens), d.SmemBlock)
	units := ceilDiv(ceilDiv(p.M, uint64(s.rows)), uint64(s.mw)) * ceilDiv(ceilDiv(p.K, tileSide), uint64(s.kw))
	grid := uint32(min(uint64(d.SMs), units))
	return Linear{
		Kernel: Kernel{
			Source: "zipgemm_mma.cu", Entry: "zs_zipgemm_mma",
			Defines: []string{
				fmt.Sprintf("ZS_N=%d", tokens), fmt.Sprintf("ZS_ROWS=%d", s.rows), fmt.Sprintf("ZS_MW=%d", s.mw), fmt.Sprintf("ZS_KW=%d", s.kw),
				fmt.Sprintf("ZS_STAGES=%d", stages), fmt.Sprintf("ZS_XSTAGES=%d", xStages),
			},
			Grid: grid, Block: uint32(32 * (s.mw*s.kw + 1)), Smem: uint32(s.smem(int(tokens), stages)),
		},
		Tokens:   tokens,
		Partials: uint64(grid) * uint64(s.mw*s.rows) * tokens * 4,
		Flags:    grid,
	}
}

// Workspace bounds Partials and Flags over all problems of a device, so that one workspace serves them all and never grows.
func Workspace(d Device) (partials uint64, flags uint32) {
	for _, s := range shapes {
		partials = max(partials, uint64(d.SMs)*uint64(s.mw*s.rows)*maxTokens*4)
	}
	return partials, uint32(d.SMs)
}

// The times below are estimates in seconds, good for choosing between the two ways and for nothing else.
const (
	bitsPerWeight = 11.3
	launchTime    = 2e-6
	fusedReached  = 0.85 // share of the copy bandwidth that the few-token kernel's weight stream reaches
	gemmReached   = 0.70 // share of the tensor rate that cuBLAS reaches
)

func fusedTime(d Device, p Problem, tokens uint64) float64 {
	compressed := float64(p.M) * float64(p.K) * bitsPerWeight / 8
	activations := 2 * float64(min(p.N, tokens)) * float64(p.K+p.M)
	each := launchTime + (compressed+activations)/(d.bandwidth()*fusedReached)
	return each * float64(ceilDiv(p.N, tokens))
}

func expandTime(d Device, p Problem) float64 {
	raw := 2 * float64(p.M) * float64(p.K)
	memory := (raw + 2*float64(p.N)*float64(p.K+p.M)) / d.bandwidth()
	product := 2 * float64(p.M) * float64(p.N) * float64(p.K) / (d.tensorRate() * gemmReached)
	return 2*launchTime + raw*(1+bitsPerWeight/16)/d.bandwidth() + max(memory, product)
}
