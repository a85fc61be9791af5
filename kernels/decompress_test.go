// SPDX-License-Identifier: Apache-2.0

package kernels_test

import (
	"context"
	"fmt"
	"io/fs"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/zipserv/zipserv/kernels"
	"github.com/zipserv/zipserv/kernels/emu"
)

// decompressor is one compiled variant of decompress.cu.
type decompressor struct{ program *emu.Program }

func newDecompressor(t *testing.T, files fs.FS, warps int) decompressor {
	t.Helper()
	p, err := emu.Compile(emu.Source{Files: files, Main: "decompress.cu", Defines: []string{fmt.Sprintf("ZS_WARPS=%d", warps)},
		Kernels: []string{"zs_decompress"}, Constants: []string{"ZS_WARPS", "ZS_DECOMPRESS_SMEM"}})
	require.NoError(t, err)
	return decompressor{p}
}

type decompressCase struct {
	x            matrix
	blocks, ld   int
	align, spare int // alignment of the output, elements before its start
	seed         uint64
}

// run decompresses, and returns the output with what lies between the rows.
func (d decompressor) run(c decompressCase) ([]byte, error) {
	blob := &emu.Buffer{Name: "blob", Data: encodeTiled(c.x), Mode: emu.In}
	// The last row ends with its last weight: what follows belongs to somebody else.
	size := 2 * (c.spare + (c.x.m-1)*c.ld + c.x.k)
	out := &emu.Buffer{Name: "out", Data: make([]byte, size), Mode: emu.Out, Align: c.align}
	_, err := d.program.Run(context.Background(), emu.Launch{
		Kernel: "zs_decompress", Grid: [3]int{c.blocks}, Block: [3]int{32 * d.program.Constant("ZS_WARPS")}, Shared: d.program.Constant("ZS_DECOMPRESS_SMEM"),
		Args: []any{blob, emu.Ptr{Buffer: out, Offset: 2 * c.spare}, c.ld, c.x.m, c.x.k, 0, c.x.m}, Seed: c.seed,
	})
	return out.Data, err
}

func (c decompressCase) expected() []byte {
	out := make([]uint16, c.spare+(c.x.m-1)*c.ld+c.x.k)
	for i := range out {
		out[i] = 0xFFFF // the emulator's poison: untouched
	}
	for r := range c.x.m {
		copy(out[c.spare+r*c.ld:], c.x.w[r*c.x.k:(r+1)*c.x.k])
	}
	return halves(out)
}

func TestDecompress(t *testing.T) {
	for _, warps := range []int{1, 4} {
		t.Run(fmt.Sprintf("warps=%d", warps), func(t *testing.T) {
			t.Parallel()
			d := newDecompressor(t, kernels.Sources, warps)
			for _, s := range [][2]int{{1, 1}, {1, 64}, {64, 1}, {64, 64}, {65, 63}, {63, 65}, {128, 320}, {200, 72}, {77, 1000}, {320, 130}} {
				for kind := range kinds {
					t.Run(fmt.Sprintf("%dx%d,%s", s[0], s[1], kind), func(t *testing.T) {
						for i, seed := range seeds(t, 1) {
							c := decompressCase{x: newMatrix(kind, s[0], s[1], seed), blocks: 1 + int(seed%3), ld: s[1] + int(seed>>8)%3*4, align: 16, seed: seed}
							got, err := d.run(c)
							require.NoError(t, err)
							requireSame(t, c.expected(), got, c.ld, fmt.Sprintf("schedule %d", i))
						}
					})
				}
			}
		})
	}
}

// A range of rows, which begins with a row of tiles and may end anywhere, is the same as the rows of the whole.
func TestDecompressRows(t *testing.T) {
	d := newDecompressor(t, kernels.Sources, 2)
	for _, kind := range []string{"mixed", "every position"} {
		x := newMatrix(kind, 300, 130, 7)
		blob := &emu.Buffer{Name: "blob", Data: encodeTiled(x), Mode: emu.In}
		for _, r := range [][2]int{{0, 64}, {1, 64}, {1, 65}, {2, 172}, {4, 44}, {3, 1}, {0, 300}} {
			out := &emu.Buffer{Name: "out", Data: make([]byte, 2*r[1]*x.k), Mode: emu.Out}
			_, err := d.program.Run(context.Background(), emu.Launch{
				Kernel: "zs_decompress", Grid: [3]int{2}, Block: [3]int{64}, Shared: d.program.Constant("ZS_DECOMPRESS_SMEM"),
				Args: []any{blob, out, x.k, x.m, x.k, r[0], r[1]}, Seed: 5,
			})
			require.NoError(t, err)
			requireSame(t, halves(x.w[64*r[0]*x.k:(64*r[0]+r[1])*x.k]), out.Data, x.k, fmt.Sprintf("%s rows %v", kind, r))
		}
	}
}

// Launched early, it touches the output only when the kernel ahead of it has ended.
func TestDecompressEarly(t *testing.T) {
	x := newMatrix("mixed", 130, 200, 3)
	for name, files := range map[string]fs.FS{"right": kernels.Sources, "no wait": mutant(t, "decompress.cu", "if (t0 == block0) griddep_wait();", "")} {
		d := newDecompressor(t, files, 2)
		for _, blocks := range []int{1, 6, 8} {
			out := &emu.Buffer{Name: "out", Data: make([]byte, 2*len(x.w)), Mode: emu.Out, Dependent: true}
			_, err := d.program.Run(context.Background(), emu.Launch{
				Kernel: "zs_decompress", Grid: [3]int{blocks}, Block: [3]int{64}, Shared: d.program.Constant("ZS_DECOMPRESS_SMEM"), PDL: true,
				Args: []any{&emu.Buffer{Name: "blob", Data: encodeTiled(x), Mode: emu.In}, out, x.k, x.m, x.k, 0, x.m}, Seed: 5,
			})
			if name != "right" {
				require.Equal(t, "dependency", faultKind(err))
				continue
			}
			require.NoError(t, err)
			requireSame(t, halves(x.w), out.Data, x.k, fmt.Sprintf("%d blocks", blocks))
		}
	}
}

func TestDecompressUnalignedOutput(t *testing.T) {
	t.Parallel()
	d := newDecompressor(t, kernels.Sources, 2)
	for _, c := range []decompressCase{
		{x: newMatrix("outliers", 70, 128, 1), ld: 128, align: 16, spare: 1, blocks: 1, seed: 1},
		{x: newMatrix("outliers", 70, 128, 1), ld: 129, align: 16, blocks: 2, seed: 2},
		{x: newMatrix("outliers", 70, 128, 1), ld: 136, align: 2, blocks: 2, seed: 3},
	} {
		got, err := d.run(c)
		require.NoError(t, err)
		requireSame(t, c.expected(), got, c.ld, "output")
	}
}
