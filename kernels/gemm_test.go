// SPDX-License-Identifier: Apache-2.0

package kernels_test

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/zipserv/zipserv/core/format"
	"github.com/zipserv/zipserv/kernels"
	"github.com/zipserv/zipserv/kernels/emu"
)

// gemm is one compiled variant of a ZipGEMM kernel. What a launch needs (threads, shared memory, workspace) is read from the source's own macros.
type gemm struct {
	program   *emu.Program
	entry     string
	n, mw, kw int
	cluster   int  // blocks
	tensor    bool // activations by tensor copies, which want 16-byte aligned rows
	pair      bool // any number of tokens: the blocks of a cluster have n each
	gated     bool // results are silu(gate) * up
	relay     bool
}

// variant is a layout of the mma kernel, or, with decoders, of the wgmma kernel, or, with decoders and a cluster, of the pair kernel (pair_test.go), or, with ring, of the
// relay (relay_test.go).
type variant struct {
	n, mw, kw, xstages int
	decoders, stages   int
	cluster, ring      int
	gated, inStep      bool
	lead               bool // where runs begin anywhere
}

func (v variant) pair() bool { return v.decoders > 0 && v.cluster > 0 }

func (v variant) String() string {
	more := ""
	if v.gated {
		more = ",gated"
	}
	if v.inStep {
		more = ",in step"
	}
	if v.lead {
		more = ",lead"
	}
	if v.ring > 0 {
		return fmt.Sprintf("n=%d,groups=%d,cluster=%d,stages=%d", v.n, v.mw, v.cluster, v.ring)
	}
	if v.pair() {
		return fmt.Sprintf("n=%d,cluster=%d,decoders=%d,xstages=%d,stages=%d", v.n, v.cluster, v.decoders, v.xstages, v.stages) + more
	}
	if v.decoders > 0 {
		return fmt.Sprintf("n=%d,mw=%d,kw=%d,decoders=%d,stages=%d,xstages=%d", v.n, v.mw, max(v.kw, 1), v.decoders, v.stages, v.xstages) + more
	}
	return fmt.Sprintf("n=%d,mw=%d,kw=%d,xstages=%d", v.n, v.mw, v.kw, v.xstages)
}

func (v variant) defines() []string {
	if v.ring > 0 {
		return []string{fmt.Sprintf("ZS_N=%d", v.n), fmt.Sprintf("ZS_GROUPS=%d", v.mw), fmt.Sprintf("ZS_CLUSTER=%d", v.cluster), fmt.Sprintf("ZS_STAGES=%d", v.ring)}
	}
	if v.pair() {
		// ZS_SHORTER: so that small products have runs that begin anywhere, too.
		d := []string{
			fmt.Sprintf("ZS_N=%d", v.n), fmt.Sprintf("ZS_CLUSTER=%d", v.cluster), fmt.Sprintf("ZS_DECODERS=%d", v.decoders), fmt.Sprintf("ZS_XSTAGES=%d", v.xstages),
			fmt.Sprintf("ZS_STAGES=%d", v.stages), "ZS_SHORTER=3",
		}
		if v.gated {
			d = append(d, "ZS_GATED=1")
		}
		return d
	}
	d := []string{fmt.Sprintf("ZS_N=%d", v.n), fmt.Sprintf("ZS_MW=%d", v.mw), fmt.Sprintf("ZS_XSTAGES=%d", v.xstages)}
	if v.decoders > 0 {
		if v.gated {
			d = append(d, "ZS_GATED=1")
		}
		if v.inStep {
			d = append(d, "ZS_IN_STEP=1")
		}
		if v.lead {
			d = append(d, "ZS_ANYWHERE_LEAD=1")
		}
		return append(d, fmt.Sprintf("ZS_KW=%d", max(v.kw, 1)), fmt.Sprintf("ZS_DECODERS=%d", v.decoders), fmt.Sprintf("ZS_STAGES=%d", v.stages))
	}
	return append(d, fmt.Sprintf("ZS_KW=%d", v.kw))
}

