// SPDX-License-Identifier: Apache-2.0

package emu_test

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/zipserv/zipserv/kernels/emu"
)

func TestBulkStores(t *testing.T) {
	t.Parallel()
	p := program(t, "stores.cu")
	for _, pieces := range []int{1, 2, 9} {
		run(t, p, func() emu.Launch {
			return emu.Launch{Kernel: "bulk_stores", Block: [3]int{64}, Shared: 2048, Args: []any{input(9 * 128), result("out", pieces*128), pieces}}
		}, func(l emu.Launch) {
			for i := range pieces * 128 {
				want := word(data(l, 0), i/4*4+3-i%4)
				if i%128 == 0 {
					want++
				}
				require.Equal(t, want, word(data(l, 1), i), "word %d", i)
			}
		})
	}
}

// What stands over the ends of a matrix, or lies between its rows, is left alone.
func TestTensorStores(t *testing.T) {
	t.Parallel()
	p := program(t, "stores.cu")
	for _, s := range []struct{ rows, columns, ld, matrices int }{{16, 64, 64, 1}, {33, 129, 144, 1}, {1, 1, 8, 3}, {17, 71, 72, 2}} {
		in, _ := bf16s(s.matrices*s.rows*s.columns, 3)
		boxes := (s.matrices + 1) * ((s.rows + 15) / 16) * ((s.columns + 63) / 64)
		run(t, p, func() emu.Launch {
			y := &emu.Buffer{Name: "y", Data: make([]byte, 2*((s.matrices*s.rows-1)*s.ld+s.columns)), Mode: emu.Out}
			return emu.Launch{Kernel: "tensor_stores", Block: [3]int{32 * boxes}, Shared: 2048 * boxes,
				Args: []any{&emu.Buffer{Name: "in", Data: in, Mode: emu.In, Align: 2}, y, s.ld, s.rows, s.columns, s.matrices}}
		}, func(l emu.Launch) {
			want := bytes.Repeat([]byte{0xFF}, len(data(l, 1)))
			for r := range s.matrices * s.rows {
				copy(want[2*r*s.ld:], in[2*r*s.columns:2*(r+1)*s.columns])
			}
			require.Equal(t, want, data(l, 1))
		})
	}
}

func TestStoredMatrices(t *testing.T) {
	t.Parallel()
	p := program(t, "stores.cu")
	run(t, p, func() emu.Launch {
		return emu.Launch{Kernel: "stored_matrices", Block: [3]int{32}, Shared: 512, Args: []any{result("out", 128)}}
	}, func(l emu.Launch) {
		for i := range 256 {
			matrix, row, column := i/64, i/8%8, i%8
			require.Equal(t, uint16(matrix<<8|column<<4|row), le.Uint16(data(l, 0)[2*i:]), "matrix %d, row %d, column %d", matrix, row, column)
		}
	})
}

func TestRelay(t *testing.T) {
	t.Parallel()
	p := program(t, "stores.cu")
	for _, count := range []int{1, 5, 40} {
		control := words(2+count, func(int) uint32 { return ^uint32(0) })
		run(t, p, func() emu.Launch {
			return emu.Launch{Kernel: "relay", Grid: [3]int{3}, Block: [3]int{96}, Shared: 1544,
				Args: []any{&emu.Buffer{Name: "control", Data: bytes.Clone(control), Mode: emu.InOut}, result("pieces", count*128), result("out", 3), count}}
		}, func(l emu.Launch) {
			require.Equal(t, control, data(l, 0))
			for b := range 3 {
				require.Equal(t, uint32(count*(count+1)/2*(32*33/2)), word(data(l, 2), b))
			}
		})
	}
	run(t, p, func() emu.Launch {
		return emu.Launch{Kernel: "counted_arrivals", Grid: [3]int{4}, Block: [3]int{32}, Cluster: 2, Shared: 16, Args: []any{result("out", 128)}}
	}, func(l emu.Launch) { require.Equal(t, words(128, func(int) uint32 { return 1 }), data(l, 0)) })
}

// Each mistake is caught, with a kind that says what it is, in every schedule.
func TestMistakesWithStoresAreCaught(t *testing.T) {
	t.Parallel()
	p := program(t, "stores_bad.cu")
	for kernel, kinds := range map[string]string{
		"store_without_proxy_fence":           "proxy",
		"store_without_barrier":               "race uninitialised",
		"store_of_nothing":                    "uninitialised",
		"source_written_while_read":           "in-flight",
		"source_of_the_other_copy":            "in-flight",
		"source_of_the_last_copy":             "in-flight",
		"source_written_by_matrices":          "in-flight",
		"source_written_by_a_copy":            "in-flight",
		"source_written_by_others":            "in-flight race",
		"source_waited_for_by_another_thread": "in-flight",
		"ends_while_it_is_read":               "in-flight",
		"read_is_not_done":                    "in-flight",
		"waits_for_too_few":                   "in-flight",
		"waited_for_by_another_thread":        "in-flight",
		"read_before_the_barrier":             "in-flight race",
		"stores_over_each_other":              "in-flight",
		"store_over_a_reader":                 "race in-flight",
		"store_over_plain_stores":             "proxy",
		"fetch_of_plain_stores":               "proxy",
		"store_misaligned":                    "alignment",
		"store_from_misaligned":               "alignment",
		"store_beyond_end":                    "bounds",
		"store_of_some_bytes":                 "argument",
		"store_to_shared":                     "bounds",
		"tensor_store_of_a_bad_matrix":        "alignment",
		"tensor_store_off_its_atom":           "alignment",
		"tensor_store_beyond_end":             "bounds",
		"prefetch_beyond_end":                 "bounds",
		"prefetch_misaligned":                 "alignment",
		"matrices_misaligned":                 "alignment",
		"matrices_by_half_a_warp":             "divergence deadlock",
		"counts_too_many":                     "mbarrier",
		"told_before_done":                    "in-flight race",
		"told_without_release":                "race",
		"released_before_done":                "race",
		"told_by_another_thread":              "race in-flight",
		"fetched_without_acquire":             "race",
		"fetched_without_proxy_fence":         "proxy",
		"proxy_fence_before_the_acquire":      "proxy",
		"acquired_by_another_lane":            "race",
		"store_before_griddep_wait":           "dependency",
	} {
		t.Run(kernel, func(t *testing.T) {
			t.Parallel()
			for seed := range uint64(6) {
				l := emu.Launch{Kernel: kernel, Block: [3]int{128}, Shared: 4096, Seed: seed}
				switch {
				case strings.Contains(kernel, "told") || strings.Contains(kernel, "fetched") || strings.Contains(kernel, "released") || strings.Contains(kernel, "acquire"):
					l.Grid = [3]int{2}
				case kernel == "store_before_griddep_wait":
					l.PDL = true
				}
				buffer := zeros("data", 512)
				buffer.Dependent = l.PDL
				l.Args = []any{buffer, zeros("flag", 1)}
				_, err := p.Run(context.Background(), l)
				var f *emu.Fault
				require.True(t, errors.As(err, &f), "seed %d: %v", seed, err)
				require.Contains(t, strings.Fields(kinds), f.Kind, "%s", f.Text)
			}
		})
	}
}
