// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"fmt"
	"math"
)

// The Kernel of a Choice of the kernel for some hundred tokens, whose blocks decode for each other in pairs, or each for itself: MW strips and KW times
// 64 tokens an output tile of a block.
const (
	Pair = "pair"
	Solo = "solo"
)

// pairLayout is one of the layouts of that kernel (zipgemm_pair.cu): an output tile of a cluster is two strips by the tokens of its blocks. Which tiles are split over how
// many clusters depends on the tokens, so it is never used in the batch-invariant mode.
type pairLayout struct {
	kernel   string
	cluster  uint64 // blocks
	tokens   uint64 // of a block: a multiple of 64, so that all numbers of a class have as many tiles
	decoders int    // warps
	xstages  int    // columns of activations
	stages   int    // columns of tiles
	// Fitted to an H100's times (docs/performance.md): a start, a column of tiles at the clock that it keeps up for some ten microseconds and at that for long,
	// and the sums: of each further cluster that shares a tile, and all of them where runs begin anywhere.
	startClocks, columnClocks, longClocks, sumsClocks, anywhereClocks float64
}

const (
	pairGroups  = 2 // strips of a cluster, consumer warpgroups of a block
	pairSource  = "zipgemm_pair.cu"
	pairEntry   = "zs_zipgemm_pair"
	pairEscapes = 1.03 // what trained-like weights take longer than the Gaussian ones that were measured, halved; the other ways lose nothing by them
)

// pairLayouts: the first moves less through shared memory for a product, the second deals out finer work; the third takes the least energy for up to 256 tokens, but its
// partial sums are twice as long, and its four decoders can hardly keep up; the fourth has registers for eight; the fifth is the first for 384 tokens, or twice as many.
var pairLayouts = []pairLayout{
	{kernel: Pair, cluster: 2, tokens: 256, decoders: 4, xstages: 4, stages: 6, startClocks: 17800, columnClocks: 1140, longClocks: 1370, sumsClocks: 3500, anywhereClocks: 19000},
	{kernel: Pair, cluster: 2, tokens: 128, decoders: 8, xstages: 6, stages: 8, startClocks: 12500, columnClocks: 730, longClocks: 910, sumsClocks: 4200, anywhereClocks: 12600},
	{kernel: Solo, cluster: 1, tokens: 256, decoders: 4, xstages: 4, stages: 6, startClocks: 14000, columnClocks: 1280, longClocks: 1500, sumsClocks: 7500, anywhereClocks: 24000},
	{kernel: Solo, cluster: 1, tokens: 192, decoders: 8, xstages: 5, stages: 6, startClocks: 7000, columnClocks: 1100, longClocks: 1280, sumsClocks: 5100, anywhereClocks: 18000},
	{kernel: Pair, cluster: 2, tokens: 192, decoders: 4, xstages: 5, stages: 6, startClocks: 11500, columnClocks: 960, longClocks: 1135, sumsClocks: 9000, anywhereClocks: 20000},
}

func (l pairLayout) threads() int { return 128*pairGroups + 32*l.decoders }

// smem is ZS_GEMM_SMEM; a test compares it with the source.
func (l pairLayout) smem() int {
	const barriers = 16 // bytes of a full and an empty one
	return l.xstages*(int(l.tokens)*128+barriers) + l.stages*(pairGroups*tileData+barriers) + l.decoders*spareBytes
}

// kw is the KW of a Choice.
func (l pairLayout) kw() int { return int(l.tokens / 64) }

// pairs are the layouts that can solve a problem.
func pairs(d Device, p Problem) (list []pairLayout) {
	for _, l := range pairLayouts {
		if many(d, p, int(l.cluster)) && l.smem() <= d.limit(blocksPerSM) && l.tiles(p) < 1<<20 {
			list = append(list, l)
		}
	}
	return list
}

// tiles of output, each a cluster's.
func (l pairLayout) tiles(p Problem) uint64 {
	return ceilDiv(ceilDiv(p.M, tileSide), pairGroups) * ceilDiv(p.N, l.tokens*l.cluster)
}

// anywhere says whether the clusters' runs begin anywhere in k.
func (l pairLayout) anywhere(d Device, p Problem) bool {
	return Class(p.N) <= l.tokens*l.cluster && anywhere(l.tiles(p), l.all(d), ceilDiv(p.K, tileSide))
}

// all clusters that fit.
func (l pairLayout) all(d Device) uint64 { return uint64(d.SMs) / l.cluster }

// clusters: all that fit, or even ones.
func (l pairLayout) clusters(d Device, p Problem) uint64 {
	if l.anywhere(d, p) {
		return l.all(d)
	}
	return l.even(d, p)
}

// even: all that fit, or so many for each tile.
func (l pairLayout) even(d Device, p Problem) uint64 {
	all, tiles := l.all(d), l.tiles(p)
	if tiles >= all {
		return all
	}
	return tiles * parts(tiles, all, ceilDiv(p.K, tileSide))
}

// time: a start, the run of a cluster, and the sums of those that share a tile.
func (l pairLayout) time(d Device, p Problem) float64 {
	tiles, clusters, steps := l.tiles(p), l.clusters(d, p), ceilDiv(p.K, tileSide)
	columns, sharers := run(tiles, clusters, steps)
	sums := l.sumsClocks * float64(sharers-1)
	if l.anywhere(d, p) {
		columns, sums = float64(tiles*steps)/float64(clusters), l.anywhereClocks
	}
	clocks := max(l.startClocks+l.columnClocks*columns, l.longClocks*columns) + sums
	return pairEscapes * clocks / (d.clock() * clockReached)
}

// launch plans one launch for all tokens of a class.
func (l pairLayout) launch(p Problem, clusters uint64) Linear {
	grid, results := clusters*l.cluster, l.tokens
	defines := []string{
		fmt.Sprintf("ZS_N=%d", l.tokens), fmt.Sprintf("ZS_CLUSTER=%d", l.cluster), fmt.Sprintf("ZS_DECODERS=%d", l.decoders), fmt.Sprintf("ZS_XSTAGES=%d", l.xstages), fmt.Sprintf("ZS_STAGES=%d", l.stages),
	}
	defines = append(defines, p.gates()...)
	if p.Gated {
		results /= 2 // each warpgroup has those of half of the tokens
	}
	return Linear{
		Kernel: Kernel{
			Source: pairSource, Entry: pairEntry, Defines: defines,
			Grid: uint32(grid), Cluster: uint32(l.cluster), Resident: blocksPerSM, Block: uint32(l.threads()), Smem: uint32(l.smem()), Programmatic: true,
		},
		ByRows:     true,
		Tokens:     Class(p.N),
		TensorRows: uint32(l.tokens * l.cluster / pairGroups / 2),
		WholeBoxes: true,
		Workspace:  grid * pairGroups * tileSide * l.tokens * 4,
		ResultRows: uint32(results),
	}
}

// bestPair is the layout that should be fastest, and its time; infinite where none can solve the problem.
func bestPair(d Device, p Problem) (best *pairLayout, least float64) {
	least = math.Inf(1)
	for _, l := range pairs(d, p) {
		if t := l.time(d, p); t < least {
			best, least = &l, t
		}
	}
	return best, least
}
