// SPDX-License-Identifier: Apache-2.0

package plan_test

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/zipserv/zipserv/core/cuda/plan"
)

func TestEveryCandidateCanBeChosen(t *testing.T) {
	for name, d := range devices {
		for _, mk := range matrices {
			for _, n := range []uint64{1, 16, 17, 64, 65, 128, 129, 4096} {
				for _, p := range []plan.Problem{{}, {Invariant: true}} {
					p.M, p.K, p.N = mk[0], mk[1], n
					list, err := plan.Candidates(d, p)
					require.NoError(t, err)
					usual, err := plan.ForLinear(d, p)
					require.NoError(t, err)
					for i, c := range list {
						l, err := plan.Chosen(d, p, c)
						require.NoError(t, err, "%s %+v %s", name, p, c)
						if i == 0 {
							assert.Equal(t, usual, l, "the first is what is done without a choice")
						}
						assert.NotContains(t, list[:i], c, "each once")
						if l.Expand {
							assert.False(t, p.Invariant)
							continue
						}
						checkKernel(t, d, l.Kernel)
						assert.LessOrEqual(t, int(l.Kernel.Grid), d.SMs, "all blocks at once")
						if c.Kernel == plan.Relay {
							assert.False(t, p.Invariant)
							assert.Equal(t, uint64(l.Kernel.Grid)*2*64*256*4, l.Flags)
							pairs := (p.M + 127) / 128
							assert.Equal(t, l.Flags+4*(32+pairs*((p.K+63)/64)), l.Workspace, "a flag for each pair of strips and column of tiles")
							assert.Equal(t, pairs*2*((p.K+63)/64)*8192, l.Scratch)
							continue
						}
						assert.Zero(t, l.Scratch)
						if c.Kernel == plan.Pair || c.Kernel == plan.Solo {
							assert.False(t, p.Invariant)
							assert.Equal(t, uint64(l.Kernel.Grid)*uint64(define(t, l.Kernel, "ZS_N"))*2*64*4, l.Workspace)
							continue
						}
						assert.Equal(t, uint64(l.Kernel.Grid)*uint64(define(t, l.Kernel, "ZS_MW"))*64*l.Tokens*4, l.Workspace)
					}
				}
			}
		}
	}
}

func TestAChoiceThatCannotBeIsRefused(t *testing.T) {
	d := devices["H200"]
	few := plan.Problem{M: 4096, K: 4096, N: 1}
	for _, c := range []plan.Choice{
		{}, {Kernel: "nothing"}, {Kernel: "mma"}, {Kernel: "mma", MW: 2, KW: 4}, {Kernel: "mma", MW: 2, KW: 4, Blocks: 133},
		{Kernel: "mma", MW: 16, KW: 16, Blocks: 1}, {Kernel: "wgmma", MW: 2, KW: 2, Blocks: 8}, {Kernel: "mma", MW: -2, KW: -4, Blocks: 1},
	} {
		_, err := plan.Chosen(d, few, c)
		assert.Error(t, err, "%+v", c)
	}
	many := few
	many.N = 64
	_, err := plan.Chosen(d, many, plan.Choice{Kernel: "mma", MW: 2, KW: 6, Blocks: 100})
	assert.ErrorContains(t, err, "no layout for 64 tokens", "twelve warps have no room for these")
	few.Invariant = true
	_, err = plan.Chosen(d, few, plan.Choice{Kernel: "mma", MW: 2, KW: 6, Blocks: 100})
	assert.Error(t, err, "a layout for every N has to serve 64")
	_, err = plan.Chosen(d, few, plan.Choice{Kernel: plan.Expanded})
	assert.ErrorContains(t, err, "batch-invariant")
	_, err = plan.Chosen(d, plan.Problem{}, plan.Choice{Kernel: plan.Expanded})
	assert.Error(t, err)
	_, err = plan.Candidates(d, plan.Problem{})
	assert.Error(t, err)
}

// staysItself: the plan of a choice has its blocks, and is recognised as that choice.
func staysItself(t *testing.T, d plan.Device, p plan.Problem, c plan.Choice) {
	t.Helper()
	l, err := plan.Chosen(d, p, c)
	require.NoError(t, err)
	assert.Equal(t, c.Blocks, l.Kernel.Grid)
	same, err := plan.ChoiceOf(l)
	require.NoError(t, err)
	assert.Equal(t, c, same)
}

