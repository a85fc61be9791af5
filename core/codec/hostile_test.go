// SPDX-License-Identifier: Apache-2.0

package codec

import (
	"context"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/zipserv/zipserv/core/format"
)

// reseal gives a blob whose header was changed a right CRC again, as an attacker would.
func reseal(blob []byte) []byte {
	le.PutUint32(blob[124:], crc32.Checksum(blob[:124], crc32.MakeTable(crc32.Castagnoli)))
	return blob
}

// tryAll tries everything a caller may do with bytes that it does not trust. Nothing may panic; what Check accepts must decode.
func tryAll(t testing.TB, blob []byte) (checked error) {
	checked = Check(ctx, blob, false)
	full := Check(ctx, blob, true)
	v, err := Parse(blob)
	if err != nil {
		require.ErrorIs(t, err, format.ErrInvalid)
		require.ErrorIs(t, checked, format.ErrInvalid)
		require.ErrorIs(t, full, format.ErrInvalid)
		return checked
	}
	// Parse has bound M K: a tiled blob has 5632 bytes for 4096 weights, so the decoded matrix is no more than 1.5 times the blob.
	n := 2 * v.Header.M * v.Header.K
	require.LessOrEqual(t, n, 3*uint64(len(blob))/2)
	out := make([]byte, n)
	decoded := v.Decode(ctx, out)
	if checked == nil {
		require.NoError(t, decoded)
		sum, err := Checksum(ctx, out, v.Header.M, v.Header.K)
		require.NoError(t, err)
		require.Equal(t, sum == v.Header.Checksum, full == nil)
	} else {
		require.ErrorIs(t, checked, format.ErrInvalid)
		require.Error(t, full)
	}
	d := NewPanelDecoder(v)
	_, err = d.Bits16(v.Panels()-1, out)
	if checked == nil {
		require.NoError(t, err)
	}
	_, _ = v.Stats(ctx)
	return checked
}

// tiled is a blob with escapes, literals and padding: 120 x 250 weights in 2 x 4 tiles, of which the last has padding.
func tiled(t testing.TB, dt format.DType) []byte {
	const m, k = 120, 250
	src := weights("gaussian", m*k)
	rng := rand.New(rand.NewPCG(5, 6))
	if dt == format.FP16 {
		for i := range m * k {
			le.PutUint16(src[2*i:], uint16(8+rng.IntN(8))<<10|uint16(rng.Uint32())&0x83FF)
		}
	}
	for i := range 40 {
		le.PutUint16(src[2*(i*613):], uint16(rng.Uint32()))
	}
	blob := encodeBlob(t, src, dt, m, k)
	v, err := Parse(blob)
	require.NoError(t, err)
	st, err := v.Stats(ctx)
	require.NoError(t, err)
	require.Equal(t, format.Tiled, v.Header.Mode)
	require.NotZero(t, st.Escapes)
	require.NotZero(t, st.Literals)
	return blob
}

func dense(t testing.TB) []byte {
	const m, k = 128, 256
	src := weights("constant", m*k)
	random := weights("random", tileWeights)
	for r := range 64 {
		copy(src[2*(r*k+64):][:128], random[128*r:])
	}
	blob := encodeBlob(t, src, format.BF16, m, k)
	v, err := Parse(blob)
	require.NoError(t, err)
	st, err := v.Stats(ctx)
	require.NoError(t, err)
	require.EqualValues(t, 1, st.DenseTiles)
	return blob
}

func TestTruncatedAndOverlong(t *testing.T) {
	for _, blob := range [][]byte{tiled(t, format.BF16), tiled(t, format.FP16), dense(t), encodeBlob(t, weights("random", 100), format.BF16, 10, 10)} {
		require.NoError(t, tryAll(t, blob))
		for n := 0; n < len(blob); n += 1 + n/50 {
			require.Error(t, tryAll(t, blob[:n:n]), "%d of %d bytes", n, len(blob))
		}
		require.Error(t, tryAll(t, blob[:len(blob)-1]))
		require.Error(t, tryAll(t, append(slices.Clone(blob), 0)))
	}
}

