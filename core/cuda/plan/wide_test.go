// SPDX-License-Identifier: Apache-2.0

package plan_test

import (
	"fmt"
	"math"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/zipserv/zipserv/core/cuda/plan"
)

var h100 = plan.Device{Capability: 90, SMs: 132, SmemBlock: 232448, SmemSM: 233472, Bandwidth: 3.35e12, ClockHz: 1.98e9}

// way names how a plan solves a problem: few, expand, or wide with its strips a block.
func way(t *testing.T, l plan.Linear) string {
	t.Helper()
	switch {
	case l.Expand:
		return "expand"
	case l.Kernel.Entry == "zs_zipgemm_wide":
		return fmt.Sprintf("wide %d", define(t, l.Kernel, "ZS_GROUPS"))
	}
	return "few"
}

// What an H100 measured (docs/performance.md, zipgemm_wide; microseconds). Of the ways that were measured the chosen one must be among the best.
func TestManyTokensAreSolvedInTheFastestWay(t *testing.T) {
	for _, c := range []struct {
		m, k, n uint64
		us      map[string]float64
	}{
		{4096, 4096, 256, map[string]float64{"few": 30.6, "expand": 39, "wide 2": 35.3, "wide 3": 30}},
		{4096, 4096, 512, map[string]float64{"few": 62, "expand": 45.9, "wide 2": 41.2, "wide 3": 43.5}},
		{4096, 4096, 1024, map[string]float64{"expand": 69.5, "wide 2": 70.9, "wide 3": 85.1}},
		{4096, 4096, 2048, map[string]float64{"expand": 116, "wide 2": 140, "wide 3": 173}},
		{6144, 4096, 256, map[string]float64{"few": 44.1, "expand": 54, "wide 2": 43.8, "wide 3": 35.4}},
		{6144, 4096, 512, map[string]float64{"few": 85, "expand": 68, "wide 2": 59.3, "wide 3": 59.1}},
		{6144, 4096, 1024, map[string]float64{"expand": 106.4, "wide 2": 113.8, "wide 3": 132.8}},
		{4096, 14336, 256, map[string]float64{"few": 85.2, "expand": 127, "wide 2": 75.4, "wide 3": 76.2}},
		{4096, 14336, 512, map[string]float64{"expand": 155.6, "wide 2": 123, "wide 3": 148.8}},
		{4096, 14336, 1024, map[string]float64{"expand": 235.4, "wide 2": 263}},
		{28672, 4096, 128, map[string]float64{"few": 79, "wide 2": 124, "wide 3": 80.2}},
		{28672, 4096, 256, map[string]float64{"few": 174.8, "expand": 244, "wide 2": 120, "wide 3": 147}},
		{28672, 4096, 512, map[string]float64{"few": 311, "expand": 304, "wide 2": 240, "wide 3": 300}},
		{28672, 4096, 1024, map[string]float64{"expand": 498, "wide 2": 490, "wide 3": 628}},
		{28672, 4096, 2048, map[string]float64{"expand": 876.7, "wide 2": 939, "wide 3": 1132}},
	} {
		l, err := plan.ForLinear(h100, plan.Problem{M: c.m, K: c.k, N: c.n})
		require.NoError(t, err)
		least := math.Inf(1)
		for _, us := range c.us {
			least = min(least, us)
		}
		us, measured := c.us[way(t, l)]
		assert.True(t, measured, "%d x %d, N = %d: %s", c.m, c.k, c.n, way(t, l))
		assert.LessOrEqual(t, us, 1.06*least, "%d x %d, N = %d: %s", c.m, c.k, c.n, way(t, l))
	}
}

// A plan serves every number of tokens of its class with one launch, whose blocks all have work, and whose partial sums have room.
func TestAPlanForManyTokensServesItsClass(t *testing.T) {
	seen := map[string]int{}
	for _, mk := range [][2]uint64{{1, 8}, {64, 64}, {1000, 776}, {4096, 4096}, {28672, 4096}, {4096, 14336}, {1, 1 << 20}, {1 << 20, 8}} {
		for n := uint64(129); n < 1700; n += 1 + n%3 {
			p := plan.Problem{M: mk[0], K: mk[1], N: plan.Class(n)}
			list, err := plan.Candidates(h100, p)
			require.NoError(t, err)
			for _, c := range list {
				l, err := plan.Chosen(h100, p, c)
				require.NoError(t, err)
				if c.Kernel != plan.Wide {
					continue
				}
				seen[way(t, l)]++
				k := l.Kernel
				checkKernel(t, h100, k)
				assert.GreaterOrEqual(t, l.Tokens, n, "one launch")
				tokens, groups := uint64(define(t, k, "ZS_N")), uint64(define(t, k, "ZS_GROUPS"))
				assert.EqualValues(t, 2, k.Cluster)
				assert.EqualValues(t, tokens/2, l.TensorRows)
				assert.GreaterOrEqual(t, (n+7)/8*8, uint64(l.TensorRows), "x has as many rows as a box, which the kernel relies on")
				assert.Zero(t, k.Grid%2)
				assert.LessOrEqual(t, k.Grid, uint32(132))
				// What the kernel counts from the real n.
				units := ((p.M+63)/64 + 2*groups - 1) / (2 * groups) * ((n + tokens - 1) / tokens) * (((p.K+63)/64 + 1) / 2)
				assert.GreaterOrEqual(t, units, uint64(k.Grid/2), "%v N=%d: a cluster without work", p, n)
				assert.GreaterOrEqual(t, l.Workspace, uint64(k.Grid)*groups*64*tokens*4)
			}
		}
	}
	assert.Len(t, seen, 2)
}

func TestWhereTheKernelForManyTokensIsNotUsed(t *testing.T) {
	for name, d := range devices {
		for _, mk := range matrices {
			for _, n := range []uint64{1, 64, 128, 129, 256, 512, 4096} {
				for _, p := range []plan.Problem{{}, {Invariant: true}, {Unaligned: true}} {
					p.M, p.K, p.N = mk[0], mk[1], n
					l, err := plan.ForLinear(d, p)
					require.NoError(t, err)
					if !l.Expand && l.Kernel.Entry == "zs_zipgemm_wide" {
						assert.Equal(t, 90, d.Capability, name)
						assert.False(t, p.Invariant || p.Unaligned || p.K%8 != 0 || n <= 128, "%s %+v", name, p)
					}
				}
			}
		}
	}
}
