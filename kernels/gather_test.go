// SPDX-License-Identifier: Apache-2.0

package kernels_test

import (
	"context"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/zipserv/zipserv/core/codec"
	"github.com/zipserv/zipserv/core/format"
	"github.com/zipserv/zipserv/kernels"
	"github.com/zipserv/zipserv/kernels/emu"
)

// gatherer is one compiled variant of gather.cu.
type gatherer struct{ program *emu.Program }

func newGatherer(t *testing.T, files fs.FS, fp16 bool) gatherer {
	t.Helper()
	define := "ZS_FP16=0"
	if fp16 {
		define = "ZS_FP16=1"
	}
	p, err := emu.Compile(emu.Source{Files: files, Main: "gather.cu", Defines: []string{define},
		Kernels: []string{"zs_gather"}, Constants: []string{"ZS_THREADS", "ZS_GATHER_SMEM"}})
	require.NoError(t, err)
	return gatherer{p}
}

type gatherCase struct {
	x            matrix
	blob         []byte // of x; nil: encodeTiled
	ids          []int64
	idBytes      int
	align, spare int // alignment of the output, elements before its start
	seed         uint64
	dependent    bool // the kernel before may still use what this one reads and writes
}

// run looks up, and returns the output with what lies before its start.
func (g gatherer) run(c gatherCase) ([]byte, error) {
	if c.blob == nil {
		c.blob = encodeTiled(c.x)
	}
	var ids []byte
	for _, id := range c.ids {
		if c.idBytes == 8 {
			ids = le.AppendUint64(ids, uint64(id))
		} else {
			ids = le.AppendUint32(ids, uint32(id))
		}
	}
	out := &emu.Buffer{Name: "out", Data: make([]byte, 2*(c.spare+len(c.ids)*c.x.k)), Mode: emu.Out, Align: c.align, Dependent: c.dependent}
	threads, pieces := g.program.Constant("ZS_THREADS"), len(c.ids)*((c.x.k+63)/64)
	_, err := g.program.Run(context.Background(), emu.Launch{
		Kernel: "zs_gather", Grid: [3]int{(4*pieces + threads - 1) / threads}, Block: [3]int{threads}, Shared: g.program.Constant("ZS_GATHER_SMEM"),
		Args: []any{
			&emu.Buffer{Name: "blob", Data: c.blob, Mode: emu.In}, &emu.Buffer{Name: "ids", Data: ids, Mode: emu.In, Align: c.idBytes, Dependent: c.dependent},
			c.idBytes, emu.Ptr{Buffer: out, Offset: 2 * c.spare}, c.x.m, c.x.k, pieces,
		},
		Seed: c.seed, PDL: c.dependent, Resident: 8,
	})
	return out.Data, err
}

func (c gatherCase) expected() []byte {
	out := make([]uint16, c.spare, c.spare+len(c.ids)*c.x.k)
	for i := range out {
		out[i] = 0xFFFF // the emulator's poison: untouched
	}
	for _, id := range c.ids {
		out = append(out, c.x.w[int(id)*c.x.k:(int(id)+1)*c.x.k]...)
	}
	return halves(out)
}

// someRows are n rows of m in any order, the first and the last among them, some of them twice.
func someRows(m, n int, seed uint64) []int64 {
	rng := rand.New(rand.NewPCG(seed, 17))
	ids := make([]int64, n)
	for i := range ids {
		ids[i] = rng.Int64N(int64(m))
	}
	ids[0], ids[n-1] = int64(m-1), ids[n/2]
	if n > 3 {
		ids[2] = 0
	}
	return ids
}

func TestGather(t *testing.T) {
	t.Parallel()
	g := newGatherer(t, kernels.Sources, false)
	for _, s := range [][2]int{{1, 1}, {1, 64}, {64, 1}, {64, 64}, {65, 63}, {63, 65}, {128, 320}, {200, 72}, {77, 1000}, {320, 130}} {
		for kind := range kinds {
			t.Run(fmt.Sprintf("%dx%d,%s", s[0], s[1], kind), func(t *testing.T) {
				for i, seed := range seeds(t, 1) {
					c := gatherCase{x: newMatrix(kind, s[0], s[1], seed), ids: someRows(s[0], 1+int(seed%40), seed), idBytes: 4 + 4*int(seed>>8%2), align: 16, seed: seed}
					got, err := g.run(c)
					require.NoError(t, err)
					requireSame(t, c.expected(), got, s[1], fmt.Sprintf("schedule %d, rows %v", i, c.ids))
				}
			})
		}
	}
}