// One flipped bit anywhere is found by the full check: in the header by its CRC, elsewhere by the rules or the checksum.
func TestEveryFlippedBitIsFound(t *testing.T) {
	rng := rand.New(rand.NewPCG(9, 9))
	for _, blob := range [][]byte{tiled(t, format.BF16), tiled(t, format.FP16), dense(t), encodeBlob(t, weights("random", 100), format.BF16, 10, 10)} {
		for i := 0; i < len(blob); i += 1 + rng.IntN(700)*min(i/256, 1) {
			bit := byte(1) << rng.IntN(8)
			blob[i] ^= bit
			_ = tryAll(t, blob)
			require.ErrorIs(t, Check(ctx, blob, true), format.ErrInvalid, "bit %#x of byte %d", bit, i)
			blob[i] ^= bit
		}
	}
}

func TestLyingHeaders(t *testing.T) {
	for name, lie := range map[string]func(h []byte){
		"a later version":        func(h []byte) { h[8] = 2 },
		"no dtype":               func(h []byte) { h[12] = 0 },
		"another dtype":          func(h []byte) { h[12] = 2 },
		"unknown dtype":          func(h []byte) { h[12] = 3 },
		"raw":                    func(h []byte) { h[13] = 0 },
		"unknown mode":           func(h []byte) { h[13] = 2 },
		"no dimensions":          func(h []byte) { h[14] = 0 },
		"nine dimensions":        func(h []byte) { h[14] = 9 },
		"one dimension more":     func(h []byte) { h[14]++ },
		"one dimension less":     func(h []byte) { h[14]-- },
		"reserved byte":          func(h []byte) { h[15] = 1 },
		"reserved tail":          func(h []byte) { h[115] = 1 },
		"unused dimension":       func(h []byte) { h[88] = 1 },
		"M is 0":                 func(h []byte) { le.PutUint64(h[16:], 0) },
		"K is 0":                 func(h []byte) { le.PutUint64(h[24:], 0) },
		"M and K swapped":        func(h []byte) { copy(h[16:32], append(slices.Clone(h[24:32]), h[16:24]...)) },
		"M too large":            func(h []byte) { le.PutUint64(h[16:], 1<<31); le.PutUint64(h[32:], 1<<31) },
		"largest matrix":         func(h []byte) { putMatrix(h, 1<<31-1, 1<<31-1) },
		"large matrix":           func(h []byte) { putMatrix(h, 1<<20, 1<<20) },
		"M K wraps":              func(h []byte) { putMatrix(h, 1<<63+1, 1<<63+1) },
		"shape wraps":            func(h []byte) { le.PutUint64(h[32:], 1<<63+60); le.PutUint64(h[40:], 500) },
		"shape is 0":             func(h []byte) { le.PutUint64(h[32:], 0) },
		"one tile more":          func(h []byte) { putMatrix(h, 129, 250) },
		"escapes missing":        func(h []byte) { le.PutUint64(h[96:], 0) },
		"escapes too many":       func(h []byte) { le.PutUint64(h[96:], le.Uint64(h[96:])+16) },
		"escapes odd":            func(h []byte) { le.PutUint64(h[96:], le.Uint64(h[96:])+1) },
		"escapes wrap":           func(h []byte) { le.PutUint64(h[96:], ^uint64(0)-15) },
		"escapes wrap the total": func(h []byte) { le.PutUint64(h[96:], le.Uint64(h[96:])-1<<63) },
	} {
		t.Run(name, func(t *testing.T) {
			blob := tiled(t, format.BF16)
			lie(blob)
			require.Error(t, tryAll(t, blob), "without a new CRC")
			require.ErrorIs(t, tryAll(t, reseal(blob)), format.ErrInvalid)
		})
	}
	blob := tiled(t, format.BF16)
	blob[104] ^= 1
	require.NoError(t, tryAll(t, reseal(blob)))
	require.ErrorContains(t, Check(ctx, blob, true), "checksum")
}

func putMatrix(h []byte, m, k uint64) {
	le.PutUint64(h[16:], m)
	le.PutUint64(h[24:], k)
	le.PutUint64(h[32:], m)
	le.PutUint64(h[40:], k)
}

