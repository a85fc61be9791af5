// SPDX-License-Identifier: Apache-2.0

package kernels_test

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/zipserv/zipserv/core/format"
	"github.com/zipserv/zipserv/kernels"
	"github.com/zipserv/zipserv/kernels/emu"
)

// windows is a matrix whose tiles make the search for the best window go each of its ways, by the column of tiles.
func windows(m, k int, seed uint64) matrix {
	rng := rand.New(rand.NewPCG(seed, 1))
	x := matrix{m, k, make([]uint16, m*k)}
	among := func(low, high int) int { return low + rng.IntN(high-low+1) }
	for i := range x.w {
		p, e := (i/k%64)*64+i%k%64, 0
		switch i % k / 64 {
		case 0: // two windows hold the same number
			e = []int{120, 128, among(121, 127)}[min(p%50, 2)]
		case 1: // four steps down from the largest exponent, literals above
			if e = among(113, 120); p%101 == 0 {
				e = 124 + p%5
			}
		case 2: // as high as can be counted
			e = among(238, 247)
		case 3:
			e = among(240, 248)
		case 4: // as low as can be counted
			e = among(103, 112) - 15*min(p%40, 1) + 15
		case 5:
			e = among(100, 111)
		case 6: // zeros
			e = among(118, 125) * min(p%10, 1)
		case 7:
			e = among(118, 125) * (p % 2)
		case 9: // zeros make the window, all else is literals: a list in several pieces
			e = among(118, 125) * (min(rng.IntN(10), 7) / 7)
		case 8: // ten steps: more than the exponents below may be missed
			if e = among(105, 112); p%60 == 0 {
				e = 112 + p%11
			}
		}
		x.w[i] = uint16(e)<<7 | uint16(rng.IntN(128)) | uint16(rng.IntN(2))<<15
	}
	return x
}

// compressor is one compiled variant of compress.cu.
type compressor struct {
	program *emu.Program
	warps   int // of a block
}

func newCompressor(t *testing.T, files fs.FS, warps int) compressor {
	t.Helper()
	p, err := emu.Compile(emu.Source{Files: files, Main: "compress.cu", Defines: []string{fmt.Sprintf("ZS_WARPS=%d", warps)},
		Kernels:   []string{"zs_compress_plan", "zs_compress_scan", "zs_compress_write"},
		Constants: []string{"ZS_PLAN_SMEM", "ZS_WRITE_SMEM", "ZS_SCAN_SMEM"}})
	require.NoError(t, err)
	return compressor{p, warps}
}

type compressCase struct {
	x          matrix
	blocks, ld int
	spare      int // elements before the matrix's start: 8 keeps it aligned, 1 does not
	seed       uint64
}

// run does what the engine does: three launches, and the size from the totals in between.
func (c compressor) run(t *testing.T, in compressCase) ([]byte, error) {
	ctx := context.Background()
	src := make([]uint16, in.spare+(in.x.m-1)*in.ld+in.x.k)
	for i := range src {
		src[i] = 0x7FC1 // not part of the matrix
	}
	for r := range in.x.m {
		copy(src[in.spare+r*in.ld:], in.x.w[r*in.x.k:(r+1)*in.x.k])
	}
	from := &emu.Buffer{Name: "src", Data: halves(src), Mode: emu.In}
	tiles := (in.x.m + 63) / 64 * ((in.x.k + 63) / 64)
	scratch := &emu.Buffer{Name: "scratch", Data: make([]byte, 16+(8*in.blocks+15)/16*16+8*tiles), Mode: emu.Out}
	matrixArgs := []any{emu.Ptr{Buffer: from, Offset: 2 * in.spare}, in.ld, in.x.m, in.x.k}
	launch := func(kernel string, blocks, threads int, args ...any) error {
		_, err := c.program.Run(ctx, emu.Launch{
			Kernel: "zs_compress_" + kernel, Grid: [3]int{blocks}, Block: [3]int{threads}, Args: args, Seed: in.seed,
			Shared: c.program.Constant(map[string]string{"plan": "ZS_PLAN_SMEM", "scan": "ZS_SCAN_SMEM", "write": "ZS_WRITE_SMEM"}[kernel]),
		})
		return err
	}
	if err := launch("plan", in.blocks, 32*c.warps, append(matrixArgs, scratch)...); err != nil {
		return nil, err
	}
	scratch.Mode = emu.InOut
	mail := &emu.Buffer{Name: "mail", Data: make([]byte, 16), Mode: emu.Out}
	if err := launch("scan", 1, 1024, in.blocks, scratch, mail); err != nil {
		return nil, err
	}
	if !bytes.Equal(mail.Data[:12], scratch.Data[:12]) || le.Uint32(mail.Data[12:]) != 1 {
		return nil, fmt.Errorf("the mail is %x, the totals are %x", mail.Data, scratch.Data[:16])
	}
	h := format.Header{DType: format.BF16, Mode: format.Tiled, Shape: []uint64{uint64(in.x.m), uint64(in.x.k)}, M: uint64(in.x.m), K: uint64(in.x.k),
		EscapeBytes: 16 * le.Uint64(scratch.Data), Checksum: le.Uint32(scratch.Data[8:])}
	head := h.Marshal()
	blob := &emu.Buffer{Name: "blob", Data: make([]byte, 128+(8*tiles+127)/128*128+tiles*5632+int(h.EscapeBytes)), Mode: emu.Out}
	scratch.Mode = emu.In
	args := append(matrixArgs, scratch, blob)
	for i := 0; i < len(head); i += 8 {
		args = append(args, le.Uint64(head[i:]))
	}
	if err := launch("write", in.blocks, 32*c.warps, args...); err != nil {
		return nil, err
	}
	return blob.Data, nil
}

