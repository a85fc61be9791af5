// SPDX-License-Identifier: Apache-2.0

package emu_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/bits"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/zipserv/zipserv/kernels/emu"
)

var le = binary.LittleEndian

// program compiles all kernels of a file of testdata.
func program(t *testing.T, file string) *emu.Program {
	t.Helper()
	text, err := os.ReadFile("testdata/" + file)
	require.NoError(t, err)
	var names []string
	for _, m := range regexp.MustCompile(`__global__ void (\w+)\(`).FindAllStringSubmatch(string(text), -1) {
		names = append(names, m[1])
	}
	p, err := emu.Compile(emu.Source{Files: os.DirFS("testdata"), Main: file, Kernels: names})
	require.NoError(t, err)
	return p
}

func words(n int, f func(i int) uint32) []byte {
	b := make([]byte, 4*n)
	for i := range n {
		le.PutUint32(b[4*i:], f(i))
	}
	return b
}

func word(b []byte, i int) uint32 { return le.Uint32(b[4*i:]) }

func zeros(name string, n int) *emu.Buffer {
	return &emu.Buffer{Name: name, Data: make([]byte, 4*n), Mode: emu.InOut}
}

func result(name string, n int) *emu.Buffer {
	return &emu.Buffer{Name: name, Data: make([]byte, 4*n), Mode: emu.Out}
}

func input(n int) *emu.Buffer {
	return &emu.Buffer{Name: "in", Data: words(n, func(i int) uint32 { return uint32(i*i) ^ 0x5A5A }), Mode: emu.In}
}

// run launches under several schedules.
func run(t *testing.T, p *emu.Program, launch func() emu.Launch, check func(l emu.Launch)) {
	t.Helper()
	for seed := range uint64(8) {
		l := launch()
		l.Seed = seed + 1
		_, err := p.Run(context.Background(), l)
		require.NoError(t, err)
		check(l)
	}
}

func data(l emu.Launch, arg int) []byte { return l.Args[arg].(*emu.Buffer).Data }

func TestWarpFunctions(t *testing.T) {
	t.Parallel()
	p := program(t, "good.cu")
	run(t, p, func() emu.Launch {
		return emu.Launch{Kernel: "warp_functions", Block: [3]int{32}, Args: []any{result("out", 512)}}
	}, func(l emu.Launch) {
		for lane := range uint32(32) {
			var sum, xor, fives uint32
			biggest := uint32(0)
			for i := range uint32(32) {
				xor ^= i * i
				biggest = max(biggest, i^21)
				if i/16 == lane/16 {
					sum += i
				}
				if i%5 == lane%5 {
					fives |= 1 << i
				}
			}
			up, down := lane-3, lane+3
			if lane < 3 {
				up = lane
			}
			if lane%16 >= 13 {
				down = lane
			}
			odd := uint32(0)
			if lane%2 == 1 {
				odd = 31
			}
			ffs := uint32(0)
			if lane != 0 {
				ffs = uint32(bits.TrailingZeros32(lane)) + 5
			}
			perm := [4]uint32{0x55114400, 0x55114411, 0x55114422, 0x55114433}[lane%4]
			want := []uint32{15, up, down, lane ^ 9, 0x49249249, fives, 496, biggest, 1, 1, sum, odd, perm,
				ffs<<16 | uint32(bits.LeadingZeros32(lane))<<8 | uint32(bits.OnesCount32(lane)), math.Float32bits(4), xor}
			for i, w := range want {
				require.Equal(t, w, word(data(l, 0), int(lane)*16+i), "lane %d, result %d", lane, i)
			}
		}
	})
}

func TestBulkCopies(t *testing.T) {
	t.Parallel()
	p := program(t, "good.cu")
	for _, kernel := range []string{"bulk_ring2", "bulk_ring5", "over_loads_of_readers", "over_loads_by_copier"} {
		for _, chunks := range []int{0, 1, 4, 23} {
			run(t, p, func() emu.Launch {
				return emu.Launch{Kernel: kernel, Block: [3]int{128}, Shared: 5*512 + 80, Args: []any{input(128 * 23), zeros("out", 1), chunks}}
			}, func(l emu.Launch) {
				var want uint32
				for i := range 128 * chunks {
					want += word(data(l, 0), i)
				}
				require.Equal(t, want, word(data(l, 1), 0))
			})
		}
	}
}

