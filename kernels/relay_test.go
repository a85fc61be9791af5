// SPDX-License-Identifier: Apache-2.0

package kernels_test

import (
	"bytes"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/zipserv/zipserv/kernels"
	"github.com/zipserv/zipserv/kernels/emu"
)

// relayState is the memory between launches of the relay: partial sums, tickets and flags, which every launch leaves with all bits set, and decoded tiles, of which
// nothing is expected.
type relayState struct{ workspace, flags, decoded *emu.Buffer }

func (g gemm) newRelayState(p product, grid int) *relayState {
	columns := ((p.w.m+63)/64 + g.mw - 1) / g.mw * ((p.w.k + 63) / 64)
	return &relayState{
		allSet("workspace", 4*grid*g.mw*64*g.n), allSet("flags", 4*(g.program.Constant("ZS_CONTROL")+columns)),
		&emu.Buffer{Name: "decoded", Data: make([]byte, columns*g.mw*8192), Mode: emu.Out, Dependent: true},
	}
}

// The first is that of the launch plans; the others have the same roles with fewer tokens, and so are quick.
var relayVariants = []variant{
	{n: 256, mw: 2, cluster: 2, ring: 4},
	{n: 16, mw: 2, cluster: 2, ring: 4}, {n: 32, mw: 2, cluster: 1, ring: 3}, {n: 16, mw: 1, cluster: 2, ring: 3}, {n: 16, mw: 1, cluster: 1, ring: 2},
}

// What is said of clusters is so with two blocks of two strips each.
var relayShapes = []shape{
	{1, 1, 1, 1, 2},        // one weight; the other block of the cluster is below the matrix
	{256, 192, 4, 0, 4},    // whole turns alone
	{250, 72, 4, 3, 4},     // ragged ends
	{384, 72, 3, 5, 4},     // three layers' rows
	{256, 320, 1, 0, 4},    // one output tile in two parts, which are not alike
	{200, 460, 1, 7, 6},    // in three
	{130, 460, 1, 16, 8},   // in four; a last strip that has no fellow, and a column of one
	{130, 64, 1, 9, 8},     // more clusters than columns
	{256, 130, 1, 5, 12},   // more clusters than may share
	{330, 330, 3, 1, 10},   // six output tiles for five clusters: whole turns, and one that four share
	{500, 200, 3, 0, 8},    // the same, in two parts each
	{64, 72, 10, 2, 4},     // more token tiles than a panel of ZS_PANEL
	{700, 100, 2, 4, 2},    // more strips than are begun with at the same time, and not a multiple
	{1000, 72, 1, 11, 6},   // the same, in turns and parts
	{100, 1160, 2, 0, 4},   // every ring goes round often
	{300, 136, 11, 13, 12}, // panels, and parts
}

func TestRelay(t *testing.T) { shapesRight(t, "relay", relayVariants, relayShapes, 4) }

func TestRelayEscapes(t *testing.T) {
	escapesRight(t, "relay", variant{n: 16, mw: 2, cluster: 2, ring: 4}, 0)
}

// A launch needs nothing but what the one before it has left, and takes none of its tiles for its own.
func TestRelayAgain(t *testing.T) {
	t.Parallel()
	g := newGEMM(t, kernels.Sources, "relay", variant{n: 16, mw: 2, cluster: 2, ring: 4})
	for _, s := range []struct{ m, k, n, grid int }{{256, 320, 40, 4}, {200, 200, 9, 6}} {
		var state *relayState
		for _, seed := range seeds(t, 3) {
			p := newProduct(s.m, s.k, s.n, seed)
			p.grid = s.grid
			if state == nil {
				state = g.newRelayState(p, s.grid)
				state.decoded.Mode = emu.InOut
			}
			before := bytes.Clone(state.decoded.Data)
			p.state = state
			y, err := g.run(p)
			require.NoError(t, err)
			p.check(t, y)
			require.NotEqual(t, before, state.decoded.Data)
		}
	}
}
