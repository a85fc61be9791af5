// SPDX-License-Identifier: Apache-2.0

package kernels_test

import (
	"bytes"
	"context"
	"errors"
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

// lists is a row of m tiles, the odd ones with a list of some units.
func lists(m int) matrix {
	x := matrix{64, 64 * m, make([]uint16, 64*64*m)}
	for i := range x.w {
		r, c := i/x.k, i%x.k
		x.w[i] = 0x3F80 | uint16(c&0x7F)
		if c/64%2 == 1 && r == 0 && c%64 < 9+c/64%40 {
			x.w[i] = 0x3000
		}
	}
	return x
}

// list is the units of a tile's list in what lists returns: literals all, 3 bytes each.
func (x matrix) list(tile int) int { return tile % 2 * (3*(9+tile%40) + 15) / 16 }

// compressor is one compiled variant of compress.cu.
type compressor struct {
	program *emu.Program
	warps   int // of a block
}

func newCompressor(t *testing.T, files fs.FS, warps int) compressor {
	t.Helper()
	p, err := emu.Compile(emu.Source{Files: files, Main: "compress.cu", Defines: []string{fmt.Sprintf("ZS_WARPS=%d", warps)},
		Kernels:   []string{"zs_compress_sample", "zs_compress"},
		Constants: []string{"ZS_SAMPLE_SMEM", "ZS_COMPRESS_SMEM", "ZS_LOOK"}})
	require.NoError(t, err)
	return compressor{p, warps}
}

type compressCase struct {
	x       matrix
	ld      int
	spare   int  // elements before the matrix's start: 8 keeps it aligned, 1 does not
	samples int  // 0: every tile
	room    int  // list units in the blob beyond those that are needed; negative: too few
	keep    bool // what is left of the room is more than may be cleared
	count   bool
	blocks  int // 0: as many as groups of tiles
	seed    uint64
}

// sums are what zs_compress_sample tells.
type sums struct{ units, squares uint32 }

// run does what the engine does: samples, then the blob in memory of a size that was guessed.
func (c compressor) run(t *testing.T, in compressCase) (blob []byte, sampled sums, err error) {
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
	groups, look := (tiles+c.warps-1)/c.warps, c.program.Constant("ZS_LOOK")
	scratch := &emu.Buffer{Name: "scratch", Data: make([]byte, 32+8*((groups+look-1)/look*look)), Mode: emu.Out}
	launch := func(kernel, smem string, grid, warps int, more ...any) ([]byte, error) {
		mail := &emu.Buffer{Name: "mail", Data: make([]byte, 16), Mode: emu.InOut}
		_, err := c.program.Run(ctx, emu.Launch{
			Kernel: kernel, Grid: [3]int{grid}, Block: [3]int{32 * warps}, Seed: in.seed, Shared: c.program.Constant(smem),
			Args: append([]any{emu.Ptr{Buffer: from, Offset: 2 * in.spare}, in.ld, in.x.m, in.x.k, scratch, mail}, more...),
		})
		if err == nil && (!bytes.Equal(mail.Data[:8], scratch.Data[:8]) || le.Uint32(mail.Data[12:]) != 1) {
			err = fmt.Errorf("the mail is %x, the results are %x", mail.Data, scratch.Data[:16])
		}
		return mail.Data, err
	}
	samples := tiles
	if in.samples != 0 {
		samples = min(samples, in.samples)
	}
	sum := &emu.Buffer{Name: "sum", Data: make([]byte, 8), Mode: emu.InOut}
	told, err := launch("zs_compress_sample", "ZS_SAMPLE_SMEM", (samples+c.warps-1)/c.warps, c.warps, len(scratch.Data)/16-1, samples, sum)
	if err != nil {
		return nil, sums{}, err
	}
	if le.Uint64(sum.Data) != 0 {
		return nil, sums{}, fmt.Errorf("the sum is %x behind the kernel", sum.Data)
	}
	sampled = sums{le.Uint32(told), le.Uint32(told[4:])}
	scratch.Mode = emu.InOut
	blocks := groups
	if in.blocks != 0 {
		blocks = min(blocks, in.blocks)
	}
	want := encodeTiled(in.x)
	h := format.Header{DType: format.BF16, Mode: format.Tiled, Shape: []uint64{uint64(in.x.m), uint64(in.x.k)}, M: uint64(in.x.m), K: uint64(in.x.k)}
	head := h.Marshal()
	fields := make([]any, len(head)/8)
	for i := range fields {
		fields[i] = le.Uint64(head[8*i:])
	}
	if in.count {
		told, err = launch("zs_compress", "ZS_COMPRESS_SMEM", blocks, c.warps+1, append([]any{nil, 0, 0}, fields...)...)
	} else {
		out := &emu.Buffer{Name: "blob", Data: bytes.Repeat([]byte{0xA5}, len(want)+16*in.room), Mode: emu.InOut}
		fixed := 128 + (8*tiles+127)/128*128 + tiles*5632
		spare := max(0, in.room) // the most that is cleared
		if in.keep {
			spare--
		}
		told, err = launch("zs_compress", "ZS_COMPRESS_SMEM", blocks, c.warps+1, append([]any{out, (len(out.Data) - fixed) / 16, max(0, spare)}, fields...)...)
		blob = out.Data
	}
	if err != nil {
		return nil, sampled, err
	}
	h.EscapeBytes, h.Checksum = 16*uint64(le.Uint32(told)), le.Uint32(told[4:])
	head = h.Marshal()
	if in.count {
		return head[:], sampled, nil
	}
	if in.room < 0 { // then nobody needs a header
		if !bytes.Equal(blob[:128], bytes.Repeat([]byte{0xA5}, 128)) {
			return nil, sampled, errors.New("a header, although the blob is not complete")
		}
		copy(blob, head[:])
		return blob, sampled, nil
	}
	rest := byte(0)
	if in.keep {
		rest = 0xA5
	}
	if !bytes.Equal(blob[len(want):], bytes.Repeat([]byte{rest}, 16*in.room)) {
		return nil, sampled, fmt.Errorf("behind the blob are %x, not %x", blob[len(want):], rest)
	}
	return blob[:len(want)], sampled, nil
}

func TestCompress(t *testing.T) {
	for _, warps := range []int{1, 2, 3} {
		t.Run(fmt.Sprintf("warps=%d", warps), func(t *testing.T) {
			t.Parallel()
			c := newCompressor(t, kernels.Sources, warps)
			t.Run("windows", func(t *testing.T) {
				for i, seed := range seeds(t, 2) {
					for _, mk := range [][2]int{{64, 640}, {33, 634}} {
						in := compressCase{x: windows(mk[0], mk[1], seed), blocks: 1 + i, room: i, ld: mk[1] + mk[1]%8, spare: 8, seed: seed}
						got, _, err := c.run(t, in)
						require.NoError(t, err)
						requireSameBlob(t, encodeTiled(in.x), got, fmt.Sprintf("%v, seed %d", mk, seed))
					}
				}
			})
			for _, s := range [][2]int{{1, 1}, {1, 64}, {64, 1}, {64, 64}, {65, 63}, {63, 65}, {128, 320}, {77, 300}} {
				for kind := range kinds {
					t.Run(fmt.Sprintf("%dx%d,%s", s[0], s[1], kind), func(t *testing.T) {
						for i, seed := range seeds(t, 1) {
							in := compressCase{x: newMatrix(kind, s[0], s[1], seed), blocks: 1 + int(seed%3), room: int(seed % 3), ld: s[1] + int(seed>>8)%3*4, spare: 8 - 7*(int(seed>>16)&1), seed: seed}
							got, _, err := c.run(t, in)
							require.NoError(t, err)
							requireSameBlob(t, encodeTiled(in.x), got, fmt.Sprintf("schedule %d", i))
						}
					})
				}
			}
		})
	}
}

// The sums of the samples are those of the lists; what does not fit is counted, and what does is as it should be.
func TestCompressRoom(t *testing.T) {
	t.Parallel()
	c := newCompressor(t, kernels.Sources, 2)
	x := lists(300)
	want := encodeTiled(x)
	fixed := 128 + 300*8 + 32 + 300*5632 // 2400 bytes of headers, up to a multiple of 128
	var all, few sums
	for tile := range 300 {
		n := uint32(x.list(tile))
		all.units, all.squares = all.units+n, all.squares+n*n
	}
	in := compressCase{x: x, blocks: 7, ld: x.k, seed: seeds(t, 1)[0]}
	got, sampled, err := c.run(t, in)
	require.NoError(t, err)
	require.Equal(t, all, sampled)
	require.EqualValues(t, len(want)-fixed, 16*sampled.units)
	requireSameBlob(t, want, got, "exact room")

	in.samples = 100 // one of each three tiles
	_, few, err = c.run(t, in)
	require.NoError(t, err)
	require.InDelta(t, float64(all.units)/3, float64(few.units), float64(all.units)/12)
	require.NotEqual(t, all.units, 3*few.units, "not every third one: the odd tiles would be missed, or the even ones")

	for _, room := range []int{5, 200, -1, -17} {
		in.room, in.keep = room, room == 200
		got, _, err = c.run(t, in)
		require.NoError(t, err)
		end := len(want) + 16*min(room, 0)
		begin := end // of the list that does not fit
		for size, tile := 0, 299; room < 0 && size < -16*room; tile-- {
			size += 16 * x.list(tile)
			begin = len(want) - size
		}
		requireSameBlob(t, want[:begin], got[:begin], fmt.Sprint("room ", room))
	}
	in.room, in.keep, in.count = 0, false, true
	head, _, err := c.run(t, in)
	require.NoError(t, err)
	require.Equal(t, want[:128], head, "sizes and checksum only")
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
		"a dropped wait in the list":        {"encode.cuh", "        __syncwarp();\n        const uint32_t here", "        const uint32_t here"},
		"factors of the first row of tiles": {"compress.cu", "row_factor(row0 + ", "row_factor("},
		"a weight forgotten":                {"compress.cu", "x.count(row0, col0), plan", "x.count(row0, col0) - 1, plan"},
		"offsets not advanced":              {"compress.cu", "start + through - own", "start"},
		"padding left as it was read":       {"compress.cu", "if (!whole) pad_warp_tile", "if (false) pad_warp_tile"},
		"a dense list's chunks in turn":     {"encode.cuh", "swizzle_chunk(i / 8, i % 8)", "16 * i"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newCompressor(t, mutant(t, m[0], m[1], m[2]), 2)
			for i, x := range []matrix{windows(70, 640, 0), newMatrix("outliers", 70, 200, 0), newMatrix("every position", 70, 200, 1)} {
				for seed := range uint64(2) {
					in := compressCase{x: x, blocks: 1 + i, room: i % 2, ld: x.k, spare: 8, seed: seed}
					got, _, err := c.run(t, in)
					if err != nil || !bytes.Equal(encodeTiled(in.x), got) {
						return
					}
				}
			}
			t.Fatal("not caught")
		})
	}
}
