// SPDX-License-Identifier: Apache-2.0

package plan_test

import (
	"fmt"
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
	case l.Kernel.Entry == "zs_zipgemm_relay":
		return "relay"
	}
	return "few"
}

// What an H100 measured (docs/performance.md, "Which way for how many tokens"; speed-up over cuBLAS's product with the uncompressed weight, in the same turns). The
// chosen way must be among the best.
func TestManyTokensAreSolvedInTheFastestWay(t *testing.T) {
	for _, c := range []struct {
		m, k, n uint64
		x       map[string]float64
	}{
		{4096, 4096, 256, map[string]float64{"few": 0.595, "expand": 0.504, "wide 2": 0.517, "wide 3": 0.624, "relay": 0.359}},
		{4096, 4096, 512, map[string]float64{"few": 0.394, "expand": 0.549, "wide 2": 0.603, "wide 3": 0.554, "relay": 0.467}},
		{4096, 4096, 1024, map[string]float64{"expand": 0.688, "wide 2": 0.696, "wide 3": 0.555, "relay": 0.796}},
		{4096, 4096, 2048, map[string]float64{"expand": 0.820, "wide 2": 0.632, "wide 3": 0.540, "relay": 0.887}},
		{4096, 4096, 4096, map[string]float64{"expand": 0.910, "wide 2": 0.685, "wide 3": 0.573, "relay": 0.944}},
		{4096, 4096, 8192, map[string]float64{"expand": 0.957, "wide 2": 0.693, "wide 3": 0.562, "relay": 0.960}},
		{6144, 4096, 256, map[string]float64{"few": 0.548, "expand": 0.438, "wide 2": 0.524, "wide 3": 0.641, "relay": 0.405}},
		{6144, 4096, 512, map[string]float64{"few": 0.422, "expand": 0.550, "wide 2": 0.610, "wide 3": 0.637, "relay": 0.595}},
		{6144, 4096, 1024, map[string]float64{"expand": 0.706, "wide 2": 0.641, "wide 3": 0.558, "relay": 0.727}},
		{6144, 4096, 2048, map[string]float64{"expand": 0.814, "wide 2": 0.685, "wide 3": 0.553, "relay": 0.923}},
		{6144, 4096, 4096, map[string]float64{"expand": 0.909, "wide 2": 0.695, "wide 3": 0.594, "relay": 0.944}},
		{6144, 4096, 8192, map[string]float64{"expand": 0.952, "wide 2": 0.724, "wide 3": 0.606, "relay": 0.988}},
		{4096, 14336, 256, map[string]float64{"few": 0.734, "expand": 0.449, "wide 2": 0.745, "wide 3": 0.712, "relay": 0.468}},
		{4096, 14336, 512, map[string]float64{"few": 0.524, "expand": 0.536, "wide 2": 0.673, "wide 3": 0.568, "relay": 0.633}},
		{4096, 14336, 1024, map[string]float64{"expand": 0.691, "wide 2": 0.709, "wide 3": 0.538, "relay": 0.868}},
		{4096, 14336, 2048, map[string]float64{"expand": 0.820, "wide 2": 0.620, "wide 3": 0.523, "relay": 0.950}},
		{4096, 14336, 4096, map[string]float64{"expand": 0.893, "wide 2": 0.707, "wide 3": 0.565, "relay": 0.978}},
		{4096, 14336, 8192, map[string]float64{"expand": 0.946, "wide 2": 0.710, "wide 3": 0.549, "relay": 0.971}},
		{28672, 4096, 256, map[string]float64{"few": 0.652, "expand": 0.418, "wide 2": 0.825, "wide 3": 0.676, "relay": 0.511}},
		{28672, 4096, 512, map[string]float64{"few": 0.499, "expand": 0.538, "wide 2": 0.675, "wide 3": 0.553, "relay": 0.637}},
		{28672, 4096, 1024, map[string]float64{"expand": 0.693, "wide 2": 0.701, "wide 3": 0.605, "relay": 0.890}},
		{28672, 4096, 2048, map[string]float64{"expand": 0.867, "wide 2": 0.708, "wide 3": 0.579, "relay": 0.917}},
		{28672, 4096, 4096, map[string]float64{"expand": 0.912, "wide 2": 0.696, "wide 3": 0.575, "relay": 0.964}},
		{28672, 4096, 8192, map[string]float64{"expand": 0.951, "wide 2": 0.690, "wide 3": 0.548, "relay": 1.010}},
		{3584, 3584, 256, map[string]float64{"few": 0.550, "expand": 0.540, "wide 2": 0.393, "wide 3": 0.506, "relay": 0.320}},
		{3584, 3584, 512, map[string]float64{"few": 0.360, "expand": 0.570, "wide 2": 0.476, "wide 3": 0.474, "relay": 0.428}},
		{3584, 3584, 1024, map[string]float64{"expand": 0.681, "wide 2": 0.584, "wide 3": 0.486, "relay": 0.703}},
		{3584, 3584, 2048, map[string]float64{"expand": 0.824, "wide 2": 0.671, "wide 3": 0.545, "relay": 0.881}},
		{3584, 3584, 4096, map[string]float64{"expand": 0.894, "wide 2": 0.715, "wide 3": 0.573, "relay": 0.949}},
		{3584, 3584, 8192, map[string]float64{"expand": 0.944, "wide 2": 0.678, "wide 3": 0.531, "relay": 0.960}},
		{5120, 5120, 256, map[string]float64{"few": 0.578, "expand": 0.468, "wide 2": 0.670, "wide 3": 0.570, "relay": 0.409}},
		{5120, 5120, 512, map[string]float64{"few": 0.409, "expand": 0.537, "wide 2": 0.637, "wide 3": 0.526, "relay": 0.547}},
		{5120, 5120, 1024, map[string]float64{"expand": 0.694, "wide 2": 0.621, "wide 3": 0.505, "relay": 0.669}},
		{5120, 5120, 2048, map[string]float64{"expand": 0.818, "wide 2": 0.673, "wide 3": 0.530, "relay": 0.851}},
		{5120, 5120, 4096, map[string]float64{"expand": 0.905, "wide 2": 0.708, "wide 3": 0.545, "relay": 0.958}},
		{5120, 5120, 8192, map[string]float64{"expand": 0.924, "wide 2": 0.701, "wide 3": 0.556, "relay": 0.967}},
	} {
		l, err := plan.ForLinear(h100, plan.Problem{M: c.m, K: c.k, N: c.n})
		require.NoError(t, err)
		most := 0.0
		for _, x := range c.x {
			most = max(most, x)
		}
		x, measured := c.x[way(t, l)]
		assert.True(t, measured, "%d x %d, N = %d: %s", c.m, c.k, c.n, way(t, l))
		assert.GreaterOrEqual(t, x, most/1.075, "%d x %d, N = %d: %s", c.m, c.k, c.n, way(t, l))
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
					if !l.Expand && (l.Kernel.Entry == "zs_zipgemm_wide" || l.Kernel.Entry == "zs_zipgemm_relay") {
						assert.Equal(t, 90, d.Capability, name)
						assert.False(t, p.Invariant || p.Unaligned || p.K%8 != 0 || n <= 128, "%s %+v", name, p)
					}
				}
			}
		}
	}
}
