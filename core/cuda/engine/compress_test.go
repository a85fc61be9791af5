// SPDX-License-Identifier: Apache-2.0

package engine_test

import (
	"encoding/binary"
	"fmt"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/zipserv/zipserv/core/cuda/driver"
	"github.com/zipserv/zipserv/core/cuda/drivertest"
	"github.com/zipserv/zipserv/core/cuda/engine"
	"github.com/zipserv/zipserv/core/format"
)

// hostMemory is memory that the fake takes for device memory.
func hostMemory(t *testing.T, f *drivertest.Fake, bytes uint64) driver.Pointer {
	t.Helper()
	ctx, err := f.Open().PrimaryContext(0)
	require.NoError(t, err)
	p, err := ctx.AllocFilled(0, bytes, 0)
	require.NoError(t, err)
	return p
}

func TestCompress(t *testing.T) {
	f, e := open(t)
	d := device(t, e, 0)
	scratch := hostMemory(t, f, d.CompressScratch(1000, 777))
	blob := hostMemory(t, f, 1<<20)
	ctx, err := f.Open().PrimaryContext(0)
	require.NoError(t, err)
	results := func(units, other uint32) { // what the kernels would write
		t.Helper()
		require.NoError(t, ctx.Write(0, scratch, binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, units), other)))
	}
	const tiles, checksum = 208, 0xC0FFEE // all of them are samples
	fixed := format.TiledSections(format.BF16, 1000, 777, 0).Total
	first := engine.Compression{Src: 0x4000, Ld: 777, Header: format.Header{M: 1000, K: 777, Shape: []uint64{1000, 777}}, Scratch: scratch}
	_, err = d.CompressPlan(&first) // allocates the mails
	require.NoError(t, err)
	for name, c := range map[string]struct {
		guess, units uint32
		mode         format.Mode
		fail         string // a call of the driver that tells code from now on
		code         int
		waiting      int // for the stream, each time
	}{
		"small lists":              {guess: 50, units: 50, mode: format.Tiled},
		"smaller than guessed":     {guess: 50, units: 40, mode: format.Tiled},
		"larger than guessed":      {guess: 50, units: 51, mode: format.Tiled},
		"lists that eat the gain":  {guess: 1 << 20, units: 1 << 20, mode: format.Raw},
		"a guess too high":         {guess: 1 << 20, units: 50, mode: format.Tiled},
		"a guess too low":          {guess: 50, units: 1 << 20, mode: format.Raw},
		"results without mail":     {guess: 50, units: 50, mode: format.Tiled, fail: "mail", code: 1, waiting: 1},
		"a stream with much to do": {guess: 50, units: 50, mode: format.Tiled, fail: "cuStreamQuery", code: 600, waiting: 2},
	} {
		t.Run(name, func(t *testing.T) {
			f.Reset()
			if c.fail != "" {
				f.Fail(c.fail, c.code, 0)
			}
			require.NoError(t, ctx.Write(0, blob, make([]byte, format.HeaderSize)))
			p := engine.Compression{Stream: 0x88, Src: 0x4000, Ld: 800, Header: format.Header{M: 1000, K: 777, Shape: []uint64{1000, 777}}, Scratch: scratch}
			results(c.guess, 0)
			room, err := d.CompressPlan(&p)
			require.NoError(t, err)
			to := blob
			if c.guess > 1000 {
				assert.Zero(t, room)
				to = 0
			} else {
				assert.Equal(t, fixed+16*uint64(c.guess), room)
			}
			results(c.units, checksum)
			require.NoError(t, d.CompressWrite(&p, to, room))
			assert.Equal(t, c.mode, p.Header.Mode)
			assert.EqualValues(t, checksum, p.Header.Checksum)
			nbytes := p.Header.Sections().Total
			if c.mode == format.Tiled {
				assert.Equal(t, fixed+16*uint64(c.units), nbytes)
			}
			require.Len(t, launches(f), 2)
			assert.Contains(t, launches(f)[0], fmt.Sprintf("zs_compress_sample grid %d,1,1 block 128", tiles/4))
			assert.Contains(t, launches(f)[1], fmt.Sprintf("zs_compress grid %d,1,1 block 160", tiles/4))
			assert.Equal(t, []bool{false, false}, early(f))
			assert.Equal(t, 2*c.waiting, count(f, "synchronize"))
			// The kernel gets a header whose size and checksum it fills in.
			given := p.Header
			given.Mode, given.EscapeBytes, given.Checksum = format.Tiled, 0, 0
			want := given.Marshal()
			_, args, _ := strings.Cut(launches(f)[1], " args ")
			fields := strings.Fields(args)
			units := (room - fixed) / 16
			if to == 0 {
				units = 0
			}
			assert.Equal(t, fmt.Sprintf("%x %x %x", to, units, room/64/16), strings.Join(fields[6:9], " "), "blob, room, what is cleared behind it")
			fields = fields[9:]
			require.Len(t, fields, len(want)/8)
			var got []byte
			for _, field := range fields {
				word, err := strconv.ParseUint(field, 16, 64)
				require.NoError(t, err)
				got = binary.LittleEndian.AppendUint64(got, word)
			}
			assert.Equal(t, want[:], got)
			head := make([]byte, format.HeaderSize)
			require.NoError(t, ctx.Read(0, head, blob))
			assert.Equal(t, make([]byte, format.HeaderSize), head, "no header by the host, of a blob that may not be there")
			if c.mode == format.Tiled && nbytes > room {
				require.NoError(t, d.CompressWrite(&p, blob, nbytes))
				assert.Equal(t, c.mode, p.Header.Mode)
				assert.Equal(t, nbytes, p.Header.Sections().Total)
			}
			if c.mode == format.Raw {
				require.NoError(t, d.CompressRaw(&p, blob))
				require.NoError(t, ctx.Read(0, head, blob))
				h, err := format.ParseHeader(head)
				require.NoError(t, err)
				assert.Equal(t, p.Header, h)
			}
		})
	}
	var wrong engine.ArgumentError
	for _, h := range []format.Header{{M: 0, K: 5, Shape: []uint64{0, 5}}, {M: 4, K: 5, Shape: []uint64{4, 6}}, {M: 4, K: 900, Shape: []uint64{4, 900}}} {
		p := engine.Compression{Ld: 800, Header: h, Scratch: scratch}
		_, err := d.CompressPlan(&p)
		assert.ErrorAs(t, err, &wrong)
		assert.ErrorAs(t, d.CompressWrite(&p, 0, 0), &wrong)
	}
	p := engine.Compression{Ld: 800, Header: format.Header{M: 1000, K: 777, Shape: []uint64{1000, 777}}, Scratch: scratch}
	assert.ErrorAs(t, d.CompressWrite(&p, blob+8, fixed), &wrong)
	assert.ErrorAs(t, d.CompressWrite(&p, blob, fixed-1), &wrong)
	p.Scratch += 8
	assert.ErrorAs(t, d.CompressWrite(&p, 0, 0), &wrong)
	large := engine.Compression{Ld: 1 << 25, Header: format.Header{M: 1 << 11, K: 1 << 25, Shape: []uint64{1 << 11, 1 << 25}}, Scratch: scratch}
	_, err = d.CompressPlan(&large)
	assert.ErrorAs(t, err, &wrong)
}
