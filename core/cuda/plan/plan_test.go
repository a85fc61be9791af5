// SPDX-License-Identifier: Apache-2.0

package plan_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/zipserv/zipserv/core/cuda/plan"
)

// One device for each size of shared memory that there is.
var devices = map[string]plan.Device{
	"A100":     {Capability: 80, SMs: 108, SmemBlock: 166912, SmemSM: 167936, Bandwidth: 2.04e12, ClockHz: 1.41e9},
	"A6000":    {Capability: 86, SMs: 84, SmemBlock: 101376, SmemSM: 102400, Bandwidth: 0.768e12, ClockHz: 1.8e9},
	"L40S":     {Capability: 89, SMs: 142, SmemBlock: 101376, SmemSM: 102400, Bandwidth: 0.864e12, ClockHz: 2.5e9},
	"H200":     {Capability: 90, SMs: 132, SmemBlock: 232448, SmemSM: 233472, Bandwidth: 4.9e12, ClockHz: 1.98e9},
	"B200":     {Capability: 100, SMs: 148, SmemBlock: 232448, SmemSM: 233472, Bandwidth: 8e12, ClockHz: 1.9e9},
	"RTX 5090": {Capability: 120, SMs: 170, SmemBlock: 101376, SmemSM: 102400, Bandwidth: 1.79e12, ClockHz: 2.4e9},
	"untold":   {Capability: 90, SMs: 16, SmemBlock: 232448, SmemSM: 233472},
}

var matrices = [][2]uint64{{1, 1}, {64, 64}, {1000, 777}, {4096, 4096}, {4608, 3584}, {28672, 4096}, {4096, 14336}, {128256, 4096}, {1, 1 << 20}, {1 << 20, 1}}

func define(t *testing.T, k plan.Kernel, name string) (value int) {
	t.Helper()
	for _, d := range k.Defines {
		if rest, found := strings.CutPrefix(d, name+"="); found {
			_, err := fmt.Sscan(rest, &value)
			require.NoError(t, err)
			return value
		}
	}
	t.Fatalf("%s is not defined by %v", name, k.Defines)
	return 0
}

// What a kernel can be launched with, whatever the shape and the device.
func checkKernel(t *testing.T, d plan.Device, k plan.Kernel) {
	t.Helper()
	assert.NotEmpty(t, k.Entry)
	assert.Positive(t, k.Grid)
	assert.LessOrEqual(t, int(k.Smem), d.SmemBlock)
	assert.Positive(t, k.Block)
	assert.LessOrEqual(t, k.Block, uint32(1024))
	assert.Zero(t, k.Block%32)
}

func TestEveryPlanFitsItsDevice(t *testing.T) {
	for name, d := range devices {
		for _, mk := range matrices {
			for _, n := range []uint64{1, 2, 8, 9, 33, 64, 65, 100, 512, 8192} {
				for _, p := range []plan.Problem{{}, {Invariant: true}} {
					p.M, p.K, p.N = mk[0], mk[1], n
					l, err := plan.ForLinear(d, p)
					require.NoError(t, err)
					label := fmt.Sprintf("%s %+v", name, p)
					if l.Expand {
						assert.False(t, p.Invariant, label)
						continue
					}
					checkKernel(t, d, l.Kernel)
					assert.LessOrEqual(t, l.Kernel.Grid, uint32(d.SMs)*l.Kernel.Resident, label)
					assert.LessOrEqual(t, int(l.Kernel.Resident*(l.Kernel.Smem+1024)), d.SmemSM, label)
					assert.Less(t, l.Workspace, uint64(64<<20), label)
					tokens := min(n, l.Tokens)
					if forMany(l) { // a block has one tile of tokens at a time
						tokens = uint64(define(t, l.Kernel, "ZS_N"))
					}
					assert.GreaterOrEqual(t, l.Workspace, uint64(l.Kernel.Grid)*64*4*tokens, label)
				}
			}
			checkKernel(t, d, plan.Decompress(d, mk[0], mk[1]))
			checkKernel(t, d, plan.Gather(d, mk[0] > 64))
			c := plan.Compress(d, mk[0], mk[1])
			for _, k := range []plan.Kernel{c.Sample, c.Write} {
				checkKernel(t, d, k)
			}
			assert.Equal(t, uint32(min(plan.Tiles(mk[0], mk[1]), 1024)), c.Samples)
			assert.Less(t, c.Sample.Grid, uint32(1<<12), "the sums of the samples are packed")
			assert.GreaterOrEqual(t, plan.CompressScratch(mk[0], mk[1]), 32+8*uint64(c.Write.Grid))
			assert.Less(t, uint64(c.Write.Grid-1)*uint64(c.Write.Block/32-1), plan.Tiles(mk[0], mk[1]), "no block without work")
		}
	}
}