func TestChoicesOfTheKernelThatDecodesOnce(t *testing.T) {
	d := devices["H200"]
	many := plan.Problem{M: 4096, K: 4096, N: 2048}
	for _, c := range []plan.Choice{
		{Kernel: "relay"}, {Kernel: "relay", MW: 3, KW: 1, Blocks: 132}, {Kernel: "relay", MW: 2, KW: 2, Blocks: 132}, {Kernel: "relay", MW: 2, KW: 1, Blocks: 131},
		{Kernel: "relay", MW: 2, KW: 1, Blocks: 134}, {Kernel: "relay", MW: 2, KW: 1},
	} {
		_, err := plan.Chosen(d, many, c)
		assert.Error(t, err, "%+v", c)
	}
	c := plan.Choice{Kernel: "relay", MW: 2, KW: 1, Blocks: 100}
	staysItself(t, d, many, c)
	for name, p := range map[string]plan.Problem{
		"invariant": {M: 4096, K: 4096, N: 2048, Invariant: true}, "unaligned": {M: 4096, K: 4096, N: 2048, Unaligned: true}, "ragged rows": {M: 4096, K: 4100, N: 2048},
		"few tokens": {M: 4096, K: 4096, N: 128}, "more scratch memory than it may ask for": {M: 1 << 20, K: 4096, N: 2048},
	} {
		_, err := plan.Chosen(d, p, c)
		assert.ErrorContains(t, err, "no layout", name)
	}
}

func TestChoicesOfTheKernelForManyTokens(t *testing.T) {
	d := devices["H200"]
	many := plan.Problem{M: 4096, K: 4096, N: 512}
	for _, c := range []plan.Choice{
		{Kernel: "pair"}, {Kernel: "pair", MW: 4, KW: 4, Blocks: 132}, {Kernel: "pair", MW: 2, KW: 5, Blocks: 132}, {Kernel: "pair", MW: 2, KW: 4, Blocks: 131},
		{Kernel: "pair", MW: 2, KW: 4, Blocks: 134}, {Kernel: "pair", MW: 2, KW: 2, Blocks: 0},
		{Kernel: "solo"}, {Kernel: "solo", MW: 2, KW: 2, Blocks: 132}, {Kernel: "solo", MW: 2, KW: 4, Blocks: 133}, {Kernel: "solo", MW: 2, KW: 3, Blocks: 0},
	} {
		_, err := plan.Chosen(d, many, c)
		assert.Error(t, err, "%+v", c)
	}
	c, between := plan.Choice{Kernel: "pair", MW: 2, KW: 2, Blocks: 100}, plan.Choice{Kernel: "pair", MW: 2, KW: 3, Blocks: 100}
	solo, other := plan.Choice{Kernel: "solo", MW: 2, KW: 4, Blocks: 101}, plan.Choice{Kernel: "solo", MW: 2, KW: 3, Blocks: 101}
	staysItself(t, d, many, c)
	staysItself(t, d, many, between)
	staysItself(t, d, many, solo)
	staysItself(t, d, many, other)
	for name, p := range map[string]plan.Problem{
		"invariant": {M: 4096, K: 4096, N: 512, Invariant: true}, "unaligned": {M: 4096, K: 4096, N: 512, Unaligned: true}, "ragged rows": {M: 4096, K: 4100, N: 512},
		"few tokens": {M: 4096, K: 4096, N: 128},
	} {
		for _, one := range []plan.Choice{c, between, solo, other} {
			_, err := plan.Chosen(d, p, one)
			assert.ErrorContains(t, err, "no layout", name)
		}
		list, err := plan.Candidates(d, p)
		require.NoError(t, err)
		for _, other := range list {
			assert.NotContains(t, []string{plan.Pair, plan.Solo}, other.Kernel, name)
		}
	}
	_, err := plan.Chosen(devices["B200"], many, c)
	assert.ErrorContains(t, err, "compute capability 10.0")
	// The least number of tokens of a bucket may have less work than its choice has blocks: those without a tile do nothing.
	l, err := plan.Chosen(d, plan.Problem{M: 64, K: 64, N: 320}, plan.Choice{Kernel: "pair", MW: 2, KW: 4, Blocks: 132})
	require.NoError(t, err)
	assert.EqualValues(t, 132, l.Kernel.Grid)
	assert.EqualValues(t, 132*2*64*256*4, l.Workspace)
}

// In the batch-invariant mode a choice gives every number of tokens the same layout and grid.
func TestAnInvariantChoiceDoesNotDependOnTheTokens(t *testing.T) {
	for _, d := range devices {
		for _, mk := range matrices {
			list, err := plan.Candidates(d, plan.Problem{M: mk[0], K: mk[1], N: 1, Invariant: true})
			require.NoError(t, err)
			for _, n := range []uint64{2, 8, 9, 31, 64, 65, 1000, 8192} {
				same, err := plan.Candidates(d, plan.Problem{M: mk[0], K: mk[1], N: n, Invariant: true})
				require.NoError(t, err)
				require.Equal(t, list, same)
				for _, c := range list {
					one, err := plan.Chosen(d, plan.Problem{M: mk[0], K: mk[1], N: 1, Invariant: true}, c)
					require.NoError(t, err)
					all, err := plan.Chosen(d, plan.Problem{M: mk[0], K: mk[1], N: n, Invariant: true}, c)
					require.NoError(t, err)
					for _, name := range []string{"ZS_MW", "ZS_KW"} {
						assert.Equal(t, define(t, one.Kernel, name), define(t, all.Kernel, name))
					}
					assert.Equal(t, one.Kernel.Grid, all.Kernel.Grid)
					assert.NotContains(t, all.Kernel.Defines, "ZS_IN_STEP=1")
					assert.NotContains(t, all.Kernel.Defines, "ZS_ANYWHERE_LEAD=1")
				}
			}
		}
	}
}

