// SPDX-License-Identifier: Apache-2.0

package engine_test

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/zipserv/zipserv/core/cuda/engine"
)

// One launch each, early from the first time on; in a capture with a workspace of its own; another variant where bits must not depend on who else is there.
func TestExperts(t *testing.T) {
	f, e := open(t)
	d := device(t, e, 0)
	route := engine.Routing{Stream: 0x88, IDs: 0x4000, IDBytes: 4, Pairs: 16, Top: 2, Experts: 8, Tile: 8, Words: 0x6000}
	product := engine.Grouped{Stream: 0x88, Blobs: 0x10000, Step: 0x100, M: 1024, K: 512, X: 0x5000, Y: 0x7000, Words: 0x6000, Pairs: 16, Tile: 8}
	sum := engine.Combination{Stream: 0x88, Y: 0x7000, IDs: 0x4000, IDBytes: 4, Weights: 0x8000, Tokens: 8, Top: 2, Experts: 8, M: 1032, Out: 0x9000}
	require.NoError(t, d.Route(&route))
	require.NoError(t, d.Grouped(&product))
	require.NoError(t, d.Combine(&sum))
	all := launches(f)
	require.Len(t, all, 3)
	assert.Equal(t, "launch 0 zs_moe_route grid 1,1,1 block 1024 smem 24576 stream 88 pdl 1 args 4000 4 10 2 8 8 6000", all[0])
	assert.Regexp(t, `^launch 0 zs_zipgemm_grouped grid \d+,1,1 block 256 smem 75904 stream 88 pdl 1 args 10000 100 5000 1 7000 400 200 6000 10 [0-9a-f]+$`, all[1])
	assert.Equal(t, "launch 0 zs_moe_combine grid 2,8,1 block 128 smem 260 stream 88 pdl 1 args 7000 4000 4 8000 2 8 408 9000", all[2])

	f.Reset()
	f.Capture(0x88, 5)
	product.ByPair = true
	require.NoError(t, d.Grouped(&product))
	captured := launches(f)[0]
	f.Reset()
	f.Capture(0x88, 5)
	require.NoError(t, d.Grouped(&product))
	for _, word := range []string{"alloc", "synchronize", "load"} {
		assert.Zero(t, count(f, word), "the hot path does not %s", word)
	}
	f.Capture(0, 0)
	assert.Contains(t, captured, "args 10000 100 5000 0 ")
	last := func(line string) string { return line[strings.LastIndex(line, " "):] }
	assert.NotEqual(t, last(all[1]), last(captured), "a capture has a workspace of its own")

	f.Reset()
	engine.SetInvariant(true)
	defer engine.SetInvariant(false)
	require.NoError(t, d.Grouped(&product))
	assert.Equal(t, 1, count(f, "load"), "a variant of its own")
	f.Reset()
	require.NoError(t, d.WarmGrouped(1024, 512, false))
	require.NoError(t, d.WarmGrouped(1024, 512, false))
	assert.Equal(t, 3, count(f, "load"), "the other tiles")
	assert.Empty(t, launches(f))

	f.Reset()
	product.Gated = true
	require.NoError(t, d.Grouped(&product))
	assert.Equal(t, 1, count(f, "load"), "a variant of its own")
	product.M = 1088
	var wrong engine.ArgumentError
	require.ErrorAs(t, d.Grouped(&product), &wrong)
}
