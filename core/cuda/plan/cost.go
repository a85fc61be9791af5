// SPDX-License-Identifier: Apache-2.0

package plan

// The times here are estimates in seconds, good for choosing between ways to solve a problem and for nothing else. Their constants are
// from the H200's measurements in docs/performance.md.
const (
	bitsPerWeight = 11.3
	launchTime    = 2e-6
	streamReached = 0.95 // share of the copy bandwidth that the few-token kernel's weight stream reaches
	gemmReached   = 0.70 // share of the tensor rate that cuBLAS reaches
	decodeClocks  = 60   // of an SM for 1024 weights, whatever the tokens
	tokenClocks   = 1.55 // more for each token
	clockReached  = 0.90 // share of the highest clock under load
)

// fusedTime: every launch streams the compressed weight once, or is held up by its arithmetic.
func fusedTime(d Device, p Problem, tokens uint64) float64 {
	weights := float64(p.M) * float64(p.K)
	activations := 2 * float64(min(p.N, tokens)) * float64(p.K+p.M)
	memory := (weights*bitsPerWeight/8 + activations) / (d.bandwidth() * streamReached)
	clocks := decodeClocks + tokenClocks*float64(min(p.N, tokens))
	arithmetic := weights / 1024 * clocks / (float64(d.SMs) * d.clock() * clockReached)
	return (launchTime + max(memory, arithmetic)) * float64(ceilDiv(p.N, tokens))
}

// expandTime: decompress the weight, then a product with the raw weight.
func expandTime(d Device, p Problem) float64 {
	raw := 2 * float64(p.M) * float64(p.K)
	memory := (raw + 2*float64(p.N)*float64(p.K+p.M)) / d.bandwidth()
	product := 2 * float64(p.M) * float64(p.N) * float64(p.K) / (d.tensorRate() * gemmReached)
	return 2*launchTime + raw*(1+bitsPerWeight/16)/d.bandwidth() + max(memory, product)
}