func newGEMM(t *testing.T, files fs.FS, kernel string, v variant) gemm {
	t.Helper()
	switch kernel {
	case "solo", "pair gated": // pair with clusters of one block, or with gates
		kernel = "pair"
	case "in step", "lead":
		kernel = "wgmma"
	}
	entry := "zs_zipgemm_" + kernel
	constants := []string{"ZS_THREADS", "ZS_GEMM_SMEM"}
	if kernel == "relay" {
		constants = append(constants, "ZS_CONTROL")
	}
	p, err := emu.Compile(emu.Source{Files: files, Main: "zipgemm_" + kernel + ".cu", Defines: v.defines(), Kernels: []string{entry}, Constants: constants})
	require.NoError(t, err)
	g := gemm{program: p, entry: entry, n: v.n, mw: v.mw, kw: max(v.kw, 1), cluster: max(v.cluster, 1), tensor: kernel != "mma", pair: kernel == "pair", relay: kernel == "relay", gated: v.gated}
	if g.pair {
		g.mw = 2
	}
	return g
}

type product struct {
	w        matrix
	x        []float64 // tokens x k, each a BF16 value
	n        int
	bias     []float64 // m, or nil
	grid     int
	ldx, ldy int // 0: k and m
	misalign bool
	parts    int // matrices that the results go to, of as many rows of w each; 0: one
	seed     uint64
	state    *relayState // nil: as before the first launch
	above    int         // w is a part of a blob: so many strips lie above it, and some rows below
}

func (g gemm) units(p product) int {
	strips, cols := (p.w.m+63)/64, (p.w.k+63)/64
	return (strips + g.mw - 1) / g.mw * ((cols + g.kw - 1) / g.kw)
}

// allSet is memory that every launch leaves as it was before the first: all bits set.
func allSet(name string, size int) *emu.Buffer {
	return &emu.Buffer{Name: name, Data: bytes.Repeat([]byte{0xFF}, size), Mode: emu.InOut, Dependent: true}
}

// run returns y as BF16 bits, n x m, with gates n x m / 2.
func (g gemm) run(p product) ([]uint16, error) {
	if p.ldx == 0 {
		p.ldx = p.w.k
	}
	p.parts = max(p.parts, 1)
	rows := p.w.m / p.parts
	if g.gated {
		p.parts, rows = 1, p.w.m/2
	}
	if p.ldy == 0 {
		p.ldy = rows
	}
	alignX, alignY := 16, 16
	if p.misalign {
		alignX, alignY = 2, 2
	}
	if g.tensor {
		p.ldx, alignX = (p.ldx+7)/8*8, 16
	}
	grid := g.cluster * max(p.grid/g.cluster, 1)
	if !g.relay && !g.pair {
		grid = min(grid, g.units(p))
	}
	x := make([]uint16, (p.n-1)*p.ldx+p.w.k)
	for i := range x {
		x[i] = 0x7FFF // NaN between the rows
	}
	for r := range p.n {
		for c := range p.w.k {
			x[r*p.ldx+c] = bf16(p.x[r*p.w.k+c])
		}
	}
	whole := p.w
	if p.above > 0 {
		rest := newMatrix("tiles", 64*p.above+70, p.w.k, p.seed+1).w
		whole = matrix{p.w.m + 64*p.above + 70, p.w.k, slices.Concat(rest[:64*p.above*p.w.k], p.w.w, rest[64*p.above*p.w.k:])}
	}
	blob := &emu.Buffer{Name: "blob", Data: encodeTiled(whole), Mode: emu.In}
	args := []any{
		&emu.Buffer{Name: "x", Data: halves(x), Mode: emu.In, Align: alignX, Dependent: true},
		p.ldx, nil, nil, p.ldy, p.w.m, p.w.k, p.n, nil,
	}
	if p.bias != nil {
		b := make([]uint16, p.w.m)
		for i := range b {
			b[i] = bf16(p.bias[i])
		}
		args[2] = &emu.Buffer{Name: "bias", Data: halves(b), Mode: emu.In, Align: 2}
	}
	y := &emu.Buffer{Name: "y", Data: make([]byte, 2*((p.parts*p.n-1)*p.ldy+rows)), Mode: emu.Out, Align: alignY, Dependent: true}
	// Every word of the workspace is empty (all bits set) before and after each launch.
	restored := []*emu.Buffer{allSet("workspace", 4*grid*g.mw*64*g.n)}
	args[3] = y
	if g.relay {
		if p.state == nil {
			p.state = g.newRelayState(p, grid)
		}
		restored = []*emu.Buffer{p.state.workspace, p.state.flags}
		args = append(args, p.state.flags, p.state.decoded, 0)
	}
	args[8] = restored[0]
	if g.relay || g.pair {
		args = slices.Insert(args, 6, any(rows))
		s, skip := format.TiledSections(format.BF16, uint64(whole.m), uint64(whole.k), 0), p.above*((p.w.k+63)/64)
		args = slices.Concat([]any{
			emu.Ptr{Buffer: blob, Offset: int(s.TileHeaders) + skip*format.TileHeaderSize}, emu.Ptr{Buffer: blob, Offset: int(s.Fixed) + skip*format.FixedBF16},
			emu.Ptr{Buffer: blob, Offset: int(s.Escapes)},
		}, args)
	} else {
		args = slices.Concat([]any{blob}, args)
	}
	if g.tensor {
		args = append(args, 0) // the emulator reads the tensor map's description, not the map
	}
	if g.pair {
		args = append(args, 0) // that of y
	}
	_, err := g.program.Run(context.Background(), emu.Launch{
		Kernel: g.entry, Grid: [3]int{grid}, Block: [3]int{g.program.Constant("ZS_THREADS")}, Shared: g.program.Constant("ZS_GEMM_SMEM"), Args: args, Seed: p.seed, PDL: true,
		Cluster: g.cluster,
	})
	if err != nil {
		return nil, err
	}
	for _, buffer := range restored {
		for i, b := range buffer.Data {
			if b != 0xFF {
				return nil, fmt.Errorf("byte %d of %s is not 0xFF after the launch", i, buffer.Name)
			}
		}
	}
	all := fromHalves(y.Data)
	out := make([]uint16, p.n*p.parts*rows)
	for r := range p.parts * p.n {
		copy(out[(r%p.n*p.parts+r/p.n)*rows:], all[r*p.ldy:r*p.ldy+rows])
		for _, v := range all[r*p.ldy+rows : min(len(all), (r+1)*p.ldy)] {
			if v != 0xFFFF {
				return nil, fmt.Errorf("the kernel wrote between rows %d and %d of y", r, r+1)
			}
		}
	}
	return out, nil
}