func TestBuckets(t *testing.T) {
	for n, want := range map[uint64]uint64{1: 16, 8: 16, 16: 16, 17: 32, 33: 64, 64: 64, 65: 128, 129: 192, 193: 256, 257: 384, 400: 512, 700: 768, 769: 1024, 1025: 2048, 1200: 2048, 4097: 8192, 8192: 8192, 1 << 40: 8192} {
		assert.Equal(t, want, plan.Bucket(n), n)
	}
	last := uint64(0)
	for n := uint64(1); n < 10000; n++ {
		b := plan.Bucket(n)
		assert.GreaterOrEqual(t, b, last)
		assert.Equal(t, b, plan.Bucket(min(plan.Class(n), 8192)), "tokens of one class share a plan, so they have one bucket")
		last = b
	}
}

// wgmmaLead is ZS_LEAD of zipgemm_wgmma (TestPlansAgreeWithTheSources); the kernels over mma.sync have none.
const wgmmaLead = 2

// runs are the first units of each block as gemm.cuh deals them, and their end: with a lead where the kernel has one, and one where they begin anywhere.
func runs(groups, steps, grid, lead, anywhere uint64) (starts []uint64) {
	if lead == 0 {
		for b := range grid + 1 {
			starts = append(starts, groups*steps*b/grid)
		}
		return starts
	}
	span, sharers := groups*steps, grid
	even := span
	whole := grid > groups && grid%groups == 0
	if whole {
		span, sharers = steps, grid/groups
		even = span
		if span >= 4*lead*sharers {
			even -= lead
		}
	}
	run, longer := even/sharers, even%sharers
	before := uint64(0)
	for b := range grid + 1 {
		set, at := b/sharers, b%sharers
		start := set*span + at*run
		if at > sharers-longer {
			start += at - (sharers - longer)
		}
		first := start
		if !whole && run >= 4*lead && start%steps > 0 && before/steps == start/steps {
			first -= anywhere
		}
		starts, before = append(starts, first), start
	}
	return starts
}

// By that rule every unit is some block's, and every block has one.
func TestRunsAreAPartition(t *testing.T) {
	for _, lead := range [][2]uint64{{0, 0}, {wgmmaLead, 0}, {wgmmaLead, 1}} {
		for groups := uint64(1); groups < 40; groups += 3 {
			for steps := uint64(1); steps < 70; steps += 3 {
				for grid := uint64(1); grid <= min(132, groups*steps); grid++ {
					starts := runs(groups, steps, grid, lead[0], lead[1])
					require.Equal(t, uint64(0), starts[0])
					require.Equal(t, groups*steps, starts[grid])
					for b := range grid {
						if starts[b] >= starts[b+1] { // a million times, so not by require
							t.Fatalf("%d groups of %d, %d blocks, lead %v: block %d has no units", groups, steps, grid, lead, b)
						}
					}
				}
			}
		}
	}
}

func TestSplitGivesEveryStripThatManyBlocks(t *testing.T) {
	d := devices["H200"]
	for _, mk := range matrices {
		p := plan.Problem{M: mk[0], K: mk[1], N: 8}
		for shares := uint64(1); shares < 200; shares++ {
			c, err := plan.Split(d, p, shares)
			if err != nil {
				assert.Greater(t, shares, uint64(1), "one share is always possible")
				assert.ErrorContains(t, err, "at most")
				break
			}
			l, err := plan.Chosen(d, p, c)
			require.NoError(t, err)
			strips, tiles := (p.M+63)/64, (p.K+63)/64
			groups := (strips + uint64(c.MW) - 1) / uint64(c.MW)
			steps := (tiles + uint64(c.KW) - 1) / uint64(c.KW)
			lead := uint64(0)
			if c.Kernel == "wgmma" {
				lead = wgmmaLead
			}
			starts := runs(groups, steps, uint64(l.Kernel.Grid), lead, 0)
			for g := range groups {
				blocks := uint64(0)
				for b := range len(starts) - 1 {
					if starts[b] < (g+1)*steps && starts[b+1] > g*steps {
						blocks++
					}
				}
				require.Equal(t, shares, blocks, "%d x %d in %d shares, group %d", p.M, p.K, shares, g)
			}
		}
	}
	_, err := plan.Split(d, plan.Problem{M: 4096, K: 4096, N: 1}, 0)
	assert.Error(t, err)
	c, err := plan.Split(d, plan.Problem{M: 4096, K: 4096, N: 1}, 8)
	require.NoError(t, err)
	assert.Equal(t, uint32(128), c.Blocks, "sixteen groups of four strips")
}