func TestCompress(t *testing.T) {
	for _, warps := range []int{1, 2} {
		t.Run(fmt.Sprintf("warps=%d", warps), func(t *testing.T) {
			t.Parallel()
			c := newCompressor(t, kernels.Sources, warps)
			t.Run("windows", func(t *testing.T) {
				for i, seed := range seeds(t, 2) {
					for _, mk := range [][2]int{{64, 640}, {33, 634}} {
						in := compressCase{x: windows(mk[0], mk[1], seed), blocks: 1 + i, ld: mk[1] + mk[1]%8, spare: 8, seed: seed}
						got, err := c.run(t, in)
						require.NoError(t, err)
						requireSameBlob(t, encodeTiled(in.x), got, fmt.Sprintf("%v, seed %d", mk, seed))
					}
				}
			})
			for _, s := range [][2]int{{1, 1}, {1, 64}, {64, 1}, {64, 64}, {65, 63}, {63, 65}, {128, 320}, {77, 300}} {
				for kind := range kinds {
					t.Run(fmt.Sprintf("%dx%d,%s", s[0], s[1], kind), func(t *testing.T) {
						for i, seed := range seeds(t, 1) {
							in := compressCase{x: newMatrix(kind, s[0], s[1], seed), blocks: 1 + int(seed%3), ld: s[1] + int(seed>>8)%3*4, spare: 8 - 7*(int(seed>>16)&1), seed: seed}
							got, err := c.run(t, in)
							require.NoError(t, err)
							requireSameBlob(t, encodeTiled(in.x), got, fmt.Sprintf("schedule %d", i))
						}
					})
				}
			}
		})
	}
}

func requireSameBlob(t *testing.T, want, got []byte, what string) {
	t.Helper()
	if bytes.Equal(want, got) {
		return
	}
	require.Len(t, got, len(want), what)
	for i := range want {
		if want[i] != got[i] {
			require.FailNow(t, "blobs differ", "%s: byte %d is %#02x, want %#02x", what, i, got[i], want[i])
		}
	}
}

// What the tests above must catch: each mistake in turn is put into the source.
func TestCompressMistakesAreCaught(t *testing.T) {
	for name, m := range map[string][3]string{
		"ties go to the larger base":        {"tally.cuh", "(255 - b)", "b"},
		"ties stay with the higher window":  {"tally.cuh", "all - (lower - top) <= missed", "all - (lower - top) < missed"},
		"a search that ends early":          {"tally.cuh", "above <= missed; s++", "above <= missed && s < 3; s++"},
		"literals above forgotten":          {"tally.cuh", "E > base + 10 ? beyond : 0", "0"},
		"thresholds for any exponent":       {"tally.cuh", "E < 112 || E > 247", "E > 300"},
		"one symbol too few":                {"encode.cuh", "base - e <= 12", "base - e <= 11"},
		"a dropped wait before the list":    {"compress.cu", "        __syncwarp();\n        if (count) write_list", "        if (count) write_list"},
		"a dropped wait in the list":        {"encode.cuh", "        __syncwarp();\n        const uint32_t here", "        const uint32_t here"},
		"factors of the row of tiles above": {"compress.cu", "row0 != factors_of", "factors_of == 0xFFFFFFFFu"},
		"a weight forgotten":                {"compress.cu", "x.count(row0, col0), plan", "x.count(row0, col0) - 1, plan"},
		"offsets not advanced":              {"compress.cu", "offset -= before", "offset -= 0"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newCompressor(t, mutant(t, m[0], m[1], m[2]), 1)
			for i, x := range []matrix{windows(70, 640, 0), newMatrix("outliers", 70, 200, 0), newMatrix("every position", 70, 200, 1)} {
				for seed := range uint64(2) {
					in := compressCase{x: x, blocks: 1 + i%2, ld: x.k, spare: 8, seed: seed}
					got, err := c.run(t, in)
					if err != nil || !bytes.Equal(encodeTiled(in.x), got) {
						return
					}
				}
			}
			t.Fatal("not caught")
		})
	}
}