// Every pattern of 16 bits, among Gaussian weights (codes, escapes, literals) and among random ones (dense tiles).
func TestGatherEveryPattern(t *testing.T) {
	t.Parallel()
	g := newGatherer(t, kernels.Sources, false)
	for _, kind := range []string{"gaussian", "random"} {
		x := newMatrix(kind, 1024, 512, 5)
		for i, p := range rand.New(rand.NewPCG(3, 4)).Perm(len(x.w))[:1<<16] {
			x.w[p] = uint16(i)
		}
		c := gatherCase{x: x, idBytes: 8, align: 16, seed: 9}
		for id := range x.m {
			c.ids = append(c.ids, int64(id))
		}
		got, err := g.run(c)
		require.NoError(t, err)
		requireSame(t, c.expected(), got, x.k, kind)
	}
}

// FP16 as the codec writes it: windows, lists, literals, dense tiles.
func TestGatherFP16(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	g := newGatherer(t, kernels.Sources, true)
	for _, s := range [][2]int{{192, 256}, {250, 316}, {190, 383}} {
		x := matrix{s[0], s[1], make([]uint16, s[0]*s[1])}
		rng := rand.New(rand.NewPCG(uint64(s[0]), 8))
		for i := range x.w {
			r, c := i/x.k, i%x.k
			x.w[i] = uint16(rng.Uint32())
			if r >= 64 || c >= 64 { // the first tile is dense
				if rng.IntN(40) > 0 {
					x.w[i] = x.w[i]&0x83FF | uint16(8+min(rng.IntN(8), rng.IntN(9)))<<10
				}
			}
		}
		plan, err := codec.NewPlan(ctx, x.bytes(), format.FP16, []uint64{uint64(x.m), uint64(x.k)}, uint64(x.m), uint64(x.k))
		require.NoError(t, err)
		require.Equal(t, format.Tiled, plan.Header().Mode)
		blob := make([]byte, plan.Size())
		require.NoError(t, plan.Encode(ctx, blob))
		dense, escapes := 0, 0
		for i := format.HeaderSize; i < format.HeaderSize+8*((x.m+63)/64)*((x.k+63)/64); i += 8 {
			escapes += int(le.Uint16(blob[i+4:]))
			dense += int(blob[i+7] & 1)
		}
		require.Positive(t, dense)
		require.Positive(t, escapes)
		c := gatherCase{x: x, blob: blob, ids: append(someRows(x.m, 60, 5), 0, 1, 8, 17, 63, 64), idBytes: 8, align: 16, seed: 3}
		got, err := g.run(c)
		require.NoError(t, err)
		requireSame(t, c.expected(), got, x.k, fmt.Sprint(s))
	}
}

func TestGatherUnalignedOutput(t *testing.T) {
	t.Parallel()
	g := newGatherer(t, kernels.Sources, false)
	for _, c := range []gatherCase{{spare: 1, align: 16}, {align: 2}, {spare: 8, align: 16}} {
		c.x, c.ids, c.idBytes, c.seed = newMatrix("outliers", 70, 128, 1), []int64{3, 69, 3, 40}, 8, 2
		got, err := g.run(c)
		require.NoError(t, err)
		requireSame(t, c.expected(), got, c.x.k, "output")
	}
}

// A number that is no row ends the kernel before anything is read there, in both widths.
func TestGatherRefusesWhatIsNoRow(t *testing.T) {
	t.Parallel()
	g := newGatherer(t, kernels.Sources, false)
	for _, idBytes := range []int{4, 8} {
		for _, id := range []int64{-1, 70, 1 << 31, 1<<32 + 3, -1 << 63} {
			if idBytes == 4 && id != int64(int32(id)) {
				continue
			}
			c := gatherCase{x: newMatrix("gaussian", 70, 128, 1), ids: []int64{3, id, 4}, idBytes: idBytes, align: 16, seed: 2}
			_, err := g.run(c)
			require.Equal(t, "trap", faultKind(err), "%d", id)
			require.ErrorContains(t, err, "not a row of the table")
		}
	}
}

// Launched early, it touches the numbers and the output only when the kernel ahead of it has ended.
func TestGatherEarly(t *testing.T) {
	t.Parallel()
	for name, files := range map[string]fs.FS{"right": kernels.Sources, "no wait": mutant(t, "gather.cu", "griddep_wait();", "")} {
		c := gatherCase{x: newMatrix("mixed", 130, 200, 3), ids: []int64{129, 5, 5, 64}, idBytes: 8, align: 16, seed: 5, dependent: true}
		got, err := newGatherer(t, files, false).run(c)
		if name != "right" {
			require.Equal(t, "dependency", faultKind(err))
			continue
		}
		require.NoError(t, err)
		requireSame(t, c.expected(), got, c.x.k, name)
	}
}
