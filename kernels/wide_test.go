// SPDX-License-Identifier: Apache-2.0

package kernels_test

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/zipserv/zipserv/kernels"
)

// The first two are those of the launch plans; the others have the same roles with fewer tokens, and so are quick.
var wideVariants = []variant{
	{n: 256, mw: 2, kw: 2, cluster: 2, xstages: 2}, {n: 128, mw: 3, kw: 2, cluster: 2, xstages: 2},
	{n: 16, mw: 2, kw: 2, cluster: 2, xstages: 2}, {n: 16, mw: 3, kw: 2, cluster: 2, xstages: 3}, {n: 32, mw: 1, kw: 2, cluster: 2, xstages: 2}, {n: 8, mw: 3, kw: 2, cluster: 1, xstages: 2},
}

// tiles are token tiles, the last of them with `last` tokens (0: all).
var wideShapes = []struct{ m, k, tiles, last, grid int }{
	{1, 1, 1, 1, 2},       // one weight
	{64, 64, 2, 3, 2},     // one tile, so half of a unit
	{40, 200, 1, 0, 4},    // a strip that only the first block of a cluster has; an odd number of column tiles
	{130, 72, 3, 5, 4},    // all output tiles streamed
	{200, 1160, 1, 7, 12}, // six clusters for a few tiles: partial sums; every ring goes round
	{450, 130, 4, 0, 4},   // whole tiles alone, or with streamed ones
	{330, 330, 5, 1, 6},   // both, and a ragged end in every direction
	{128, 64, 10, 2, 4},   // more token tiles than a panel of ZS_PANEL
	{70, 2100, 2, 0, 8},   // a tile split over four clusters
	{4, 136, 3, 0, 6},
}

// The large layouts take the emulator long: they run what has few output tiles.
func (v variant) large() bool { return v.n > 64 }

// tokensOf are those of so many token tiles, the last of them with `last` tokens (0: all).
func tokensOf(g gemm, tiles, last int) int {
	if last > 0 {
		return (tiles-1)*g.n + last
	}
	return tiles * g.n
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

func TestWide(t *testing.T) {
	for _, v := range wideVariants {
		t.Run(v.String(), func(t *testing.T) {
			t.Parallel()
			g := newGEMM(t, kernels.Sources, "wide", v)
			for _, s := range wideShapes {
				if v.large() && s.m*s.k*s.tiles > 300000 {
					continue
				}
				t.Run(fmt.Sprintf("%dx%d,tiles=%d,last=%d,grid=%d", s.m, s.k, s.tiles, s.last, s.grid), func(t *testing.T) {
					g.underSchedules(t, v, func() product {
						p := newProduct(s.m, s.k, tokensOf(g, s.tiles, s.last), seeds(t, 1)[0])
						p.grid = s.grid
						switch s.m % 4 {
						case 0:
							p.ldx, p.ldy = s.k+16, s.m+5
						case 1:
							p.misalign = true
						}
						return p
					})
				})
			}
		})
	}
}

// Every list of escapes that there is: none, some, more than 128, more than 256, literals, dense. A lost one is far too large.
func TestWideEscapes(t *testing.T) {
	t.Parallel()
	g := newGEMM(t, kernels.Sources, "wide", variant{n: 16, mw: 2, kw: 2, cluster: 2, xstages: 2})
	for _, seed := range seeds(t, 2) {
		for _, kind := range []string{"tiles", "moderate"} {
			p := newProduct(260, 328, 21, seed)
			p.w, p.grid = newMatrix(kind, 260, 328, seed), 6
			y, err := g.run(p)
			require.NoError(t, err)
			p.check(t, y)
		}
	}
}
