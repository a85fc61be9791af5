// SPDX-License-Identifier: Apache-2.0

package plan

// The times here are estimates in seconds, good for choosing between ways to solve a problem and for nothing else. Their constants are
// from the measurements in docs/performance.md: an H200's for few tokens, an H100's for many (the section zipgemm_pair has the table that the choices are
// tested with).
const (
	bitsPerWeight = 11.3
	launchTime    = 2e-6
	streamReached = 0.95 // share of the copy bandwidth that the few-token kernel's weight stream reaches
	sumsTime      = 3e-6 // what a launch of the wgmma kernel takes for partial sums and results
	gemmReached   = 0.73 // share of the tensor rate that cuBLAS reaches at the clock under load
	decodeReached = 0.95 // share of the copy bandwidth that decompress reaches
	clockReached  = 0.90 // share of the highest clock under load
)

// clocks of an SM that a kernel takes for 1024 weights: whatever the tokens, and more for each.
func (f family) clocks(tokens float64) float64 {
	if f.tensor {
		return 78 + 0.64*tokens
	}
	return 60 + 1.55*tokens
}

// fusedTime: every launch streams the compressed weight once, or is held up by its arithmetic.
func fusedTime(d Device, p Problem, f family) float64 {
	weights, tokens := float64(p.M)*float64(p.K), float64(min(p.N, f.tokens))
	activations := 2 * tokens * float64(p.K+p.M)
	memory := (weights*bitsPerWeight/8 + activations) / (d.bandwidth() * streamReached)
	arithmetic := weights / 1024 * f.clocks(tokens) / (float64(d.SMs) * d.clock() * clockReached)
	launch := launchTime
	if f.tensor {
		launch += sumsTime
	}
	return (launch + max(memory, arithmetic)) * float64(ceilDiv(p.N, f.tokens))
}

// expandTime: decompress the weight, then a product with the raw weight.
func expandTime(d Device, p Problem) float64 {
	raw := 2 * float64(p.M) * float64(p.K)
	memory := (raw + 2*float64(p.N)*float64(p.K+p.M)) / d.bandwidth()
	product := 2 * float64(p.M) * float64(p.N) * float64(p.K) / (d.tensorRate() * clockReached * gemmReached)
	return 2*launchTime + raw*(1+bitsPerWeight/16)/(d.bandwidth()*decodeReached) + max(memory, product)
}