// Tile headers and lists that lie. Tile 0 of the blob is whole, tile 7 has padding.
func TestLyingTiles(t *testing.T) {
	type parts struct {
		blob          []byte
		headers       []byte // of all tiles
		fixed         []byte
		escapes       []byte
		first, second format.TileHeader
	}
	for name, lie := range map[string]func(p *parts){
		"unknown flag":              func(p *parts) { p.headers[7] = 2 },
		"dense without room":        func(p *parts) { p.headers[8*7+7] = 1; p.headers[8*7+6] = 0; le.PutUint16(p.headers[8*7+4:], 0) },
		"dense with a base":         func(p *parts) { p.headers[7] = 1; le.PutUint16(p.headers[4:], 0) },
		"dense with escapes":        func(p *parts) { p.headers[7] = 1; p.headers[6] = 0 },
		"base too large":            func(p *parts) { p.headers[6] = 249 },
		"first offset not 0":        func(p *parts) { p.headers[0] = 1 },
		"offset overlaps":           func(p *parts) { le.PutUint32(p.headers[8:], p.second.EscOffset-1) },
		"offset leaves a gap":       func(p *parts) { le.PutUint32(p.headers[8:], p.second.EscOffset+1) },
		"offset far behind the end": func(p *parts) { le.PutUint32(p.headers[8:], 1<<32-1) },
		"more escapes":              func(p *parts) { le.PutUint16(p.headers[4:], p.first.EscCount+16) },
		"escapes to 65535":          func(p *parts) { le.PutUint16(p.headers[4:], 65535) },
		"escapes to 4096":           func(p *parts) { le.PutUint16(p.headers[4:], 4096) },
		"last list too long":        func(p *parts) { le.PutUint16(p.headers[8*7+4:], 4000) },
		"bytes behind tile headers": func(p *parts) { p.headers[64] = 1 },
		"positions fall":            func(p *parts) { swap2(p.escapes, 2*int(p.first.EscCount)-2, 2*int(p.first.EscCount)-4) },
		"position twice":            func(p *parts) { copy(p.escapes[2*int(p.first.EscCount)-2:][:2], p.escapes[2*int(p.first.EscCount)-4:]) },
		"literal behind symbols":    func(p *parts) { p.escapes[2*int(p.first.EscCount)-1] |= 0xF0 },
		"code at an escape": func(p *parts) {
			entry := le.Uint16(p.escapes[2*int(p.first.EscCount)-2:])
			o, bit := format.PlaceOf(int(entry>>6&63), int(entry&63)).PlaneBit(1)
			p.fixed[format.BitmapOffset+o+bit/8] |= 1 << (bit % 8)
		},
		"padding with a code": func(p *parts) {
			o, bit := format.PlaceOf(63, 63).PlaneBit(2)
			p.fixed[7*fixedBytes+format.BitmapOffset+o+bit/8] |= 1 << (bit % 8)
		},
		"padding with a sign": func(p *parts) {
			o, _ := format.PlaceOf(63, 63).SignMantissa()
			p.fixed[7*fixedBytes+o] |= 0x80
		},
		"exponent below 0": func(p *parts) { p.headers[6] = 0 },
	} {
		t.Run(name, func(t *testing.T) {
			blob := tiled(t, format.BF16)
			v, err := Parse(blob)
			require.NoError(t, err)
			require.EqualValues(t, 8, v.sec.Tiles)
			p := &parts{blob: blob, headers: blob[v.sec.TileHeaders:v.sec.Fixed], fixed: blob[v.sec.Fixed:v.sec.Escapes], escapes: blob[v.sec.Escapes:]}
			p.first, p.second = format.ReadTileHeader(p.headers), format.ReadTileHeader(p.headers[8:])
			require.Greater(t, p.first.EscCount, uint16(10))
			lie(p)
			require.ErrorIs(t, tryAll(t, blob), format.ErrInvalid)
		})
	}
	t.Run("literal that has a symbol", func(t *testing.T) {
		src := weights("constant", tileWeights)
		le.PutUint16(src[200:], 0)
		blob := encodeBlob(t, src, format.BF16, 64, 64)
		require.NoError(t, tryAll(t, blob))
		for _, e := range []byte{120, 127, 119, 108, 130} { // the base is 120
			blob[len(blob)-14] = e
			require.ErrorContains(t, tryAll(t, blob), "has a code or a symbol", "%d", e)
		}
		blob[len(blob)-14] = 131
		require.NoError(t, tryAll(t, blob))
		require.ErrorContains(t, Check(ctx, blob, true), "checksum")
		blob[len(blob)-13] = 1
		require.ErrorContains(t, tryAll(t, blob), "behind an escape list")
	})
	t.Run("dense tile", func(t *testing.T) {
		v, err := Parse(dense(t))
		require.NoError(t, err)
		v.fixed(1)[format.BitmapOffset+9] = 4
		require.ErrorContains(t, tryAll(t, v.blob), "dense tile has code bits")
	})
	t.Run("one position in both groups", func(t *testing.T) {
		src := weights("constant", tileWeights)
		le.PutUint16(src[200:], 0)
		le.PutUint16(src[300:], 119<<7)
		blob := encodeBlob(t, src, format.BF16, 64, 64)
		list := blob[len(blob)-16:]
		list[2], list[3] = list[0], list[3]&0xF0|list[1]&0x0F
		require.ErrorContains(t, tryAll(t, blob), "two escapes")
	})
}

