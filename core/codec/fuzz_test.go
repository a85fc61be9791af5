// SPDX-License-Identifier: Apache-2.0

package codec

import (
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/zipserv/zipserv/core/format"
)

// FuzzBlob feeds any bytes to everything that reads a blob. The header's CRC is made right, so that the fuzzer gets behind it.
func FuzzBlob(f *testing.F) {
	f.Fuzz(func(t *testing.T, blob []byte) {
		_ = tryAll(t, blob)
		if len(blob) >= format.HeaderSize {
			_ = tryAll(t, reseal(append([]byte(nil), blob...)))
		}
	})
}

// FuzzTile lets the fuzzer write one tile's header, list and fixed part into a blob that is right otherwise.
func FuzzTile(f *testing.F) {
	f.Fuzz(func(t *testing.T, header uint64, list, fixed []byte, rows, cols uint8, fp16 bool) {
		m, k := uint64(rows%64)+1, uint64(cols%64)+1
		h := format.Header{DType: format.BF16, Mode: format.Tiled, Shape: []uint64{m, k}, M: m, K: k}
		if fp16 {
			h.DType = format.FP16
		}
		list = list[:min(len(list)/16*16, format.DenseSize)]
		h.EscapeBytes = uint64(len(list))
		sec := h.Sections()
		blob := make([]byte, sec.Total)
		head := h.Marshal()
		copy(blob, head[:])
		le.PutUint64(blob[sec.TileHeaders:], header)
		copy(blob[sec.Fixed:sec.Escapes], fixed)
		copy(blob[sec.Escapes:], list)
		if v, err := Parse(blob); err == nil {
			// Decoding what Check would refuse must be safe, too.
			_ = v.Decode(ctx, make([]byte, 2*m*k))
		}
		checked := Check(ctx, blob, false)
		if checked == nil {
			v, err := Parse(blob)
			require.NoError(t, err)
			require.NoError(t, v.Decode(ctx, make([]byte, 2*m*k)))
		}
	})
}

// FuzzRoundTrip compresses any weights in any shape, with every set of kernels.
func FuzzRoundTrip(f *testing.F) {
	f.Fuzz(func(t *testing.T, data []byte, columns uint16, fill uint16, repeat uint8, fp16 bool) {
		// The data repeats, so that a small input reaches several tiles.
		var src []byte
		for range int(repeat)%64 + 1 {
			src = append(src, data[:min(len(data), 4096)]...)
			src = le.AppendUint16(src, fill)
		}
		n := len(src) / 2
		k := int(columns)%n + 1
		m := n / k
		src = src[:2*m*k]
		dt := format.BF16
		if fp16 {
			dt = format.FP16
		}
		for _, set := range kernelSets() {
			use(t, set)
			roundTrip(t, src, dt, m, k)
		}
	})
}

// FuzzKernels holds the sets of kernels against each other on one tile.
func FuzzKernels(f *testing.F) {
	f.Fuzz(func(t *testing.T, data []byte, base, rows uint8, gap uint8) {
		stride := tileStride + int(gap)
		src := make([]byte, 63*stride+tileStride)
		for i := range src {
			if len(data) > 0 {
				src[i] = data[i%len(data)]
			}
		}
		compareKernels(t, src, stride, base%249, tileRows)
		compareKernels(t, src, stride, 0, int(rows%64)+1)
	})
}

// TestSeedCorpus keeps the seeds in testdata/fuzz in step with the format: ZIPSERV_WRITE_SEEDS=1 go test -run TestSeedCorpus writes them.
func TestSeedCorpus(t *testing.T) {
	fp16 := encodeBlob(t, weights("two-clusters", tileWeights), format.FP16, 64, 64)
	one := encodeBlob(t, weights("outliers", tileWeights), format.BF16, 64, 64)
	edge := encodeBlob(t, weights("gaussian", 60*60), format.BF16, 60, 60)
	raw := encodeBlob(t, weights("random", 77), format.FP16, 7, 11)
	v, err := Parse(one)
	require.NoError(t, err)
	header := strconv.FormatUint(le.Uint64(one[v.sec.TileHeaders:]), 10)
	bytes := func(b []byte) string { return "[]byte(" + strconv.Quote(string(b)) + ")\n" }
	seeds := map[string]string{
		"FuzzBlob/fp16":          bytes(fp16),
		"FuzzBlob/one-tile":      bytes(one),
		"FuzzBlob/padding":       bytes(edge),
		"FuzzBlob/raw":           bytes(raw),
		"FuzzBlob/truncated":     bytes(one[:len(one)-16]),
		"FuzzBlob/header-only":   bytes(one[:128]),
		"FuzzTile/escapes":       "uint64(" + header + ")\n" + bytes(v.escapes()) + bytes(v.fixed(0)) + "byte('?')\nbyte('?')\nbool(false)\n",
		"FuzzTile/dense":         "uint64(72057594037927936)\n" + bytes(make([]byte, 4096)) + bytes(nil) + "byte('?')\nbyte('?')\nbool(false)\n",
		"FuzzTile/fp16":          "uint64(2251799813685248)\n" + bytes(nil) + bytes(nil) + "byte('\\x07')\nbyte(' ')\nbool(true)\n",
		"FuzzRoundTrip/outliers": bytes(weights("outliers", 600)) + "uint16(130)\nuint16(0)\nbyte('\\x14')\nbool(false)\n",
		"FuzzRoundTrip/fp16":     bytes(weights("constant", 64)) + "uint16(63)\nuint16(31744)\nbyte('?')\nbool(true)\n",
		"FuzzRoundTrip/column":   bytes(weights("special", 200)) + "uint16(0)\nuint16(1)\nbyte('\\x01')\nbool(false)\n",
		"FuzzKernels/outliers":   bytes(weights("outliers", 1024)) + "byte('q')\nbyte('\\x05')\nbyte('\\x03')\n",
		"FuzzKernels/random":     bytes(weights("random", 999)) + "byte('\\x00')\nbyte('?')\nbyte('\\x00')\n",
	}
	for name, seed := range seeds {
		path := filepath.Join("testdata", "fuzz", name)
		want := "go test fuzz v1\n" + seed
		if os.Getenv("ZIPSERV_WRITE_SEEDS") != "" {
			require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
			require.NoError(t, os.WriteFile(path, []byte(want), 0o644))
		}
		got, err := os.ReadFile(path)
		require.NoError(t, err)
		require.Equal(t, want, string(got), path)
	}
}
