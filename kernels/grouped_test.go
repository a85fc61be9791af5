// SPDX-License-Identifier: Apache-2.0

package kernels_test

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"math"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/zipserv/zipserv/kernels"
	"github.com/zipserv/zipserv/kernels/emu"
)

// grouped is one compiled variant of the product over experts.
type grouped struct {
	program   *emu.Program
	n, mw, kw int
	gated     bool
}

func newGated(t *testing.T, files fs.FS, v variant) grouped {
	g := newGrouped(t, files, v, false, "ZS_GATED=1")
	g.gated = true
	return g
}

func newGrouped(t *testing.T, files fs.FS, v variant, whole bool, more ...string) grouped {
	t.Helper()
	define := "ZS_WHOLE=0"
	if whole {
		define = "ZS_WHOLE=1"
	}
	p, err := emu.Compile(emu.Source{Files: files, Main: "zipgemm_grouped.cu", Defines: append(append(v.defines(), define, fmt.Sprintf("ZS_HALF=%d", v.n/32)), more...), Kernels: []string{"zs_zipgemm_grouped"},
		Constants: []string{"ZS_THREADS", "ZS_GEMM_SMEM"}})
	require.NoError(t, err)
	return grouped{p, v.n, v.mw, v.kw, false}
}

// layer is the experts of a layer, tokens and where they are routed.
type layer struct {
	experts  []matrix
	ids      []int // of each pair, token * top + slot
	top      int
	byPair   bool // rows of x are pairs, else tokens
	x        []uint16
	m, k     int
	grid     int
	misalign bool
	seed     uint64
}

// routing is what zs_moe_route has to write (kernels/routing.cuh); ^0 where it writes nothing.
func routing(ids []int, top, experts, tile int) []uint32 {
	words := make([]uint32, 4+6*len(ids))
	for i := range words {
		words[i] = ^uint32(0)
	}
	items, at := 0, 0
	for e := range experts {
		first := at
		for p, id := range ids {
			if id == e {
				words[4+4*len(ids)+at], words[4+5*len(ids)+at] = uint32(p), uint32(p/top)
				at++
			}
		}
		for ; first < at; first += tile {
			copy(words[4+4*items:], []uint32{uint32(e), uint32(first), uint32(min(tile, at-first)), 0})
			items++
		}
	}
	words[0] = uint32(items)
	return words
}

func words32(v []uint32) []byte {
	var out []byte
	for _, w := range v {
		out = le.AppendUint32(out, w)
	}
	return out
}

// run returns y, pairs x m.
func (g grouped) run(l layer) ([]uint16, error) {
	var blobs [][]byte
	step := 0
	for _, e := range l.experts {
		blobs = append(blobs, encodeTiled(e))
		step = max(step, (len(blobs[len(blobs)-1])+255)/256*256)
	}
	all := bytes.Repeat([]byte{0xA5}, step*len(blobs))
	for i, b := range blobs {
		copy(all[i*step:], b)
	}
	m := l.m
	if g.gated {
		m /= 2
	}
	align := 16
	if l.misalign {
		align = 2
	}
	y := &emu.Buffer{Name: "y", Data: make([]byte, 2*len(l.ids)*m), Mode: emu.Out, Align: align, Dependent: true}
	workspace := &emu.Buffer{Name: "workspace", Data: bytes.Repeat([]byte{0xFF}, 4*l.grid*g.mw*64*g.n), Mode: emu.InOut, Dependent: true}
	byToken := 1
	if l.byPair {
		byToken = 0
	}
	_, err := g.program.Run(context.Background(), emu.Launch{
		Kernel: "zs_zipgemm_grouped", Grid: [3]int{l.grid}, Block: [3]int{g.program.Constant("ZS_THREADS")}, Shared: g.program.Constant("ZS_GEMM_SMEM"),
		Args: []any{
			&emu.Buffer{Name: "blobs", Data: all, Mode: emu.In}, step, &emu.Buffer{Name: "x", Data: halves(l.x), Mode: emu.In, Align: align, Dependent: true},
			byToken, y, l.m, l.k, &emu.Buffer{Name: "routing", Data: words32(routing(l.ids, l.top, len(l.experts), g.n)), Mode: emu.In, Dependent: true}, len(l.ids), workspace,
		},
		Seed: l.seed, PDL: true,
	})
	if err != nil {
		return nil, err
	}
	for i, b := range workspace.Data {
		if b != 0xFF {
			return nil, fmt.Errorf("byte %d of the workspace is not 0xFF after the launch", i)
		}
	}
	return fromHalves(y.Data), nil
}