func swap2(b []byte, i, j int) {
	x := [2]byte(b[i:])
	copy(b[i:i+2], b[j:j+2])
	copy(b[j:], x[:])
}

func TestBadArguments(t *testing.T) {
	src := weights("gaussian", 4096)
	for name, f := range map[string]func() error{
		"too few bytes": func() error { _, err := NewPlan(ctx, src[:8190], format.BF16, []uint64{64, 64}, 64, 64); return err },
		"too many bytes": func() error {
			_, err := NewPlan(ctx, append(src, 0), format.BF16, []uint64{64, 64}, 64, 64)
			return err
		},
		"no rows":         func() error { _, err := NewPlan(ctx, nil, format.BF16, []uint64{0, 64}, 0, 64); return err },
		"shape":           func() error { _, err := NewPlan(ctx, src, format.BF16, []uint64{64, 63}, 64, 64); return err },
		"dtype":           func() error { _, err := NewPlan(ctx, src, 7, []uint64{64, 64}, 64, 64); return err },
		"dimensions":      func() error { _, err := NewPlan(ctx, src, format.BF16, make([]uint64, 9), 64, 64); return err },
		"checksum matrix": func() error { _, err := Checksum(ctx, src, 1<<62, 1<<62); return err },
	} {
		t.Run(name, func(t *testing.T) { require.ErrorIs(t, f(), format.ErrArgument) })
	}
	p, err := NewPlan(ctx, src, format.BF16, []uint64{64, 64}, 64, 64)
	require.NoError(t, err)
	require.ErrorIs(t, p.Encode(ctx, make([]byte, p.Size()-1)), format.ErrArgument)
	for _, shape := range [][2]uint64{{64, 64}, {1, 4096}} { // tiled, raw
		v, err := Parse(encodeBlob(t, src, format.BF16, shape[0], shape[1]))
		require.NoError(t, err)
		m, k, out := v.Header.M, v.Header.K, make([]byte, 8192)
		require.ErrorIs(t, v.Decode(ctx, out[1:]), format.ErrArgument)
		require.ErrorIs(t, v.DecodeRows(ctx, 1, 0, out, k), format.ErrArgument)
		require.ErrorIs(t, v.DecodeRows(ctx, 0, m+1, out, k), format.ErrArgument)
		require.ErrorIs(t, v.DecodeRows(ctx, 0, m, out, k-1), format.ErrArgument)
		require.ErrorIs(t, v.DecodeRows(ctx, 0, 1, out, 1<<63), format.ErrArgument)
		require.ErrorIs(t, v.DecodeRows(ctx, 0, m, out[2:], k), format.ErrArgument)
		require.NoError(t, v.DecodeRows(ctx, m, m, nil, k))
		d := NewPanelDecoder(v)
		_, err = d.Bits16(v.Panels(), out)
		require.ErrorIs(t, err, format.ErrArgument)
		_, err = d.Bits16(0, out[:10])
		require.ErrorIs(t, err, format.ErrArgument)
		_, err = d.Float32(0, make([]float32, 10))
		require.ErrorIs(t, err, format.ErrArgument)
	}
}