// The sums of a token follow from the layout and the grid. Both must be the same for every N, or the batch would show: always in the batch-invariant
// mode, else for up to 32 tokens.
func TestTheOrderOfSumsDoesNotDependOnN(t *testing.T) {
	for name, d := range devices {
		for _, mk := range matrices {
			var first plan.Linear
			for i := uint64(0); i < 600; i++ {
				n, invariant := i/2+1, i%2 == 0
				l, err := plan.ForLinear(d, plan.Problem{M: mk[0], K: mk[1], N: n, Invariant: invariant})
				require.NoError(t, err)
				if i == 0 {
					first = l
				}
				label := fmt.Sprintf("%s %v N=%d", name, mk, n)
				if !invariant && n > 64 && (l.Expand || n > 128 && forMany(l)) {
					continue
				}
				require.False(t, l.Expand, label)
				require.Equal(t, first.Kernel.Entry, l.Kernel.Entry, label)
				if invariant || n <= 32 {
					require.Equal(t, first.Kernel.Grid, l.Kernel.Grid, label)
					for _, layout := range []string{"ZS_MW", "ZS_KW"} {
						require.Equal(t, define(t, first.Kernel, layout), define(t, l.Kernel, layout), label)
					}
					require.NotContains(t, l.Kernel.Defines, "ZS_IN_STEP=1", label)
					require.NotContains(t, l.Kernel.Defines, "ZS_ANYWHERE_LEAD=1", label)
				}
				require.GreaterOrEqual(t, define(t, l.Kernel, "ZS_N"), int(min(n, l.Tokens)), label)
			}
		}
	}
}

// What measured best (docs/performance.md, "Two strips a block").
func TestLayoutsOfWgmma(t *testing.T) {
	for _, c := range []struct{ m, k, n, mw, grid uint64 }{
		{28672, 4096, 128, 2, 112}, {57344, 8192, 128, 2, 128}, {37888, 3584, 128, 2, 132}, {14336, 4096, 128, 2, 112}, {8192, 28672, 128, 2, 128},
		{14336, 5120, 128, 2, 112}, {5120, 27648, 128, 2, 120}, {65536, 5120, 128, 2, 128}, {7168, 16384, 128, 2, 112},
		{6144, 4096, 128, 1, 128}, {8192, 8192, 128, 1, 128}, {10240, 8192, 128, 1, 128}, {4096, 4096, 128, 1, 128}, {4096, 14336, 128, 1, 128},
		{28672, 4096, 64, 2, 112}, {14336, 4096, 64, 2, 112}, {8192, 28672, 64, 1, 128}, {4096, 4096, 64, 1, 128}, {28672, 4096, 32, 1, 132},
	} {
		l, err := plan.ForLinear(devices["H200"], plan.Problem{M: c.m, K: c.k, N: c.n})
		require.NoError(t, err)
		label := fmt.Sprintf("%d x %d, %d tokens", c.m, c.k, c.n)
		assert.Equal(t, int(c.mw), define(t, l.Kernel, "ZS_MW"), label)
		assert.Equal(t, uint32(c.grid), l.Kernel.Grid, label)
	}
}

