// SPDX-License-Identifier: Apache-2.0

package kernels_test

import (
	"fmt"
	"math"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/zipserv/zipserv/kernels"
)

// Those of 256, 192 and 128 tokens are those of the launch plans; the others have the same roles with fewer tokens, and so are quick.
var pairVariants = []variant{
	{n: 256, cluster: 2, decoders: 4, xstages: 4, stages: 6}, {n: 128, cluster: 2, decoders: 8, xstages: 6, stages: 8},
	{n: 16, cluster: 2, decoders: 4, xstages: 4, stages: 6}, {n: 32, cluster: 2, decoders: 4, xstages: 4, stages: 6},
	{n: 16, cluster: 2, decoders: 8, xstages: 6, stages: 8}, {n: 16, cluster: 2, decoders: 4, xstages: 4, stages: 4},
	{n: 256, cluster: 1, decoders: 4, xstages: 4, stages: 6}, {n: 32, cluster: 1, decoders: 4, xstages: 4, stages: 6},
	{n: 32, cluster: 1, decoders: 2, xstages: 3, stages: 3}, {n: 192, cluster: 1, decoders: 8, xstages: 5, stages: 6},
	{n: 192, cluster: 2, decoders: 4, xstages: 5, stages: 6},
	{n: 32, cluster: 1, decoders: 8, xstages: 5, stages: 6},
}

var pairShapes = []shape{
	{1, 1, 1, 1, 2},       // one weight: a turn of one column, a block that has no tokens, a strip below the matrix
	{64, 64, 2, 3, 2},     // both blocks have tokens
	{40, 200, 1, 0, 4},    // one output tile for two clusters
	{130, 72, 3, 5, 4},    // two turns for each cluster; the last column has eight weights
	{200, 1560, 1, 7, 12}, // two tiles in three parts each, whose cuts are moved by a lead; every ring goes round
	{70, 900, 3, 4, 10},   // two tiles for five clusters: in parts that are not alike, and a cluster with nothing
	{128, 128, 2, 0, 4},   // a tile in two parts of one column each
	{128, 200, 8, 2, 6},   // a turn for each cluster, and one in three parts, of which the last alone has two columns
	{450, 130, 4, 0, 4},   // whole turns alone
	{200, 72, 11, 2, 6},   // panels of several row groups
	{330, 330, 5, 1, 8},   // whole turns, one in four parts, and a ragged end in every direction
	{128, 64, 10, 2, 4},   // more token tiles than a panel of ZS_PANEL; turns of one column
	{122, 136, 11, 2, 4},  // the same, of three columns; the last tile's second block has no tokens
	{70, 2310, 2, 0, 8},   // a tile in four parts, whose cuts are moved by a lead
	{130, 64, 1, 9, 12},   // more clusters than columns
	{256, 460, 1, 5, 20},  // more clusters than may share
	{100, 1160, 4, 0, 2},  // one cluster, two turns
	{40, 600, 4, 0, 2},    // the same, in time for the large layouts
	{4, 136, 3, 0, 6},
	{384, 1530, 2, 5, 8},  // runs that begin anywhere: three tiles for four clusters
	{600, 1024, 1, 0, 18}, // five for nine, without leads: a tile in three pieces, the middle one a whole run
	{890, 2050, 2, 3, 10}, // two for five behind a whole turn, with leads
	{250, 2050, 2, 1, 10}, // two for five
	{384, 72, 3, 5, 4},    // three layers' rows
	{384, 64, 3, 5, 4},    // the same in turns of one column
	{384, 1530, 1, 5, 4},  // the same four for clusters of one block, with half as many
	{600, 1024, 1, 0, 9},
	{890, 2050, 1, 3, 5},
	{250, 2050, 1, 1, 5},
}

// shape is that of a product of many tokens: tiles are token tiles of a block, the last of them with `last` tokens (0: all).
type shape struct{ m, k, tiles, last, grid int }

// The large layouts take the emulator long: they run what has few output tiles.
func (v variant) large() bool { return v.n > 64 }

// tokensOf are those of so many token tiles, the last of them with `last` tokens (0: all).
func tokensOf(g gemm, tiles, last int) int {
	if last > 0 {
		return (tiles-1)*g.n + last
	}
	return tiles * g.n
}

// partsOf says how many layers' rows, of whole strips, m are taken for where they can be: two, or three, whose strips are then not those of blocks.
func partsOf(m int) int {
	for _, parts := range []int{3, 2} {
		if m%(64*parts) == 0 {
			return parts
		}
	}
	return 1
}

// underSchedules runs a product under two schedules, a large layout under one: right, and the same bits.
func (g gemm) underSchedules(t *testing.T, v variant, make func() product) {
	t.Helper()
	var first []uint16
	for i, seed := range seeds(t, 2) {
		p := make()
		p.seed = seed
		y, err := g.run(p)
		require.NoError(t, err)
		if i == 0 {
			p.check(t, y)
			first = y
		}
		require.Equal(t, first, y, "another schedule gives other bits")
		if v.large() {
			break
		}
	}
}