// check compares with float64, as product.check; rows of pairs without an expert are untouched.
func (l layer) check(t *testing.T, y []uint16) {
	t.Helper()
	for p, id := range l.ids {
		for m := range l.m {
			got := y[p*l.m+m]
			if id < 0 || id >= len(l.experts) {
				require.Equal(t, uint16(0xFFFF), got, "pair %d has no expert, row %d", p, m)
				continue
			}
			var sum, magnitude float64
			row := p / l.top
			if l.byPair {
				row = p
			}
			for k := range l.k {
				v := fromBF16(l.x[row*l.k+k]) * fromBF16(l.experts[id].w[m*l.k+k])
				sum += v
				magnitude += math.Abs(v)
			}
			bound := math.Abs(sum)/256*1.01 + magnitude*math.Ldexp(float64(l.k)/16+16, -24) + math.Ldexp(1, -133)
			if diff := math.Abs(fromBF16(got) - sum); !(diff <= bound) {
				t.Fatalf("pair %d of expert %d, row %d: %g, want %g; off by %g, allowed %g", p, id, m, fromBF16(got), sum, diff, bound)
			}
		}
	}
}

// routings of 12 tokens, 2 experts each of 6: everywhere; all to one; the first and the last alone; some to nobody.
var routings = map[string]func(rng *rand.Rand, pair int) int{
	"everywhere": func(rng *rand.Rand, _ int) int { return rng.IntN(6) },
	"one":        func(*rand.Rand, int) int { return 3 },
	"ends":       func(_ *rand.Rand, pair int) int { return 5 * (pair % 2) },
	"elsewhere":  func(rng *rand.Rand, _ int) int { return rng.IntN(6) - 2 },
	"nobody":     func(*rand.Rand, int) int { return -1 },
}

func newLayer(kind string, tokens, top, m, k int, seed uint64) layer {
	rng := rand.New(rand.NewPCG(seed, 5))
	l := layer{m: m, k: k, top: top, seed: seed}
	for e := range 6 {
		l.experts = append(l.experts, newMatrix([]string{"moderate", "tiles", "gaussian"}[e%3], m, k, seed+uint64(e)))
	}
	for p := range tokens * top {
		l.ids = append(l.ids, routings[kind](rng, p))
	}
	rows := tokens
	if seed%3 == 0 {
		l.byPair, rows = true, tokens*top
	}
	for range rows * k {
		l.x = append(l.x, bf16(rng.NormFloat64()))
	}
	return l
}

var groupedVariants = []variant{
	{n: 8, mw: 2, kw: 4, xstages: 2}, {n: 8, mw: 1, kw: 2, xstages: 2}, {n: 16, mw: 3, kw: 2, xstages: 2}, {n: 32, mw: 2, kw: 1, xstages: 2},
}

func TestGroupedGEMM(t *testing.T) {
	for _, v := range groupedVariants {
		for _, whole := range []bool{false, true} {
			t.Run(fmt.Sprintf("%v,whole=%v", v, whole), func(t *testing.T) {
				t.Parallel()
				g := newGrouped(t, kernels.Sources, v, whole)
				for i, s := range []struct{ m, k, grid int }{{130, 328, 5}, {64, 700, 7}, {200, 72, 3}, {65, 130, 16}} {
					for kind := range routings {
						t.Run(fmt.Sprintf("%dx%d,grid=%d,%s", s.m, s.k, s.grid, kind), func(t *testing.T) {
							for _, seed := range seeds(t, 1) {
								l := newLayer(kind, 12, 2, s.m, s.k, seed)
								l.grid, l.misalign = s.grid, i == 2 && seed%2 == 0
								y, err := g.run(l)
								require.NoError(t, err)
								l.check(t, y)
							}
						})
					}
				}
			})
		}
	}
}

