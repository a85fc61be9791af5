// SPDX-License-Identifier: Apache-2.0

package codec

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/zipserv/zipserv/core/format"
)

// BenchmarkCodec measures each set of kernels against a copy of the same weights by all cores, in turns in the same run, and reports GB/s of
// 16-bit weights (medians) and the roofline: what the memory traffic of the task would cost at the speed of the copy. A copy moves 2 bytes
// for each byte of weights; encoding reads the weights twice and writes the blob, decoding reads the blob and writes the weights.
func BenchmarkCodec(b *testing.B) {
	ctx := context.Background()
	const m, k = 8192, 4096 // 64 MiB, twice the largest cache of most machines
	src := weights("gaussian", m*k)
	for _, set := range kernelSets() {
		b.Run(fmt.Sprintf("%s-%d-cores", set.name, runtime.GOMAXPROCS(0)), func(b *testing.B) {
			use(b, set)
			blob, out := encodeBlob(b, src, format.BF16, m, k), make([]byte, len(src))
			var copies, encodes, plans, decodes, checks []float64
			for b.Loop() {
				copies = append(copies, seconds(func() error { return copyParallel(ctx, out, src) }))
				var p *Plan
				plans = append(plans, seconds(func() (err error) {
					p, err = NewPlan(ctx, src, format.BF16, []uint64{m, k}, m, k)
					return err
				}))
				encodes = append(encodes, plans[len(plans)-1]+seconds(func() error { return p.Encode(ctx, blob) }))
				v, err := Parse(blob)
				require.NoError(b, err)
				decodes = append(decodes, seconds(func() error { return v.Decode(ctx, out) }))
				checks = append(checks, seconds(func() error { return Check(ctx, blob, true) }))
			}
			require.Equal(b, src, out)
			rate := func(times []float64) float64 {
				slices.Sort(times)
				return float64(len(src)) / times[len(times)/2] / 1e9
			}
			ratio := float64(len(blob)) / float64(len(src))
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(rate(copies), "copy-GB/s")
			b.ReportMetric(rate(plans), "plan-GB/s")
			b.ReportMetric(rate(encodes), "encode-GB/s")
			b.ReportMetric(rate(decodes), "decode-GB/s")
			b.ReportMetric(rate(checks), "check-GB/s")
			b.ReportMetric(100*rate(encodes)/(rate(copies)*2/(2+ratio)), "encode-%roofline")
			b.ReportMetric(100*rate(decodes)/(rate(copies)*2/(1+ratio)), "decode-%roofline")
		})
	}
}

// seconds runs f, which must not fail.
func seconds(f func() error) float64 {
	start := time.Now()
	if err := f(); err != nil {
		panic(err)
	}
	return time.Since(start).Seconds()
}

// BenchmarkTile measures the kernels on one tile that is in the cache: what is left when memory is not the limit.
func BenchmarkTile(b *testing.B) {
	src, fixed := weights("gaussian", tileWeights), make([]byte, fixedBytes)
	for _, set := range kernelSets() {
		s := new(scratch)
		s.factors(0, 0)
		run := func(name string, f func()) {
			b.Run(set.name+"/"+name, func(b *testing.B) {
				b.SetBytes(tileBytes)
				for b.Loop() {
					f()
				}
			})
		}
		var low, high uint8
		run("scan", func() { _, low, high = set.scan(s, src, tileStride, tileRows) })
		run("count-few", func() { set.count(s, high, false) })
		run("count-all", func() { set.count(s, high, true) })
		run("outside", func() { set.outside(s, low, high) })
		run("encode", func() { set.encode(s, fixed, src, tileStride, high-7) })
		run("decode", func() { set.decode(s, s.tile[:], tileStride, fixed, 0, 4, high-7) })
	}
}