// exact is a token's result in float64, and how far the kernel's may be off: half a unit in the last place of the BF16 result, and for FP32 sums the usual
// k/16 + splits roundings of the sum of magnitudes (the tensor core adds 16 products at a time).
func (p product) exact(token, row int) (sum, bound float64) {
	var magnitude float64
	for k := range p.w.k {
		v := p.x[token*p.w.k+k] * fromBF16(p.w.w[row*p.w.k+k])
		sum += v
		magnitude += math.Abs(v)
	}
	if p.bias != nil {
		sum += p.bias[row]
		magnitude += math.Abs(p.bias[row])
	}
	return sum, math.Abs(sum)/256*1.01 + magnitude*math.Ldexp(float64(p.w.k)/16+16, -24) + math.Ldexp(1, -133)
}

// check compares with float64.
func (p product) check(t *testing.T, y []uint16) {
	t.Helper()
	bad := 0
	for r := range p.n {
		for m := range p.w.m {
			sum, bound := p.exact(r, m)
			got := fromBF16(y[r*p.w.m+m])
			if diff := math.Abs(got - sum); !(diff <= bound) && bad < 5 {
				bad++
				t.Errorf("token %d, row %d: %g, want %g; off by %g, allowed %g", r, m, got, sum, diff, bound)
			}
		}
	}
	if bad > 0 {
		t.FailNow()
	}
}

func newProduct(m, k, n int, seed uint64) product {
	rng := rand.New(rand.NewPCG(seed, 99))
	kind := []string{"moderate", "tiles"}[seed/2%2]
	p := product{w: newMatrix(kind, m, k, seed), n: n, x: make([]float64, n*k), seed: seed}
	for i := range p.x {
		p.x[i] = fromBF16(bf16(rng.NormFloat64()))
	}
	if seed%2 == 0 {
		p.bias = make([]float64, m)
		for i := range p.bias {
			p.bias[i] = fromBF16(bf16(rng.NormFloat64()))
		}
	}
	return p
}