func TestFewTokensAreFusedManyAreNot(t *testing.T) {
	for name, d := range devices {
		for _, mk := range [][2]uint64{{4096, 4096}, {28672, 4096}} {
			crossed := uint64(0)
			for n := uint64(1); n <= 8192; n *= 2 {
				l, err := plan.ForLinear(d, plan.Problem{M: mk[0], K: mk[1], N: n})
				require.NoError(t, err)
				if n <= 64 {
					assert.False(t, l.Expand, "%s %v N=%d: one pass over the compressed weight beats two over the raw one", name, mk, n)
				}
				many := l.Expand || forMany(l)
				if many && crossed == 0 {
					crossed = n
				}
				assert.Equal(t, crossed > 0, many, "%s %v N=%d: there is one crossing", name, mk, n)
			}
			assert.NotZero(t, crossed, "%s %v", name, mk)
		}
	}
}

func TestClassesCoverEveryN(t *testing.T) {
	last := uint64(0)
	for n := uint64(1); n <= 1000; n++ {
		c := plan.Class(n)
		assert.GreaterOrEqual(t, c, n)
		assert.GreaterOrEqual(t, c, last)
		assert.Equal(t, c, plan.Class(c), "a class stands for itself")
		last = c
	}
}

func TestTheH200sPlans(t *testing.T) {
	d := devices["H200"]
	l, err := plan.ForLinear(d, plan.Problem{M: 4096, K: 4096, N: 5})
	require.NoError(t, err)
	assert.Equal(t, "zipgemm_wgmma.cu", l.Kernel.Source)
	assert.Equal(t, 8, define(t, l.Kernel, "ZS_N"))
	assert.EqualValues(t, 8, l.TensorRows)
	assert.EqualValues(t, 128, l.Kernel.Grid, "two blocks a strip: no longer than 132 uneven shares, and fewer partial sums")
	large, err := plan.ForLinear(d, plan.Problem{M: 28672, K: 4096, N: 5})
	require.NoError(t, err)
	assert.EqualValues(t, 132, large.Kernel.Grid, "every SM has a share")
	for _, p := range []plan.Problem{{M: 4096, K: 4097, N: 5}, {M: 4096, K: 4096, N: 5, Unaligned: true}} {
		l, err = plan.ForLinear(d, p)
		require.NoError(t, err)
		assert.Equal(t, "zipgemm_mma.cu", l.Kernel.Source, "tensor copies want rows at multiples of 16 bytes")
		assert.Zero(t, l.TensorRows)
	}
	small, err := plan.ForLinear(d, plan.Problem{M: 64, K: 64, N: 5})
	require.NoError(t, err)
	assert.EqualValues(t, 1, small.Kernel.Grid, "no block without work")
}

// measuredGrids are the ratios to cuBLAS of a product with so many blocks.
type measuredGrids struct {
	m, k, n uint64
	x       map[uint32]float64
}

// gridsNearBest checks that a device's plans take numbers of blocks that have been measured, and reach that share of the best.
func gridsNearBest(t *testing.T, d plan.Device, share float64, list []measuredGrids) {
	t.Helper()
	for _, c := range list {
		l, err := plan.ForLinear(d, plan.Problem{M: c.m, K: c.k, N: c.n})
		require.NoError(t, err)
		nearBest(t, c.x, l.Kernel.Grid, share, fmt.Sprintf("%d x %d, %d tokens", c.m, c.k, c.n))
	}
}

