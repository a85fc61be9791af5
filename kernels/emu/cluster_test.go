// SPDX-License-Identifier: Apache-2.0

package emu_test

import (
	"context"
	"errors"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/zipserv/zipserv/kernels/emu"
)

// ring launches the ring of cluster.cu, in three clusters, and says what each block must find.
func ring(blocks, rounds, resident int) (emu.Launch, uint32) {
	x := &emu.Buffer{Name: "x", Data: words(rounds*blocks*8*32, func(i int) uint32 { return uint32(i*i) ^ 0x5A5A }), Mode: emu.In}
	var want uint32
	for i := range rounds * blocks * 8 * 32 {
		row, column := uint32(i/32%(blocks*8)), uint32(i%32)
		want += (row + 1) * (column + 3) * word(x.Data, i)
	}
	return emu.Launch{Kernel: map[int]string{2: "cluster_ring2", 4: "cluster_ring4"}[blocks], Grid: [3]int{3 * blocks}, Block: [3]int{128}, Cluster: blocks, Resident: resident,
		Shared: 3*(blocks*1024) + 48, Args: []any{x, zeros("out", 3*blocks), rounds}}, want
}

func TestClusters(t *testing.T) {
	t.Parallel()
	p := program(t, "cluster.cu")
	for _, blocks := range []int{2, 4} {
		for _, rounds := range []int{1, 4, 11} {
			for _, resident := range []int{0, blocks} {
				_, want := ring(blocks, rounds, resident)
				run(t, p, func() emu.Launch { l, _ := ring(blocks, rounds, resident); return l }, func(l emu.Launch) {
					for b := range 3 * blocks {
						require.Equal(t, want, word(data(l, 1), b), "block %d of clusters of %d", b, blocks)
					}
				})
			}
		}
	}
	for _, rounds := range []int{1, 2, 9} {
		run(t, p, func() emu.Launch {
			return emu.Launch{Kernel: "block_exchange", Grid: [3]int{4}, Block: [3]int{96}, Cluster: 2, Shared: 2048 + 32, Args: []any{zeros("out", 4), rounds}}
		}, func(l emu.Launch) {
			for b := range 4 {
				require.Equal(t, uint32(3*rounds*(rounds+1)/2*(31*32/2+32*7)), word(data(l, 0), b))
			}
		})
	}
	run(t, p, func() emu.Launch {
		return emu.Launch{Kernel: "cluster_token", Grid: [3]int{8}, Block: [3]int{96}, Cluster: 4, Args: []any{zeros("numbers", 2), result("out", 8)}}
	}, func(l emu.Launch) {
		for b := range 8 {
			require.Equal(t, []uint32{0, 0, 1, 12}[b%4], word(data(l, 1), b))
		}
		require.Equal(t, []uint32{123, 123}, []uint32{word(data(l, 0), 0), word(data(l, 0), 1)})
	})
}

// Each mistake is caught, with a kind that says what it is, in every schedule.
func TestMistakesInClustersAreCaught(t *testing.T) {
	t.Parallel()
	p := program(t, "cluster_bad.cu")
	for kernel, kinds := range map[string]string{
		"arrives_before_cluster_sync":        "race mbarrier",
		"copies_before_cluster_sync":         "race mbarrier",
		"copies_over_readers_of_the_peer":    "race in-flight",
		"copy_without_the_peers_wait":        "race in-flight",
		"copy_that_the_peer_does_not_expect": "race in-flight mbarrier deadlock uninitialised",
		"copy_without_init_fence":            "proxy",
		"copy_beyond_the_cluster":            "argument",
		"ends_before_the_peers_arrival":      "cluster",
		"ends_before_the_peers_copy":         "cluster",
		"arrives_once_too_often":             "mbarrier deadlock",
		"arrives_beyond_the_cluster":         "argument",
		"warp_that_does_not_come":            "deadlock",
		"half_a_warp_syncs":                  "divergence deadlock",
		"reads_what_the_peer_wrote":          "race uninitialised",
		"relaxed_barrier_publishes_nothing":  "race",
		"relaxed_barrier_without_init_fence": "race",
		"arrival_publishes_nothing":          "race",
		"arrival_is_no_fence":                "race proxy",
		"arrives_at_the_cluster_twice":       "barrier",
		"waits_for_the_cluster_unarrived":    "barrier",

		"block_copy_without_proxy_fence":        "proxy",
		"block_copy_of_nothing":                 "uninitialised",
		"block_copy_before_all_have_written":    "race uninitialised",
		"block_copy_not_waited_for":             "in-flight race",
		"block_copy_of_which_half_is_expected":  "in-flight race deadlock",
		"test_taken_for_a_wait":                 "in-flight race",
		"source_written_while_the_peer_gets_it": "race",
		"block_copy_over_readers":               "race in-flight",
		"block_copy_over_loads":                 "proxy",
		"ends_while_the_peer_gets_it":           "cluster",
		"block_copy_beyond_the_cluster":         "argument",
		"block_copy_beyond_the_end":             "bounds",
		"block_copy_misaligned":                 "alignment",
		"block_copy_of_some_bytes":              "argument",
		"block_copy_onto_itself":                "argument",
	} {
		t.Run(kernel, func(t *testing.T) {
			t.Parallel()
			for seed := range uint64(12) {
				l := emu.Launch{Kernel: kernel, Grid: [3]int{2}, Block: [3]int{64}, Cluster: 2, Shared: 2048, Args: []any{input(512), result("out", 128)}, Seed: seed}
				_, err := p.Run(context.Background(), l)
				var f *emu.Fault
				require.True(t, errors.As(err, &f), "seed %d: %v", seed, err)
				require.Contains(t, strings.Fields(kinds), f.Kind, "%s", f.Text)
			}
		})
	}
}