// Shapes with a ragged end in every dimension, a single row, column, tile; long k for the wrap-around of all stages; splits of a strip group over
// two, three and many blocks.
var gemmShapes = []struct{ m, k, grid int }{
	{1, 1, 1}, {64, 64, 1}, {130, 72, 2}, {65, 1000, 3}, {200, 520, 2}, {128, 1536, 5}, {300, 330, 7}, {16, 4000, 4}, {333, 64, 3},
	{128, 1100, 4}, {192, 1024, 48}, // the same number of blocks for each of several strip groups: with a lead, and with runs too short for one
	{320, 1100, 3}, // runs that begin anywhere, and have whole strip groups between two parts of others
}

var mmaVariants = []variant{
	{n: 8, mw: 3, kw: 4, xstages: 3}, {n: 8, mw: 1, kw: 2, xstages: 2}, {n: 16, mw: 2, kw: 2, xstages: 2}, {n: 32, mw: 2, kw: 1, xstages: 3},
	{n: 64, mw: 1, kw: 2, xstages: 2},
}

// seededVariant is the layout that tests take which are not about layouts.
func seededVariant(kernel string, n int) variant {
	switch kernel {
	case "relay":
		return variant{n: max(n, 16), mw: 2, cluster: 2, ring: 4}
	case "pair":
		return variant{n: max(n, 16), cluster: 2, decoders: 4, xstages: 4, stages: 6}
	case "pair gated":
		return variant{n: max(n, 32), cluster: 2, decoders: 4, xstages: 4, stages: 6, gated: true}
	case "solo":
		return variant{n: max(n, 32), cluster: 1, decoders: 4, xstages: 4, stages: 6}
	case "wgmma":
		return variant{n: n, mw: 2, decoders: 3, stages: 4, xstages: 2}
	case "in step":
		return variant{n: n, mw: 1, kw: 2, decoders: 3, stages: 4, xstages: 2, inStep: true}
	case "lead":
		return variant{n: n, mw: 1, kw: 2, decoders: 3, stages: 4, xstages: 2, lead: true}
	}
	return variant{n: n, mw: 1, kw: 2, xstages: 2}
}

func testShapes(t *testing.T, g gemm, schedules int) {
	for i, s := range gemmShapes {
		t.Run(fmt.Sprintf("%dx%d,grid=%d", s.m, s.k, s.grid), func(t *testing.T) {
			for j, seed := range seeds(t, schedules) {
				n := []int{1, g.n, g.n - 1, g.n/2 + 1, 3}[(i+j)%5]
				p := newProduct(s.m, s.k, n, seed)
				p.grid = s.grid
				switch seed % 5 {
				case 0:
					p.ldx, p.ldy = s.k+8-s.k%8, s.m+5
				case 1:
					p.ldx, p.misalign = s.k+3, true
				}
				y, err := g.run(p)
				require.NoError(t, err)
				p.check(t, y)
			}
		})
	}
}

func TestGEMM(t *testing.T) {
	for _, v := range mmaVariants {
		t.Run(v.String(), func(t *testing.T) {
			t.Parallel()
			testShapes(t, newGEMM(t, kernels.Sources, "mma", v), 1)
		})
	}
}

var wgmmaVariants = []variant{
	{n: 8, mw: 1, decoders: 3, stages: 4, xstages: 3}, {n: 32, mw: 2, decoders: 3, stages: 4, xstages: 3},
	{n: 64, mw: 4, decoders: 2, stages: 8, xstages: 2}, {n: 16, mw: 1, kw: 2, decoders: 3, stages: 4, xstages: 5},
	{n: 128, mw: 2, decoders: 7, stages: 8, xstages: 3},        // registers are dealt out anew
	{n: 8, mw: 1, kw: 2, decoders: 11, stages: 16, xstages: 4}, // as a plan says
	{n: 16, mw: 1, kw: 2, decoders: 5, stages: 6, xstages: 2, inStep: true}, {n: 128, mw: 1, kw: 2, decoders: 11, stages: 12, xstages: 4, inStep: true},
}

func TestWGMMA(t *testing.T) {
	for _, v := range wgmmaVariants {
		t.Run(v.String(), func(t *testing.T) {
			t.Parallel()
			testShapes(t, newGEMM(t, kernels.Sources, "wgmma", v), 1)
		})
	}
}