// The numbers of blocks that an H100 measured (docs/performance.md, "What is not multiplication" with Gaussian weights, "In step" with trained-like ones), with the ratio to
// cuBLAS of each.
func TestGridsForManyDecodedTokens(t *testing.T) {
	gridsNearBest(t, h100, 0.95, []measuredGrids{
		{4608, 3584, 128, map[uint32]float64{132: 0.939, 128: 0.961, 126: 0.977, 72: 0.888}},
		{5120, 4096, 128, map[uint32]float64{132: 1.021, 128: 1.047, 126: 1.029, 80: 0.996}},
		{5120, 5120, 128, map[uint32]float64{132: 1.067, 128: 1.064, 126: 1.039, 80: 0.989}},
		{6144, 4096, 128, map[uint32]float64{132: 1.076, 128: 1.098, 126: 1.040, 96: 1.083}},
		{6144, 5120, 128, map[uint32]float64{132: 1.034, 128: 1.103, 126: 1.057, 96: 1.094}},
		{7168, 5120, 128, map[uint32]float64{132: 1.086, 128: 1.110, 126: 1.102, 112: 1.178}},
		{10240, 8192, 128, map[uint32]float64{132: 1.175, 128: 1.176, 126: 1.150, 80: 0.847}},
		{7168, 16384, 128, map[uint32]float64{132: 1.281, 112: 1.305}},
		{28672, 4096, 128, map[uint32]float64{132: 1.231, 112: 1.238}},
		{37888, 3584, 128, map[uint32]float64{132: 1.279, 119: 1.18}},
		{55296, 5120, 128, map[uint32]float64{132: 1.193, 128: 1.245}},
		{6144, 4096, 64, map[uint32]float64{128: 1.277, 96: 1.262}},
		{6144, 5120, 64, map[uint32]float64{128: 1.320, 96: 1.257}},
		{7168, 16384, 64, map[uint32]float64{132: 1.495, 112: 1.505}},
		{28672, 4096, 64, map[uint32]float64{132: 1.446, 112: 1.459}},
	})
}

// The same of an H200, at 64 tokens.
func TestGridsFor64DecodedTokens(t *testing.T) {
	gridsNearBest(t, devices["H200"], 0.98, []measuredGrids{
		{4096, 4096, 64, map[uint32]float64{132: 1.016, 128: 1.093, 126: 1.017, 120: 1.005, 96: 0.977}},
		{6144, 4096, 64, map[uint32]float64{132: 1.088, 128: 1.101, 126: 1.104, 120: 1.064, 96: 1.038}},
		{4608, 3584, 64, map[uint32]float64{132: 0.925, 128: 0.951, 126: 0.949, 120: 0.933, 72: 0.839}},
		{3584, 3584, 64, map[uint32]float64{132: 0.903, 128: 0.908, 126: 0.909, 112: 0.993}},
		{5120, 4096, 64, map[uint32]float64{132: 0.991, 128: 1.017, 126: 1.029, 120: 1.005, 80: 0.912}},
		{5120, 5120, 64, map[uint32]float64{132: 1.036, 128: 1.049, 126: 1.031, 120: 1.019, 80: 0.899}},
		{6144, 5120, 64, map[uint32]float64{132: 1.101, 128: 1.128, 126: 1.115, 120: 1.077, 96: 1.039}},
		{7168, 2048, 64, map[uint32]float64{132: 0.978, 128: 0.959, 126: 0.958, 112: 1.044}},
		{7168, 5120, 64, map[uint32]float64{132: 1.097, 128: 1.097, 126: 1.094, 112: 1.097}},
		{10240, 8192, 64, map[uint32]float64{132: 1.063, 128: 1.070, 126: 1.054, 120: 1.018}},
		{55296, 5120, 64, map[uint32]float64{132: 1.065, 128: 1.045, 126: 1.024}},
		{37888, 3584, 64, map[uint32]float64{132: 1.087, 128: 1.057, 126: 1.051}},
	})
}

// For up to 32 tokens, which share a grid (TestTheOrderOfSumsDoesNotDependOnN).
func TestGridsForFewDecodedTokens(t *testing.T) {
	gridsNearBest(t, devices["H200"], 0.98, []measuredGrids{
		{4608, 3584, 8, map[uint32]float64{132: 1.104, 126: 1.135}},
		{5120, 4096, 8, map[uint32]float64{132: 1.092, 128: 1.205}},
		{6144, 4096, 8, map[uint32]float64{132: 1.240, 130: 1.256, 128: 1.257, 126: 1.242}},
		{5120, 5120, 8, map[uint32]float64{132: 1.188, 130: 1.217, 128: 1.211, 126: 1.203}},
		{6144, 4096, 32, map[uint32]float64{132: 1.204, 130: 1.216, 128: 1.226, 126: 1.214}},
		{5120, 5120, 32, map[uint32]float64{132: 1.150, 130: 1.172, 128: 1.171, 126: 1.158}},
	})
}