// Weights that change between the passes must not make the encoder write where it should not.
func TestChangedWeights(t *testing.T) {
	for _, name := range []string{"random", "zero", "outliers"} {
		src := weights("gaussian", 256*256)
		p, err := NewPlan(ctx, src, format.BF16, []uint64{256, 256}, 256, 256)
		require.NoError(t, err)
		copy(src, weights(name, 256*256))
		require.ErrorContains(t, p.Encode(ctx, make([]byte, p.Size())), "changed")
	}
}

func TestCancel(t *testing.T) {
	const m, k = 4096, 2048
	src := weights("gaussian", m*k)
	blob, out := encodeBlob(t, src, format.BF16, m, k), make([]byte, len(src))
	v, err := Parse(blob)
	require.NoError(t, err)
	p, err := NewPlan(ctx, src, format.BF16, []uint64{m, k}, m, k)
	require.NoError(t, err)
	raw, err := Parse(encodeBlob(t, weights("random", m*k), format.BF16, m, k))
	require.NoError(t, err)
	for name, f := range map[string]func(ctx context.Context) error{
		"plan": func(ctx context.Context) error {
			_, err := NewPlan(ctx, src, format.BF16, []uint64{m, k}, m, k)
			return err
		},
		"encode": func(ctx context.Context) error { return p.Encode(ctx, blob) },
		"decode": func(ctx context.Context) error { return v.Decode(ctx, out) },
		"check":  func(ctx context.Context) error { return Check(ctx, blob, true) },
		"raw":    func(ctx context.Context) error { return raw.Decode(ctx, out) },
		"sum":    func(ctx context.Context) error { _, err := Checksum(ctx, src, m, k); return err },
	} {
		t.Run(name, func(t *testing.T) {
			done, cancel := context.WithCancel(ctx)
			cancel()
			require.ErrorIs(t, f(done), context.Canceled)
			// In the middle: the call ends early, or just before the cancellation.
			soon, cancel := context.WithTimeout(ctx, 200*time.Microsecond)
			defer cancel()
			if err := f(soon); err != nil {
				require.ErrorIs(t, err, context.DeadlineExceeded)
			}
			require.NoError(t, f(ctx))
		})
	}
}

// What a call allocates does not grow with the tiles, but for the plan's own 12 bytes a tile.
func TestAllocations(t *testing.T) {
	blobs := map[int][]byte{}
	for _, m := range []int{1024, 8192} {
		src := weights("gaussian", m*512)
		p, err := NewPlan(ctx, src, format.BF16, []uint64{uint64(m), 512}, uint64(m), 512)
		require.NoError(t, err)
		blobs[m] = make([]byte, p.Size())
		require.NoError(t, p.Encode(ctx, blobs[m]))
		v, err := Parse(blobs[m])
		require.NoError(t, err)
		for name, f := range map[string]func() error{
			"plan": func() error {
				_, err := NewPlan(ctx, src, format.BF16, []uint64{uint64(m), 512}, uint64(m), 512)
				return err
			},
			"encode": func() error { return p.Encode(ctx, blobs[m]) },
			"decode": func() error { return v.Decode(ctx, src) },
			"check":  func() error { return Check(ctx, blobs[m], true) },
		} {
			var before, after runtime.MemStats
			require.NoError(t, f())
			runtime.ReadMemStats(&before)
			require.NoError(t, f())
			runtime.ReadMemStats(&after)
			require.Less(t, after.Mallocs-before.Mallocs, uint64(60), "%s of %d rows", name, m)
			require.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(256<<10), "%s of %d rows", name, m)
		}
	}
}

func ExamplePanelDecoder() {
	src := make([]byte, 2*128*256) // zeros
	p, _ := NewPlan(context.Background(), src, format.BF16, []uint64{128, 256}, 128, 256)
	blob := make([]byte, p.Size())
	_ = p.Encode(context.Background(), blob)

	v, _ := Parse(blob)
	d, panel := NewPanelDecoder(v), make([]float32, PanelRows*256)
	for i := range v.Panels() {
		rows, err := d.Float32(i, panel)
		fmt.Println(rows, panel[:rows*256][255], err)
	}
	// Output:
	// 64 0 <nil>
	// 64 0 <nil>
}