// Runs that begin anywhere: those that others wait for end early. Five blocks with two such runs, and with two in one group; four with one; in the last shape, whose runs are
// longer than a group, there is none.
func TestWGMMALead(t *testing.T) {
	g := newGEMM(t, kernels.Sources, "wgmma", variant{n: 64, mw: 1, kw: 2, decoders: 5, stages: 6, xstages: 2, lead: true})
	for _, s := range []struct{ m, k, grid int }{{192, 1792, 5}, {128, 2560, 5}, {170, 1700, 4}, {320, 1100, 3}} {
		t.Run(fmt.Sprintf("%dx%d,grid=%d", s.m, s.k, s.grid), func(t *testing.T) {
			t.Parallel()
			for _, seed := range seeds(t, 2) {
				p := newProduct(s.m, s.k, 9, seed)
				p.grid = s.grid
				y, err := g.run(p)
				require.NoError(t, err)
				p.check(t, y)
			}
		})
	}
}

// Gates in the kernel are gates behind it.
func TestWGMMAGates(t *testing.T) {
	for _, v := range []variant{{n: 8, mw: 2, decoders: 3, stages: 4, xstages: 2, gated: true}, {n: 128, mw: 2, decoders: 11, stages: 16, xstages: 6, gated: true}} {
		t.Run(v.String(), func(t *testing.T) {
			t.Parallel()
			g := newGEMM(t, kernels.Sources, "wgmma", v)
			for i, s := range []struct{ m, k, n, grid int }{{128, 64, 1, 1}, {256, 520, g.n, 3}, {384, 72, g.n - 1, 2}, {128, 1536, 5, 5}, {640, 330, 3, 4}, {128, 1160, 7, 2}} {
				t.Run(fmt.Sprintf("%dx%d,n=%d,grid=%d", s.m, s.k, s.n, s.grid), func(t *testing.T) {
					for _, seed := range seeds(t, 2) {
						p := newProduct(s.m, s.k, s.n, seed)
						p.grid, p.ldy = s.grid, s.m/2+[]int{0, 4, 5}[i%3]
						y, err := g.run(p)
						require.NoError(t, err)
						p.checkGates(t, y)
						if v.n > 64 {
							break
						}
					}
				})
			}
		})
	}
}

// A token's result has the same bits alone, in any batch, in any variant of the kernel (they differ in the number of tokens), and in any schedule.
func TestBatchInvariance(t *testing.T) {
	for _, set := range []string{"mma", "wgmma"} {
		t.Run(set, func(t *testing.T) {
			t.Parallel()
			var all []gemm
			for _, n := range []int{8, 16, 32} {
				all = append(all, newGEMM(t, kernels.Sources, set, seededVariant(set, n)))
			}
			for _, s := range []struct{ m, k, grid int }{{130, 600, 4}, {64, 1300, 3}} {
				whole := newProduct(s.m, s.k, 19, 4)
				whole.grid = s.grid
				want, err := all[2].run(whole)
				require.NoError(t, err)
				rng := rand.New(rand.NewPCG(1, uint64(s.k)))
				for _, g := range all {
					for _, seed := range seeds(t, 2) {
						// Some tokens of the whole batch, in another order.
						pick := rng.Perm(whole.n)[:1+rng.IntN(g.n)%whole.n]
						p := whole
						p.n, p.seed, p.x = len(pick), seed, nil
						for _, i := range pick {
							p.x = append(p.x, whole.x[i*s.k:(i+1)*s.k]...)
						}
						got, err := g.run(p)
						require.NoError(t, err)
						for j, i := range pick {
							require.Equal(t, want[i*s.m:(i+1)*s.m], got[j*s.m:(j+1)*s.m], "token %d as number %d of %d, kernel for %d", i, j, p.n, g.n)
						}
					}
				}
			}
		})
	}
}

// NaN and infinity in a padded or absent place must not leak into results.
func TestGEMMIgnoresWhatIsNotThere(t *testing.T) {
	t.Parallel()
	g := newGEMM(t, kernels.Sources, "mma", variant{n: 8, mw: 3, kw: 4, xstages: 3})
	p := newProduct(70, 100, 3, 6)
	p.grid, p.ldx = 2, 104
	y, err := g.run(p)
	require.NoError(t, err)
	p.check(t, y)
	require.False(t, strings.Contains(fmt.Sprint(y), "32767"))
}