// Equal whole runs leave no more than a tenth of the GPU idle.
func TestGridsAreNearlyTheWholeGPU(t *testing.T) {
	for m := uint64(1024); m <= 16384; m += 128 {
		for k := uint64(512); k <= 8192; k += 128 {
			for _, n := range []uint64{8, 64, 128} {
				strips := (m + 63) / 64
				l, err := plan.ForLinear(devices["H200"], plan.Problem{M: m, K: k, N: n})
				require.NoError(t, err)
				if grid := uint64(l.Kernel.Grid); grid%strips != 0 && strips%grid != 0 && 2*strips%grid != 0 && define(t, l.Kernel, "ZS_MW") == 1 {
					require.GreaterOrEqual(t, grid, uint64(119), "%d x %d, %d tokens", m, k, n)
				}
			}
		}
	}
}

// Where there are so many tokens that sums are waited for, one strip a block.
func TestWhereRunsThatBeginAnywhereHaveALead(t *testing.T) {
	for _, c := range []struct {
		p    plan.Problem
		want bool
	}{
		{plan.Problem{M: 4608, K: 3584, N: 32}, false}, {plan.Problem{M: 4608, K: 3584, N: 33}, true}, {plan.Problem{M: 4608, K: 3584, N: 64}, true}, {plan.Problem{M: 4608, K: 3584, N: 65}, false},
		{plan.Problem{M: 4608, K: 3584, N: 64, Invariant: true}, false}, {plan.Problem{M: 28672, K: 4096, N: 64, Gated: true}, false}, {plan.Problem{M: 4608, K: 3584, N: 64, Unaligned: true}, false},
	} {
		l, err := plan.ForLinear(devices["H200"], c.p)
		require.NoError(t, err)
		assert.Equal(t, c.want, slices.Contains(l.Kernel.Defines, "ZS_ANYWHERE_LEAD=1"), "%+v", c.p)
	}
}

// Blocks stay where the GPU would be full less than twice.
func TestGridsOfDecompress(t *testing.T) {
	for _, c := range []struct {
		m, k uint64
		want uint32
	}{{64, 64, 1}, {2112, 7168, 660}, {3584, 3584, 660}, {4096, 4096, 660}, {6144, 4096, 1536}, {28672, 4096, 7168}} {
		assert.Equal(t, c.want, plan.Decompress(h100, c.m, c.k).Grid, "%d x %d", c.m, c.k)
	}
}

func TestEveryPieceOfALookupHasItsThreads(t *testing.T) {
	for _, k := range []uint64{1, 64, 65, 4096, 5120, 1<<31 - 1} {
		most := plan.GatherTokens(k)
		for _, tokens := range []uint64{1, 7, 8192, most} {
			tokens = min(tokens, most)
			pieces, blocks := plan.GatherPieces(tokens, k)
			assert.Equal(t, tokens*((k+63)/64), pieces)
			assert.Less(t, pieces, uint64(1)<<32)
			threads := uint64(blocks) * uint64(plan.Gather(devices["H200"], false).Block)
			assert.GreaterOrEqual(t, threads, 4*pieces)
			assert.Less(t, threads-4*pieces, uint64(128), "no block without work")
		}
		assert.NotZero(t, most)
	}
}

func TestTooSmallAGPU(t *testing.T) {
	_, err := plan.ForLinear(plan.Device{Capability: 80, SMs: 8, SmemBlock: 16 << 10}, plan.Problem{M: 64, K: 64, N: 1})
	assert.ErrorContains(t, err, "16384 bytes of shared memory")
	_, err = plan.ForLinear(devices["H200"], plan.Problem{M: 64, K: 0, N: 1})
	assert.ErrorContains(t, err, "at least 1")
}