func TestCpAsync(t *testing.T) {
	t.Parallel()
	p := program(t, "good.cu")
	for _, rounds := range []int{1, 2, 3, 7} {
		run(t, p, func() emu.Launch {
			return emu.Launch{Kernel: "cp_async_groups", Block: [3]int{64}, Shared: 3 * 1024, Args: []any{input(7 * 256), result("out", 64), rounds}}
		}, func(l emu.Launch) {
			for i := range 64 {
				var want uint32
				for r := range rounds {
					want += uint32(r+1) * word(data(l, 0), (r*64+(i+1)%64)*4+1)
				}
				require.Equal(t, want, word(data(l, 1), i))
			}
		})
	}
	run(t, p, func() emu.Launch {
		return emu.Launch{Kernel: "cp_async_arrive", Block: [3]int{64}, Shared: 520, Args: []any{input(128), result("out", 128), 200}}
	}, func(l emu.Launch) {
		for i := range 128 {
			from := (31-i/4)*4 + i%4
			want := uint32(0)
			if from < 50 {
				want = word(data(l, 0), from)
			}
			require.Equal(t, want, word(data(l, 1), i), "word %d", i)
		}
	})
}

func bf16s(n int, salt int) ([]byte, []float64) {
	b, f := make([]byte, 2*n), make([]float64, n)
	for i := range n {
		v := float32((i*7+salt)%23-11) / 8
		le.PutUint16(b[2*i:], uint16(math.Float32bits(v)>>16))
		f[i] = float64(v)
	}
	return b, f
}

func TestTensorCores(t *testing.T) {
	t.Parallel()
	p := program(t, "good.cu")
	for _, c := range []struct {
		kernel            string
		m, n, k, threads  int
		initial           float64
		shared, alignment int
	}{{"mma_tile", 16, 8, 16, 32, 0, 768, 16}, {"wgmma_tile", 64, 16, 64, 128, 1, 10240, 16}} {
		a, fa := bf16s(c.m*c.k, 1)
		b, fb := bf16s(c.n*c.k, 5)
		run(t, p, func() emu.Launch {
			return emu.Launch{Kernel: c.kernel, Block: [3]int{c.threads}, Shared: c.shared,
				Args: []any{&emu.Buffer{Name: "a", Data: a, Mode: emu.In}, &emu.Buffer{Name: "b", Data: b, Mode: emu.In}, result("d", c.m*c.n)}}
		}, func(l emu.Launch) {
			for i := range c.m {
				for j := range c.n {
					want := c.initial
					for k := range c.k {
						want += fa[i*c.k+k] * fb[j*c.k+k]
					}
					require.Equal(t, float32(want), math.Float32frombits(word(data(l, 2), i*c.n+j)), "%s (%d,%d)", c.kernel, i, j)
				}
			}
		})
	}
}

func TestBlocks(t *testing.T) {
	t.Parallel()
	p := program(t, "good.cu")
	for _, resident := range []int{0, 1, 3} {
		run(t, p, func() emu.Launch {
			return emu.Launch{Kernel: "last_block", Grid: [3]int{7}, Block: [3]int{40}, Shared: 16, Resident: resident,
				Args: []any{input(280), result("partial", 280), zeros("count", 1), zeros("out", 1)}}
		}, func(l emu.Launch) {
			var want uint32
			for i := range 280 {
				want += 3 * word(data(l, 0), i)
			}
			require.Equal(t, want, word(data(l, 3), 0))
		})
	}
	run(t, p, func() emu.Launch {
		return emu.Launch{Kernel: "chain", Grid: [3]int{9}, Block: [3]int{32}, Args: []any{zeros("flags", 9), result("out", 9)}}
	}, func(l emu.Launch) { require.Equal(t, uint32(1+8*9/2), word(data(l, 1), 8)) })
	run(t, p, func() emu.Launch {
		return emu.Launch{Kernel: "barriers", Block: [3]int{128}, Shared: 256, Args: []any{result("out", 320)}}
	}, func(l emu.Launch) {
		for i := range 192 {
			require.Equal(t, uint32(i%64+i/64), word(data(l, 0), i))
		}
		for i := range 128 {
			require.Equal(t, uint32(26), word(data(l, 0), 192+i))
		}
	})
}