// shapesRight runs a kernel for many tokens in every layout over the shapes; of so many, one each has rows of x and y apart, y misaligned, and an odd ldy.
func shapesRight(t *testing.T, kernel string, variants []variant, shapes []shape, of int) {
	t.Helper()
	for _, v := range variants {
		t.Run(v.String(), func(t *testing.T) {
			t.Parallel()
			g := newGEMM(t, kernels.Sources, kernel, v)
			for i, s := range shapes {
				if v.large() && s.m*s.k*s.tiles > 120000 {
					continue
				}
				t.Run(fmt.Sprintf("%dx%d,tiles=%d,last=%d,grid=%d", s.m, s.k, s.tiles, s.last, s.grid), func(t *testing.T) {
					g.underSchedules(t, v, func() product {
						p := newProduct(s.m, s.k, tokensOf(g, s.tiles, s.last), seeds(t, 1)[0])
						p.grid, p.above = s.grid, []int{0, 1, 3}[i%3] // as they are in a blob of their own, and in one with others
						// Results go out by copies where y and ldy are multiples of 16 bytes.
						p.parts = partsOf(s.m)
						p.ldy = (s.m/p.parts + 7) / 8 * 8
						switch i % of {
						case 1:
							p.ldx, p.ldy = s.k+16, p.ldy+8
						case 2:
							p.misalign = true
						case 3:
							p.ldy += 5
						}
						return p
					})
				})
			}
		})
	}
}

// escapesRight: every list of escapes that there is: none, some, more than 128, more than 256, literals, dense. A lost one is far too large.
func escapesRight(t *testing.T, kernel string, v variant, ldy int) {
	t.Helper()
	t.Parallel()
	g := newGEMM(t, kernels.Sources, kernel, v)
	for _, seed := range seeds(t, 2) {
		for _, kind := range []string{"tiles", "moderate"} {
			p := newProduct(260, 328, 21, seed)
			p.w, p.grid, p.ldy = newMatrix(kind, 260, 328, seed), 6, ldy
			y, err := g.run(p)
			require.NoError(t, err)
			p.check(t, y)
		}
	}
}

func TestPair(t *testing.T) { shapesRight(t, "pair", pairVariants, pairShapes, 5) }

var gatedVariants = []variant{
	{n: 32, cluster: 2, decoders: 4, xstages: 4, stages: 6, gated: true}, {n: 32, cluster: 1, decoders: 4, xstages: 4, stages: 6, gated: true},
	{n: 256, cluster: 2, decoders: 4, xstages: 4, stages: 6, gated: true}, {n: 192, cluster: 1, decoders: 8, xstages: 5, stages: 6, gated: true},
	{n: 32, cluster: 2, decoders: 8, xstages: 6, stages: 8, gated: true},
}

var gatedShapes = []shape{
	{128, 64, 1, 1, 2},   // a turn of one column; half of the tokens of a block are not there, or all
	{128, 200, 3, 5, 4},  // two parts of a tile, or a tile for each cluster
	{384, 460, 2, 0, 4},  // turns and parts; strips of the gates that are odd ones
	{128, 1160, 4, 3, 2}, // every ring goes round, one cluster
	{640, 136, 5, 2, 6},
	{384, 1530, 2, 5, 8}, // runs that begin anywhere
	{256, 72, 1, 9, 12},  // more clusters than columns
}

// Gates in the kernel are gates behind it.
func TestPairGates(t *testing.T) {
	for _, v := range gatedVariants {
		t.Run(v.String(), func(t *testing.T) {
			t.Parallel()
			g := newGEMM(t, kernels.Sources, "pair", v)
			for i, s := range gatedShapes {
				if v.large() && s.m*s.k*s.tiles > 120000 {
					continue
				}
				t.Run(fmt.Sprintf("%dx%d,tiles=%d,last=%d,grid=%d", s.m, s.k, s.tiles, s.last, s.grid), func(t *testing.T) {
					for _, seed := range seeds(t, 2) {
						p := newProduct(s.m, s.k, tokensOf(g, s.tiles, s.last), seed)
						p.grid, p.above = s.grid, i%2
						p.ldy = s.m/2 + []int{0, 8, 5}[i%3] // with 5 no copy can write it
						y, err := g.run(p)
						require.NoError(t, err)
						p.checkGates(t, y)
						if v.large() {
							break
						}
					}
				})
			}
		})
	}
}

// checkGates compares with float64: what check allows the gate and what it is for, of both the effect on the result, and three roundings.
func (p product) checkGates(t *testing.T, y []uint16) {
	t.Helper()
	half := p.w.m / 2
	for r := range p.n {
		for m := range half {
			gate, gateOff := p.exact(r, m)
			up, upOff := p.exact(r, half+m)
			silu := gate / (1 + math.Exp(-gate))
			want := silu * up
			slope := 1.1 * gateOff // of SiLU, whose derivative is at most that
			bound := slope*(math.Abs(up)+upOff) + math.Abs(silu)*upOff + math.Abs(want)/128*1.01 + math.Ldexp(1, -120)
			got := fromBF16(y[r*half+m])
			require.LessOrEqual(t, math.Abs(got-want), bound, "token %d, row %d: %g, want %g (gate %g, up %g)", r, m, got, want, gate, up)
		}
	}
}

func TestPairEscapes(t *testing.T) {
	for _, kernel := range []string{"pair", "solo"} {
		t.Run(kernel, func(t *testing.T) { escapesRight(t, kernel, seededVariant(kernel, 16), 264) })
	}
	t.Run("solo, eight decoders", func(t *testing.T) {
		escapesRight(t, "solo", variant{n: 32, cluster: 1, decoders: 8, xstages: 5, stages: 6}, 264)
	})
}