func TestBlocksOfCompression(t *testing.T) {
	for _, c := range []struct {
		device       string
		m            uint64
		block, perSM uint32
	}{{"H200", 4096, 160, 3}, {"H200", 25344, 416, 1}, {"H200", 25280, 160, 3}, {"L40S", 131072, 160, 1}} {
		k := plan.Compress(devices[c.device], c.m, 4096).Write
		assert.Equal(t, [2]uint32{c.block, c.perSM}, [2]uint32{k.Block, k.PerSM}, "%s, %d x 4096", c.device, c.m)
	}
}

func TestRoomForLists(t *testing.T) {
	few := plan.Compress(devices["H200"], 2048, 2048)
	room, certain := few.Room(2048, 2048, 12345, 1<<20)
	assert.EqualValues(t, 16*12345, room, "all tiles were sampled")
	assert.True(t, certain)

	many := plan.Compress(devices["H200"], 28672, 4096)
	for name, c := range map[string]struct {
		low, high uint64 // units of half of the samples each
		certain   bool
		spare     float64 // bytes a tile
	}{
		"all alike":     {7, 7, true, 0.5},
		"gaussian":      {6, 8, true, 3.5},
		"heavy tails":   {12, 28, true, 24.5},
		"torn in two":   {0, 256, false, 384.5},
		"no escapes":    {0, 0, true, 0.5},
		"nothing helps": {256, 256, true, 0.5},
	} {
		t.Run(name, func(t *testing.T) {
			room, certain := many.Room(28672, 4096, 512*(c.low+c.high), 512*(c.low*c.low+c.high*c.high))
			assert.Equal(t, c.certain, certain)
			assert.Zero(t, room%16)
			assert.InDelta(t, c.spare, float64(room)/28672-8*float64(c.low+c.high), 0.01)
		})
	}
}

// One layout for all tiles and both modes, or a pair's bits would depend on how many others there are; shared memory and workspace for it on every device.
func TestGroupedPlans(t *testing.T) {
	for name, d := range devices {
		for _, mk := range matrices {
			var layout string
			for _, tile := range plan.GroupedTiles {
				for _, invariant := range []bool{false, true} {
					gated, err := plan.Grouped(d, mk[0], mk[1], min(tile, plan.GatedTile), invariant, true)
					require.NoError(t, err, name)
					checkKernel(t, d, gated.Kernel)
					assert.Zero(t, define(t, gated.Kernel, "ZS_MW")%2, "gates beside what they are for")
					l, err := plan.Grouped(d, mk[0], mk[1], tile, invariant, false)
					require.NoError(t, err, name)
					checkKernel(t, d, l.Kernel)
					mw, kw := define(t, l.Kernel, "ZS_MW"), define(t, l.Kernel, "ZS_KW")
					if layout == "" {
						layout = fmt.Sprint(mw, kw)
					}
					assert.Equal(t, layout, fmt.Sprint(mw, kw))
					assert.Equal(t, int(tile), define(t, l.Kernel, "ZS_N"))
					assert.Equal(t, invariant, define(t, l.Kernel, "ZS_WHOLE") == 1)
					assert.Equal(t, uint32(d.SMs), l.Kernel.Grid, "all blocks that are resident at once, whatever the work")
					assert.Equal(t, uint64(l.Kernel.Grid)*uint64(mw)*64*tile*4, l.Workspace)
				}
			}
		}
		checkKernel(t, d, plan.Route(d))
		checkKernel(t, d, plan.Combine(d))
	}
	for _, wrong := range []uint64{0, 4, 12, 128} {
		_, err := plan.Grouped(devices["H200"], 64, 64, wrong, false, false)
		require.ErrorContains(t, err, "at a time")
	}
	_, err := plan.Grouped(devices["H200"], 0, 64, 8, false, false)
	require.Error(t, err)
	assert.Equal(t, uint32(1), plan.CombineBlocks(1024))
	assert.Equal(t, uint32(2), plan.CombineBlocks(1025))
	assert.Equal(t, uint64(16), plan.RoutingWords(2))
}
