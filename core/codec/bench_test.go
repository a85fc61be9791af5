// SPDX-License-Identifier: Apache-2.0

//go:build unix

package codec

import (
	"context"
	"fmt"
	"math"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/zipserv/zipserv/core/format"
)

// BenchmarkCodec measures each set of kernels against a copy of the same weights by all cores, in turns in the same run, in GB/s of 16-bit weights:
// the best of the wall time and of the processor time (times the cores), since other work on the machine only ever lengthens them. The roofline is what the task's own memory traffic would take at the speed of the copy: a
// copy moves 2 bytes for each byte of weights; encoding reads the weights twice and writes the blob, decoding reads the blob and writes the weights.
func BenchmarkCodec(b *testing.B) {
	ctx := context.Background()
	const m, k = 8192, 4096 // 64 MiB, twice the largest cache of most machines
	src := weights("gaussian", m*k)
	for _, set := range kernelSets() {
		b.Run(fmt.Sprintf("%s-%d-cores", set.name, runtime.GOMAXPROCS(0)), func(b *testing.B) {
			use(b, set)
			blob, out := encodeBlob(b, src, format.BF16, m, k), make([]byte, len(src))
			var copies, plans, encodes, decodes, checks times
			var p *Plan
			for b.Loop() {
				copies.measure(func() error { return copyParallel(ctx, out, src) })
				plans.measure(func() (err error) {
					p, err = NewPlan(ctx, src, format.BF16, []uint64{m, k}, m, k)
					return err
				})
				encodes.measure(func() error { return p.Encode(ctx, blob) })
				v, err := Parse(blob)
				require.NoError(b, err)
				decodes.measure(func() error { return v.Decode(ctx, out) })
				checks.measure(func() error { return Check(ctx, blob, true) })
			}
			require.Equal(b, src, out)
			for i, x := range plans { // encoding is both passes
				encodes[i].wall += x.wall
				encodes[i].cpu += x.cpu
			}
			b.ReportMetric(0, "ns/op")
			ratio := float64(len(blob)) / float64(len(src))
			copied := copies.rate(b, "copy", len(src))
			plans.rate(b, "plan", len(src))
			checks.rate(b, "check", len(src))
			encoded := encodes.rate(b, "encode", len(src))
			b.ReportMetric(100*encoded/(copied*2/(2+ratio)), "encode-%roof")
			decoded := decodes.rate(b, "decode", len(src))
			b.ReportMetric(100*decoded/(copied*2/(1+ratio)), "decode-%roof")
		})
	}
}

type times []struct{ wall, cpu float64 }

// measure runs f, which must not fail.
func (t *times) measure(f func() error) {
	start, cpu := time.Now(), cpuSeconds()
	if err := f(); err != nil {
		panic(err)
	}
	*t = append(*t, struct{ wall, cpu float64 }{time.Since(start).Seconds(), cpuSeconds() - cpu})
}

// rate reports GB/s by the least wall time and by the least processor time.
func (t times) rate(b *testing.B, name string, bytes int) (wall float64) {
	wall, cpu := math.Inf(1), math.Inf(1)
	for _, x := range t {
		wall, cpu = min(wall, x.wall), min(cpu, x.cpu)
	}
	wall = float64(bytes) / 1e9 / wall
	b.ReportMetric(wall, name+"-GB/s")
	b.ReportMetric(float64(bytes)/1e9/cpu*float64(runtime.GOMAXPROCS(0)), name+"-cpu-GB/s")
	return wall
}

// cpuSeconds is the processor time of this process.
func cpuSeconds() float64 {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		panic(err)
	}
	return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e9
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
				start := cpuSeconds()
				for b.Loop() {
					f()
				}
				b.ReportMetric((cpuSeconds()-start)*1e9/float64(b.N), "cpu-ns/op")
			})
		}
		var low, high uint8
		run("scan", func() { _, low, high = set.scan(s, src, tileStride, tileRows) })
		if set.count != nil {
			run("count-few", func() { set.count(s, high, false) })
			run("count-all", func() { set.count(s, high, true) })
			run("outside", func() { set.outside(s, low, high) })
		} else {
			run("histogram", func() { histogram(&s.work.hist, s.exps[:]) })
		}
		run("encode", func() { set.encode(s, fixed, src, tileStride, 113) })
		run("decode", func() { set.decode(s, s.tile[:], tileStride, fixed, 0, 4, 113) })
	}
}