// Gates in the kernel are gates behind it: the sums are the same bits, of which the exponential is not.
func TestGroupedGates(t *testing.T) {
	for _, v := range []variant{{n: 8, mw: 2, kw: 4, xstages: 2}, {n: 16, mw: 4, kw: 1, xstages: 2}} {
		t.Run(v.String(), func(t *testing.T) {
			t.Parallel()
			plain, gated := newGrouped(t, kernels.Sources, v, false), newGated(t, kernels.Sources, v)
			for _, s := range []struct{ m, k, grid int }{{128, 200, 3}, {384, 328, 7}} {
				for _, seed := range seeds(t, 3) {
					l := newLayer("elsewhere", 12, 2, s.m, s.k, seed)
					l.grid = s.grid
					both, err := plain.run(l)
					require.NoError(t, err)
					y, err := gated.run(l)
					require.NoError(t, err)
					for p, id := range l.ids {
						for i := range s.m / 2 {
							got := y[p*s.m/2+i]
							if id < 0 {
								require.Equal(t, uint16(0xFFFF), got)
								continue
							}
							gate, up := fromBF16(both[p*s.m+i]), fromBF16(both[p*s.m+s.m/2+i])
							want := gate / (1 + math.Exp(-gate)) * up
							// Splits of the sums differ between the two, so gate and up may be off by a last place.
							require.InDelta(t, want, fromBF16(got), math.Abs(want)/20+math.Abs(up)*0.02+1e-30, "pair %d, row %d: gate %g, up %g", p, i, gate, up)
						}
					}
				}
			}
		})
	}
}

// A matrix of few tiles: more blocks than units, by token and by pair, 8 and 64 pairs at a time, lists of every sort.
func TestGroupedSmall(t *testing.T) {
	for _, n := range []int{8, 64} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			t.Parallel()
			g := newGrouped(t, kernels.Sources, variant{n: n, mw: 2, kw: 4, xstages: 2}, false)
			for _, byPair := range []bool{false, true} {
				for _, seed := range seeds(t, 1) {
					rng := rand.New(rand.NewPCG(seed, 9))
					l := layer{m: 130, k: 72, top: 4, grid: 16, byPair: byPair, ids: rng.Perm(16)[:4], seed: seed}
					for e := range 16 {
						l.experts = append(l.experts, newMatrix([]string{"moderate", "tiles", "gaussian"}[e%3], l.m, l.k, seed+uint64(e)))
					}
					rows := 1
					if byPair {
						rows = len(l.ids)
					}
					for range rows * l.k {
						l.x = append(l.x, bf16(rng.NormFloat64()))
					}
					y, err := g.run(l)
					require.NoError(t, err)
					l.check(t, y)
				}
			}
		})
	}
}