// The right ring with one thing taken away, as in kernels/mutations_test.go.
func TestBugsSeededInAClusterAreCaught(t *testing.T) {
	t.Parallel()
	for _, m := range []struct {
		name, pattern string
		nth           int
		replacement   string
		want          string
		blocks        int // 0: two, -2: two that make what they read
	}{
		{"no barrier of the cluster at the start", `cluster_arrive_relaxed\(\);\s+cluster_wait\(\);`, 0, "__syncthreads();", "race mbarrier proxy", 0},
		{"no barrier of the cluster at the end", `if \(BLOCKS == 2\) cluster_sync\(\);`, 0, "", "cluster", 0},
		{"stages handed back to the own block only", `lane < BLOCKS\) mbarrier_arrive_cluster\(([^,]*), lane\)`, 0, "lane < BLOCKS) mbarrier_arrive($1)", "race in-flight deadlock", 0},
		{"one block's consumers do not count", `BLOCKS \* CONSUMERS\)`, 0, "(BLOCKS - 1) * CONSUMERS)", "race in-flight mbarrier", 0},
		{"the sender does not wait for the stage", `mbarrier_wait\(empty[^;]*;`, 0, "", "race in-flight mbarrier", 0},
		{"too few bytes expected", `mbarrier_arrive_expect_tx\(([^,]*), BOX\)`, 0, "mbarrier_arrive_expect_tx($1, 1024)", "race in-flight mbarrier deadlock", 0},
		{"one block left out", `<< BLOCKS\) - 1`, 0, "<< BLOCKS) - 2", "deadlock", 0},
		{"all send the same share", `share = cluster_rank\(\)`, 0, "share = 0", "race in-flight", 0},
		{"barriers not made known to the copy engine", `fence_mbarrier_init\(\);`, 0, "", "proxy race", 0},
		{"handed back before all lanes have read", `__syncwarp\(\);(\s+if \(lane < BLOCKS)`, 0, "$1", "race", 0},
		{"the last arrivals are not waited for", `mbarrier_wait\(empty[^;]*;`, 1, "", "cluster", 4},
		{"loads that the next copy overtakes", `fence_proxy_async\(\);`, 0, "", "proxy", 0},
		{"half copied with no proxy fence", `fence_proxy_async\(\);`, 1, "", "proxy", -2},
		{"half copied before all lanes have written", `(fence_proxy_async\(\);\s+)__syncwarp\(\);`, 1, "$1", "race uninitialised", -2},
		{"half that the other block gets over loads", `fence_proxy_async\(\);`, 2, "", "proxy", -2},
		{"made over what the other block reads", `mbarrier_arrive_cluster\(free, lane\)`, 0, "mbarrier_arrive(free)", "race in-flight", -2},
		{"free stages not asked for", `while \(!mbarrier_test[^{]*\{\s+\}`, 0, "mbarrier_test(free, parity ^ 1);", "race in-flight", -2},
		{"half copied to the own block", `told, rank \^ 1\)`, 0, "told, rank)", "argument", -2},
		{"half of which nothing is expected", `mbarrier_arrive_expect_tx\(told, 512\)`, 0, "mbarrier_arrive(told)", "race in-flight deadlock uninitialised", -2},
		{"leaves while the other block gets its half", `cluster_sync\(\);`, 1, "", "cluster", -2},
	} {
		t.Run(m.name, func(t *testing.T) {
			t.Parallel()
			files, err := emu.Mutate(os.DirFS("testdata"), "cluster.cu", m.pattern, m.nth, m.replacement)
			require.NoError(t, err)
			p, err := emu.Compile(emu.Source{Files: files, Main: "cluster.cu", Kernels: []string{"cluster_ring2", "cluster_ring4", "block_exchange"}})
			require.NoError(t, err)
			for seed := range uint64(4) { // each in every schedule
				l, _ := ring(max(m.blocks, 2), 11, 0)
				if m.blocks < 0 {
					l = emu.Launch{Kernel: "block_exchange", Grid: [3]int{4}, Block: [3]int{96}, Cluster: 2, Shared: 2048 + 32, Args: []any{zeros("out", 4), 9}}
				}
				l.Seed = seed + 1
				_, err := p.Run(context.Background(), l)
				var f *emu.Fault
				require.True(t, errors.As(err, &f), "seed %d: %v", l.Seed, err)
				require.Contains(t, strings.Fields(m.want), f.Kind, "%s", f.Text)
			}
		})
	}
}

func TestWrongClusterIsTold(t *testing.T) {
	p := program(t, "cluster.cu")
	for _, c := range []struct {
		grid, resident, cluster int
		want                    *regexp.Regexp
	}{
		{6, 0, 4, regexp.MustCompile(`multiples of the cluster of 4`)},
		{8, 6, 4, regexp.MustCompile(`multiples of the cluster of 4`)},
		{16, 0, 16, regexp.MustCompile(`a cluster has 1 .. 8 blocks`)},
	} {
		_, err := p.Run(context.Background(), emu.Launch{Kernel: "cluster_token", Grid: [3]int{c.grid}, Resident: c.resident, Cluster: c.cluster, Block: [3]int{32}, Shared: 8,
			Args: []any{zeros("numbers", 4), result("out", 16)}})
		require.ErrorContains(t, err, "setup")
		require.Regexp(t, c.want, err.Error())
	}
}
