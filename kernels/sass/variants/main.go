// SPDX-License-Identifier: Apache-2.0

// Command variants prints, as JSON, every kernel variant that the launch plans choose on one GPU of each compute capability that the
// checks of kernels/sass compile for.
package main

import (
	"encoding/json"
	"fmt"
	"os"

	"github.com/zipserv/zipserv/core/cuda/plan"
)

// variant is one compilation.
type variant struct {
	Arch    string   `json:"arch"`
	Source  string   `json:"source"`
	Entry   string   `json:"entry"`
	Defines []string `json:"defines"`
	Smem    uint32   `json:"smem"`
	Block   uint32   `json:"block"`
}

var targets = []struct {
	arch   string
	device plan.Device
}{
	{"sm_80", plan.Device{Capability: 80, SMs: 108, SmemBlock: 163 << 10, SmemSM: 164 << 10}},
	{"sm_86", plan.Device{Capability: 86, SMs: 82, SmemBlock: 99 << 10, SmemSM: 100 << 10}},
	{"sm_89", plan.Device{Capability: 89, SMs: 128, SmemBlock: 99 << 10, SmemSM: 100 << 10}},
	{"sm_90a", plan.Device{Capability: 90, SMs: 132, SmemBlock: 227 << 10, SmemSM: 228 << 10}},
	{"sm_100a", plan.Device{Capability: 100, SMs: 148, SmemBlock: 227 << 10, SmemSM: 228 << 10}},
	{"sm_120", plan.Device{Capability: 120, SMs: 170, SmemBlock: 99 << 10, SmemSM: 100 << 10}},
}

// shapes: from one tile to an output layer, wide and tall, because plans may differ by size.
var shapes = [][2]uint64{
	{64, 64}, {1024, 1024}, {2048, 2048}, {1024, 4096}, {4096, 4096}, {6144, 4096}, {5120, 5120}, {4096, 14336}, {14336, 4096}, {28672, 4096},
	{8192, 8192}, {8192, 28672}, {53248, 16384}, {128256, 4096},
}

// next steps through the numbers of tokens: all few, then the borders of every class.
func next(n uint64) uint64 {
	switch {
	case n < 72:
		return n + 1
	case n%8 == 0:
		return n + 1
	}
	return n + 7
}

func main() {
	var all []variant
	for _, t := range targets {
		seen := map[string]bool{}
		add := func(k plan.Kernel) {
			if key := fmt.Sprint(k.Entry, k.Defines); !seen[key] {
				seen[key] = true
				all = append(all, variant{t.arch, k.Source, k.Entry, k.Defines, k.Smem, k.Block})
			}
		}
		add(plan.Gather(t.device, false))
		add(plan.Gather(t.device, true))
		add(plan.Route(t.device))
		add(plan.Combine(t.device))
		for _, tile := range plan.GroupedTiles {
			for i := range 4 {
				if i >= 2 && tile > plan.GatedTile {
					break
				}
				g, err := plan.Grouped(t.device, 4096, 4096, tile, i%2 == 1, i/2 == 1)
				if err != nil {
					fmt.Fprintln(os.Stderr, t.arch, err)
					os.Exit(1)
				}
				add(g.Kernel)
			}
		}
		for _, s := range shapes {
			m, k := s[0], s[1]
			add(plan.Decompress(t.device, m, k))
			c := plan.Compress(t.device, m, k)
			add(c.Sample)
			add(c.Write)
			for n := uint64(1); n <= 1024; n = next(n) {
				for _, p := range []plan.Problem{{Invariant: true}, {}, {Unaligned: true}, {Gated: true}} {
					p.M, p.K, p.N = m, k, n
					if p.Gated && m%128 != 0 {
						continue
					}
					l, err := plan.ForLinear(t.device, p)
					if err != nil {
						fmt.Fprintln(os.Stderr, t.arch, err)
						os.Exit(1)
					}
					if !l.Expand {
						add(l.Kernel)
					}
				}
			}
		}
	}
	if err := json.NewEncoder(os.Stdout).Encode(all); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
