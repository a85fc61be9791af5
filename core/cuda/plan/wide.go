// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"fmt"
	"math"
)

// wideLayout is one of the layouts of the kernel for many tokens (zipgemm_wide.cu): an output tile of a block is groups strips by tokens, a unit two columns of
// tiles. Clusters of two blocks have twice as many strips. Which tiles are split over how many clusters depends on the tokens, so it is never used in the
// batch-invariant mode.
type wideLayout struct {
	groups int
	tokens uint64 // a multiple of 64, so that all numbers of a class have as many tiles
	// Fitted to an H100's times: 8.5, 1.9 and 5.5 us of the first, 4.5, 2.0 and 3.0 of the second, at 1.78 GHz.
	startClocks, unitClocks, helperClocks float64
}

const (
	wideKW       = 2
	wideCluster  = 2
	wideStages   = 3  // decoded units
	wideXStages  = 2  // units of activations
	wideBarriers = 16 // bytes of a pair
)

// wideLayouts: the first moves less through shared memory for a product, the second deals out finer work with fewer partial sums.
var wideLayouts = []wideLayout{
	{groups: 2, tokens: 256, startClocks: 15100, unitClocks: 3400, helperClocks: 9800},
	{groups: 3, tokens: 128, startClocks: 8000, unitClocks: 3620, helperClocks: 5300},
}

const (
	wideSource = "zipgemm_wide.cu"
	wideEntry  = "zs_zipgemm_wide"
)

func (w wideLayout) threads() int { return 128*w.groups + 128 }

// smem is ZS_GEMM_SMEM; a test compares it with the source.
func (w wideLayout) smem() int {
	units := wideStages * w.groups * wideKW * tileData
	activations := wideXStages * wideKW * int(w.tokens) * 128
	return units + activations + (wideXStages*wideKW+wideStages*w.groups)*wideBarriers + w.groups*spareBytes
}

// many says whether a kernel for many tokens can be asked for: as wgmma, for more tokens than one launch of that takes, and in clusters of so many blocks.
func many(d Device, p Problem, cluster int) bool {
	return tensor(d, p) && !p.Invariant && !p.Apart && Class(p.N) > wgmma.tokens && d.SMs >= cluster
}

// wide are the layouts that can solve a problem.
func wide(d Device, p Problem) (list []wideLayout) {
	if !many(d, p, wideCluster) {
		return nil
	}
	for _, w := range wideLayouts {
		if w.smem() <= d.limit(blocksPerSM) {
			list = append(list, w)
		}
	}
	return list
}

// tiles of output, each a cluster's, and the units of each.
func (w wideLayout) tiles(p Problem) (tiles, steps uint64) {
	groups := ceilDiv(ceilDiv(p.M, tileSide), uint64(w.groups*wideCluster))
	return groups * ceilDiv(p.N, w.tokens), ceilDiv(ceilDiv(p.K, tileSide), wideKW)
}

// clusters: all that fit, or one a unit (the kernel does not know of clusters without work), or a tenth less where then all tiles are shared by as many in
// equal runs: they add up two by two.
func (w wideLayout) clusters(d Device, p Problem) uint64 {
	tiles, steps := w.tiles(p)
	all := min(uint64(d.SMs/wideCluster), tiles*steps)
	if even := all / tiles * tiles; 10*even >= 9*all {
		return even
	}
	return all
}

// run is the longest run of a cluster in units, as Share in tiles.cuh deals them, and how many clusters share a tile that is dealt by units.
func (w wideLayout) run(d Device, p Problem) (units, helpers float64) {
	tiles, steps := w.tiles(p)
	clusters := w.clusters(d, p)
	streamed := tiles
	if tiles >= 2*clusters {
		streamed = tiles % clusters
		if streamed > 0 {
			streamed += clusters
		}
	}
	units = float64(streamed*steps) / float64(clusters)
	switch {
	case streamed == tiles && clusters%tiles == 0:
		helpers = float64(clusters/tiles-1) / 2
	case streamed > 0:
		helpers = float64(steps) / units
	}
	return units + float64((tiles-streamed)/clusters*steps), helpers
}

// launch plans one launch for all tokens of a class.
func (w wideLayout) launch(d Device, p Problem, clusters uint64) Linear {
	grid := clusters * wideCluster
	return Linear{
		Kernel: Kernel{
			Source: wideSource, Entry: wideEntry,
			Defines: []string{
				fmt.Sprintf("ZS_N=%d", w.tokens), fmt.Sprintf("ZS_GROUPS=%d", w.groups), fmt.Sprintf("ZS_XSTAGES=%d", wideXStages),
				fmt.Sprintf("ZS_CLUSTER=%d", wideCluster),
			},
			Grid: uint32(grid), Cluster: wideCluster, Resident: blocksPerSM, Block: uint32(w.threads()), Smem: uint32(w.smem()), Programmatic: true,
		},
		Tokens:     Class(p.N),
		TensorRows: uint32(w.tokens / wideCluster),
		Workspace:  grid * uint64(w.groups) * tileSide * w.tokens * 4,
	}
}

// bestWide is the layout that should be fastest, and its time; infinite where none can solve the problem.
func bestWide(d Device, p Problem) (best *wideLayout, least float64) {
	least = math.Inf(1)
	for _, w := range wide(d, p) {
		if t := w.wideTime(d, p); t < least {
			best, least = &w, t
		}
	}
	return best, least
}
