// SPDX-License-Identifier: Apache-2.0

package plan

// The times here are estimates in seconds, good for choosing between ways to solve a problem and for nothing else.
const (
	bitsPerWeight = 11.3
	launchTime    = 2e-6
	fusedReached  = 0.85 // share of the copy bandwidth that the few-token kernel's weight stream reaches
	gemmReached   = 0.70 // share of the tensor rate that cuBLAS reaches
)

// fusedTime: every launch streams the compressed weight once.
func fusedTime(d Device, p Problem, tokens uint64) float64 {
	compressed := float64(p.M) * float64(p.K) * bitsPerWeight / 8
	activations := 2 * float64(min(p.N, tokens)) * float64(p.K+p.M)
	each := launchTime + (compressed+activations)/(d.bandwidth()*fusedReached)
	return each * float64(ceilDiv(p.N, tokens))
}

// expandTime: decompress the weight, then a product with the raw weight.
func expandTime(d Device, p Problem) float64 {
	raw := 2 * float64(p.M) * float64(p.K)
	memory := (raw + 2*float64(p.N)*float64(p.K+p.M)) / d.bandwidth()
	product := 2 * float64(p.M) * float64(p.N) * float64(p.K) / (d.tensorRate() * gemmReached)
	return 2*launchTime + raw*(1+bitsPerWeight/16)/d.bandwidth() + max(memory, product)
}