// Each mistake is caught, with a kind that says what it is, in every schedule.
func TestMistakesAreCaught(t *testing.T) {
	t.Parallel()
	p := program(t, "bad.cu")
	for kernel, kinds := range map[string]string{
		"bulk_without_wait":             "in-flight race",
		"bulk_wrong_parity":             "in-flight race uninitialised",
		"bulk_too_few_bytes":            "in-flight race mbarrier deadlock",
		"bulk_too_many_bytes":           "deadlock",
		"bulk_over_readers":             "race",
		"bulk_without_init_fence":       "proxy",
		"bulk_over_stores":              "proxy",
		"bulk_over_loads":               "proxy",
		"bulk_over_loads_after_a_fence": "proxy",
		"bulk_over_loads_of_others":     "proxy",
		"bulk_over_loads_of_the_warp":   "proxy",
		"mbarrier_without_barrier":      "race mbarrier",
		"mbarrier_arrives_twice":        "deadlock mbarrier",
		"cp_async_without_wait":         "in-flight",
		"cp_async_without_barrier":      "race in-flight uninitialised",
		"missing_syncthreads":           "race uninitialised",
		"missing_syncwarp":              "race uninitialised",
		"shuffle_is_no_fence":           "race",
		"overwrites_while_read":         "race",
		"unequal_barriers":              "deadlock",
		"barrier_of_two_sizes":          "barrier deadlock",
		"divergent_shuffle":             "divergence",
		"shuffle_without_lanes":         "deadlock",
		"mma_after_return":              "divergence deadlock",
		"global_beyond_end":             "bounds",
		"global_before_start":           "bounds",
		"writes_input":                  "bounds",
		"shared_beyond_end":             "bounds",
		"misaligned_vector":             "alignment",
		"misaligned_plain":              "alignment",
		"never_written":                 "uninitialised",
		"wgmma_without_proxy_fence":     "proxy",
		"wgmma_operand_reused_early":    "race",
		"wgmma_without_fence":           "wgmma",
		"flag_without_release":          "race",
		"flag_without_acquire":          "race",
		"flag_never_set":                "deadlock",
		"flag_never_set_for_a_warp":     "deadlock",
		"no_griddep_wait":               "dependency",
	} {
		t.Run(kernel, func(t *testing.T) {
			t.Parallel()
			for seed := range uint64(6) {
				l := emu.Launch{Kernel: kernel, Block: [3]int{128}, Shared: 4096, Args: []any{input(256), result("out", 256)}, Seed: seed}
				if strings.HasPrefix(kernel, "wgmma") {
					l.Shared = 12288
				}
				if strings.HasPrefix(kernel, "flag") || kernel == "no_griddep_wait" {
					both := []*emu.Buffer{zeros("data", 4), zeros("flag", 1)}
					both[0].Dependent = true
					l.Grid, l.Args, l.PDL = [3]int{2}, []any{both[0], both[1]}, kernel == "no_griddep_wait"
				}
				_, err := p.Run(context.Background(), l)
				var f *emu.Fault
				require.True(t, errors.As(err, &f), "seed %d: %v", seed, err)
				require.Contains(t, strings.Fields(kinds), f.Kind, "%s", f.Text)
				require.Contains(t, f.Text, fmt.Sprintf("seed: %d", seed))
			}
		})
	}
}

// The same seed gives the same run.
func TestRunsRepeat(t *testing.T) {
	t.Parallel()
	p := program(t, "good.cu")
	var first emu.Stats
	for i := range 3 {
		l := emu.Launch{Kernel: "bulk_ring2", Block: [3]int{128}, Shared: 2048, Args: []any{input(128 * 23), zeros("out", 1), 23}, Seed: 77}
		s, err := p.Run(context.Background(), l)
		require.NoError(t, err)
		if i == 0 {
			first = s
		}
		require.Equal(t, first, s)
	}
	require.NotZero(t, first.Copies)
}

func TestCompileErrorIsTold(t *testing.T) {
	_, err := emu.Compile(emu.Source{Files: os.DirFS("testdata"), Main: "good.cu", Kernels: []string{"there_is_none"}})
	require.ErrorContains(t, err, "there_is_none")
}

func TestWrongLaunchIsTold(t *testing.T) {
	p := program(t, "good.cu")
	_, err := p.Run(context.Background(), emu.Launch{Kernel: "chain", Block: [3]int{32}, Args: []any{zeros("flags", 1)}})
	require.ErrorContains(t, err, "takes 2 parameters, 1 are given")
	_, err = p.Run(context.Background(), emu.Launch{Kernel: "nothing", Block: [3]int{32}})
	require.ErrorContains(t, err, "no kernel nothing")
}

func TestEndlessKernelIsStopped(t *testing.T) {
	t.Parallel()
	p := program(t, "bad.cu")
	_, err := p.Run(context.Background(), emu.Launch{Kernel: "endless", Block: [3]int{32}, Args: []any{input(4), result("out", 1)}, Timeout: time.Second})
	var f *emu.Fault
	require.True(t, errors.As(err, &f), "%v", err)
	require.Equal(t, "timeout", f.Kind)
}