// The same bits in every schedule; with whole runs, the same bits for a pair whatever else is there, in every variant for another number of pairs.
func TestGroupedInvariance(t *testing.T) {
	t.Parallel()
	l := newLayer("everywhere", 12, 2, 130, 600, 4) // rows of x are tokens
	l.grid = 7
	split := newGrouped(t, kernels.Sources, variant{n: 8, mw: 1, kw: 2, xstages: 2}, false)
	want, err := split.run(l)
	require.NoError(t, err)
	for _, seed := range seeds(t, 3) {
		l.seed = seed
		got, err := split.run(l)
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
	var all []uint16
	for _, n := range []int{8, 16} {
		g := newGrouped(t, kernels.Sources, variant{n: n, mw: 1, kw: 2, xstages: 2}, true)
		y, err := g.run(l)
		require.NoError(t, err)
		if all == nil {
			all = y
		}
		require.Equal(t, all, y)
		for token := range 3 {
			one := l
			one.x, one.ids, one.grid = l.x[token*l.k:(token+1)*l.k], l.ids[2*token:2*token+2], 3+token
			y, err := g.run(one)
			require.NoError(t, err)
			require.Equal(t, all[2*token*l.m:2*(token+1)*l.m], y, "token %d alone", token)
		}
	}
}

// router is moe.cu.
func newRouter(t *testing.T, files fs.FS) *emu.Program {
	t.Helper()
	p, err := emu.Compile(emu.Source{Files: files, Main: "moe.cu", Kernels: []string{"zs_moe_route", "zs_moe_combine"},
		Constants: []string{"ZS_THREADS", "ZS_ROUTE_SMEM", "ZS_COMBINE_THREADS", "ZS_COMBINE_SMEM"}})
	require.NoError(t, err)
	return p
}

func integers(ids []int, bytes int) []byte {
	var out []byte
	for _, id := range ids {
		if bytes == 8 {
			out = le.AppendUint64(out, uint64(int64(id)))
		} else {
			out = le.AppendUint32(out, uint32(int32(id)))
		}
	}
	return out
}

func route(p *emu.Program, ids []int, top, experts, tile, idBytes int, seed uint64) ([]byte, error) {
	out := &emu.Buffer{Name: "routing", Data: make([]byte, 4*(4+6*len(ids))), Mode: emu.Out, Dependent: true}
	_, err := p.Run(context.Background(), emu.Launch{
		Kernel: "zs_moe_route", Grid: [3]int{1}, Block: [3]int{p.Constant("ZS_THREADS")}, Shared: p.Constant("ZS_ROUTE_SMEM"),
		Args: []any{&emu.Buffer{Name: "ids", Data: integers(ids, idBytes), Mode: emu.In, Align: idBytes, Dependent: true}, idBytes, len(ids), top, experts, tile, out},
		Seed: seed, PDL: true,
	})
	return out.Data, err
}

func TestRoute(t *testing.T) {
	t.Parallel()
	p := newRouter(t, kernels.Sources)
	for _, s := range []struct{ pairs, experts, tile int }{{1, 1, 8}, {2, 8, 8}, {16, 8, 8}, {64, 8, 16}, {300, 5, 8}, {100, 128, 8}, {256, 600, 32}, {40, 1000, 8}} {
		t.Run(fmt.Sprintf("%d pairs,%d experts", s.pairs, s.experts), func(t *testing.T) {
			for _, seed := range seeds(t, 2) {
				rng := rand.New(rand.NewPCG(seed, 1))
				ids := make([]int, s.pairs)
				for i := range ids {
					ids[i] = rng.IntN(s.experts+2) - 1 // one below, one beyond
				}
				got, err := route(p, ids, 1+int(seed%4), s.experts, s.tile, 4+4*int(seed>>9%2), seed)
				require.NoError(t, err)
				want := words32(routing(ids, 1+int(seed%4), s.experts, s.tile))
				for i := range want { // the unused words are the kernel's own business
					if i >= 4 && i < 16 || want[i] == 0xFF && got[i] == 0xFF {
						continue
					}
					require.Equal(t, want[i], got[i], "byte %d", i)
				}
			}
		})
	}
}

func TestCombine(t *testing.T) {
	t.Parallel()
	p := newRouter(t, kernels.Sources)
	for _, s := range []struct{ tokens, top, m int }{{1, 1, 1}, {3, 2, 1032}, {5, 8, 130}, {2, 32, 64}} {
		t.Run(fmt.Sprintf("%d,%d,%d", s.tokens, s.top, s.m), func(t *testing.T) {
			for _, seed := range seeds(t, 2) {
				rng := rand.New(rand.NewPCG(seed, 2))
				var ids []int
				var weights []uint32
				for range s.tokens {
					for _, e := range rng.Perm(40)[:s.top] {
						ids = append(ids, e-3)
						weights = append(weights, math.Float32bits(rng.Float32()))
					}
				}
				y := make([]uint16, s.tokens*s.top*s.m)
				for i := range y {
					y[i] = bf16(rng.NormFloat64())
					if ids[i/s.m] < 0 {
						y[i] = 0x7FC0 // nobody wrote there
					}
				}
				out := &emu.Buffer{Name: "out", Data: make([]byte, 2*s.tokens*s.m), Mode: emu.Out, Dependent: true}
				threads := p.Constant("ZS_COMBINE_THREADS")
				_, err := p.Run(context.Background(), emu.Launch{
					Kernel: "zs_moe_combine", Grid: [3]int{(s.m + 8*threads - 1) / (8 * threads), s.tokens}, Block: [3]int{threads}, Shared: p.Constant("ZS_COMBINE_SMEM"),
					Args: []any{
						&emu.Buffer{Name: "y", Data: halves(y), Mode: emu.In, Dependent: true}, &emu.Buffer{Name: "ids", Data: integers(ids, 8), Mode: emu.In, Dependent: true}, 8,
						&emu.Buffer{Name: "weights", Data: words32(weights), Mode: emu.In, Align: 4, Dependent: true}, s.top, 37, s.m, out,
					},
					Seed: seed, PDL: true,
				})
				require.NoError(t, err)
				for i, got := range fromHalves(out.Data) {
					var sum, magnitude float64
					for slot := range s.top {
						pair := i/s.m*s.top + slot
						if ids[pair] >= 0 && ids[pair] < 37 {
							v := float64(math.Float32frombits(weights[pair])) * fromBF16(y[pair*s.m+i%s.m])
							sum, magnitude = sum+v, magnitude+math.Abs(v)
						}
					}
					require.InDelta(t, sum, fromBF16(got), math.Abs(sum)/256*1.01+magnitude*1e-5)
				}
			}
		})
	}
}
