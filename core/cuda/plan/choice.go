// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"fmt"
	"math/bits"
	"slices"
)

// Version counts the changes of what a Choice means, and of what there is to choose from. A choice that was measured under another version is not used.
const Version = 11

// Expanded is the Kernel of a Choice to decompress the weight and leave the product to cuBLAS.
const Expanded = "decompress"

// Choice is a way to solve a product that was not picked by ForLinear but by a measurement or a user.
type Choice struct {
	Kernel string `json:"kernel"` // mma, wgmma, pair, solo, relay or decompress; what follows is of all but the last
	MW     int    `json:"mw,omitempty"`
	KW     int    `json:"kw,omitempty"`
	Blocks uint32 `json:"blocks,omitempty"`
}

func (c Choice) String() string {
	if c.Kernel == Expanded {
		return c.Kernel
	}
	return fmt.Sprintf("%s %dx%d, %d blocks", c.Kernel, c.MW, c.KW, c.Blocks)
}

// families by the names of choices.
var families = map[string]family{"mma": mma, "wgmma": wgmma}

// Bucket rounds N up so that numbers of tokens with one bucket are measured together; a choice is made for a bucket. Few tokens are one,
// so that a token's result stays the same for 1 to 16 of them.
func Bucket(n uint64) uint64 {
	const few, most = 16, 8192
	switch {
	case n <= few:
		return few
	case n >= most:
		return most
	}
	b := uint64(1) << bits.Len64(n-1)
	// Ways differ by how much of their tiles of tokens, 128 to 512, is left empty.
	if FewTokens < n && n <= 1024 && n <= b/4*3 {
		return b / 4 * 3
	}
	return b
}

// variants are the layouts of a family that a problem may be solved with, without spilling registers.
func variants(d Device, p Problem, kernel string) []variant {
	var list []variant
	switch {
	case kernel == "mma":
		list = layouts(d)
	case kernel == "wgmma" && tensor(d, p):
		list = []variant{tensorLayout, wideLayout}
	}
	var out []variant
	for _, v := range list {
		if families[kernel].fits(d, v, families[kernel].tokens) {
			out = append(out, v)
		}
	}
	return out
}

// launchTokens is how many tokens a launch takes.
func launchTokens(p Problem, kernel string) uint64 { return min(Class(p.N), families[kernel].tokens) }

// resident is the most blocks of a layout that are of use and all on the device at once, which the kernels need.
func (v variant) resident(d Device, m, k uint64) uint32 {
	return uint32(min(uint64(d.SMs*blocksPerSM), v.units(m, k)))
}

// Chosen plans a product as a choice says, after checking that it can be solved so.
func Chosen(d Device, p Problem, c Choice) (Linear, error) {
	if _, err := ForLinear(d, p); err != nil {
		return Linear{}, err
	}
	if c.Kernel == Expanded {
		if p.Invariant {
			return Linear{}, fmt.Errorf("the batch-invariant mode cannot decompress: cuBLAS makes a token's result depend on the others")
		}
		return Linear{Expand: true}, nil
	}
	switch c.Kernel {
	case Pair, Solo:
		return chosenPair(d, p, c)
	case Relay:
		return chosenRelay(d, p, c)
	}
	v := variant{c.MW, c.KW}
	if !slices.Contains(variants(d, p, c.Kernel), v) {
		return Linear{}, fmt.Errorf("%s is no layout for %d tokens on compute capability %d.%d", c, p.N, d.Capability/10, d.Capability%10)
	}
	if most := v.resident(d, p.M, p.K); c.Blocks < 1 || c.Blocks > most {
		return Linear{}, fmt.Errorf("%s: a %d x %d weight can be shared by 1 to %d blocks", c, p.M, p.K, most)
	}
	l := families[c.Kernel].launch(d, v, p, launchTokens(p, c.Kernel))
	l.Workspace = l.Workspace / uint64(l.Kernel.Grid) * uint64(c.Blocks)
	l.Kernel.Grid = c.Blocks
	return l, nil
}

func chosenRelay(d Device, p Problem, c Choice) (Linear, error) {
	if !relays(d, p) || c.MW != relayGroups || c.KW != 1 {
		return Linear{}, c.noLayout(d, p)
	}
	clusters, err := c.clusters(d, relayCluster)
	if err != nil {
		return Linear{}, err
	}
	return relayLaunch(p, clusters), nil
}

func chosenPair(d Device, p Problem, c Choice) (Linear, error) {
	for _, l := range pairs(d, p) {
		if c.Kernel != l.kernel || c.MW != pairGroups || c.KW != l.kw() {
			continue
		}
		clusters, err := c.clusters(d, uint32(l.cluster))
		if err != nil {
			return Linear{}, err
		}
		return l.launch(p, clusters), nil
	}
	return Linear{}, c.noLayout(d, p)
}

func (c Choice) noLayout(d Device, p Problem) error {
	return fmt.Errorf("%s is no layout for %d tokens of a %d x %d weight on compute capability %d.%d", c, p.N, p.M, p.K, d.Capability/10, d.Capability%10)
}

// clusters of a choice whose blocks stand in clusters of so many.
func (c Choice) clusters(d Device, cluster uint32) (uint64, error) {
	if most := uint32(d.SMs) / cluster * cluster; c.Blocks < cluster || c.Blocks > most || c.Blocks%cluster != 0 {
		return 0, fmt.Errorf("%s: %d to %d blocks, in clusters of %d", c, cluster, most, cluster)
	}
	return uint64(c.Blocks / cluster), nil
}

// Many are the plans of the kernels for many tokens that can solve a problem.
func Many(d Device, p Problem) (list []Linear) {
	for _, l := range pairs(d, p) {
		list = append(list, l.launch(p, l.clusters(d, p)))
	}
	if !p.Gated && relays(d, p) { // it has no gates
		list = append(list, relayLaunch(p, relayClusters(d)))
	}
	return list
}

// DefaultChoice is what ForLinear picks.
func DefaultChoice(d Device, p Problem) (Choice, error) {
	l, err := ForLinear(d, p)
	if err != nil {
		return Choice{}, err
	}
	return ChoiceOf(l)
}

// ChoiceOf is the choice that leads to a plan.
func ChoiceOf(l Linear) (Choice, error) {
	if l.Expand {
		return Choice{Kernel: Expanded}, nil
	}
	for _, layout := range pairLayouts {
		if l.Kernel.Source == pairSource && uint64(l.Kernel.Cluster) == layout.cluster && slices.Contains(l.Kernel.Defines, fmt.Sprintf("ZS_N=%d", layout.tokens)) {
			return Choice{layout.kernel, pairGroups, layout.kw(), l.Kernel.Grid}, nil
		}
	}
	if l.Kernel.Source == relaySource {
		return Choice{Relay, relayGroups, 1, l.Kernel.Grid}, nil
	}
	for name, f := range families {
		if f.source != l.Kernel.Source {
			continue
		}
		c := Choice{Kernel: name, Blocks: l.Kernel.Grid}
		for _, define := range l.Kernel.Defines {
			_, _ = fmt.Sscanf(define, "ZS_MW=%d", &c.MW)
			_, _ = fmt.Sscanf(define, "ZS_KW=%d", &c.KW)
		}
		return c, nil
	}
	return Choice{}, fmt.Errorf("%s is the source of no known kernel", l.Kernel.Source)
}

// leastShare of the device that a grid without shared strips has to use to be worth trying.
const leastShare = 0.7

// Candidates lists the ways to solve a product that are worth measuring, that of ForLinear first.
func Candidates(d Device, p Problem) ([]Choice, error) {
	first, err := DefaultChoice(d, p)
	if err != nil {
		return nil, err
	}
	out := []Choice{first}
	add := func(c Choice) {
		if !slices.Contains(out, c) {
			out = append(out, c)
		}
	}
	for _, kernel := range []string{"mma", "wgmma"} {
		for _, v := range variants(d, p, kernel) {
			most := v.resident(d, p.M, p.K)
			add(Choice{kernel, v.mw, v.kw, most})
			// Runs that end with strips need fewer partial sums and less waiting.
			if even := v.even(d, p.M, p.K); float64(even) >= leastShare*float64(most) {
				add(Choice{kernel, v.mw, v.kw, even})
			}
		}
	}
	for _, l := range pairs(d, p) {
		add(Choice{l.kernel, pairGroups, l.kw(), uint32(l.clusters(d, p) * l.cluster)})
		add(Choice{l.kernel, pairGroups, l.kw(), uint32(l.even(d, p) * l.cluster)})
	}
	if relays(d, p) {
		add(Choice{Relay, relayGroups, 1, uint32(relayClusters(d) * relayCluster)})
	}
	if !p.Invariant && Class(p.N) >= mma.tokens {
		add(Choice{Kernel: Expanded})
	}
	return out, nil
}

// even is the largest grid whose blocks all have whole strip groups, or equal shares of one.
func (v variant) even(d Device, m, k uint64) uint32 {
	groups, most := v.groups(m), uint64(v.resident(d, m, k))
	if groups <= most {
		return uint32(groups * (most / groups))
	}
	return uint32(largestDivisor(groups, most))
}

func (v variant) groups(m uint64) uint64 { return ceilDiv(ceilDiv(m, tileSide), uint64(v.mw)) }

func largestDivisor(n, most uint64) uint64 {
	for most > 1 && n%most != 0 {
		most--
	}
	return most
}

// Split is the best layout in which every strip of 64 rows is summed up by that many blocks, each with an equal share of K (but for ZS_LEAD). ForLinear
// chooses such a number only where that measured best.
func Split(d Device, p Problem, shares uint64) (Choice, error) {
	if _, err := ForLinear(d, p); err != nil {
		return Choice{}, err
	}
	if shares < 1 {
		return Choice{}, fmt.Errorf("a product is split into at least 1 share")
	}
	var chosen Choice
	least, most := uint64(0), uint64(0)
	for _, kernel := range []string{"wgmma", "mma"} { // in ForLinear's order; the second has layouts for more shares
		for _, v := range variants(d, p, kernel) {
			groups, steps := v.groups(p.M), v.units(p.M, p.K)/v.groups(p.M)
			possible := max(1, min(uint64(d.SMs*blocksPerSM)/groups, steps))
			most = max(most, possible)
			if shares > possible {
				continue
			}
			grid := groups * shares
			if grid > uint64(d.SMs*blocksPerSM) { // one share, and more groups than blocks
				grid = largestDivisor(groups, uint64(d.SMs*blocksPerSM))
			}
			score := ceilDiv(v.units(p.M, p.K), grid) * uint64(v.mw*v.kw+6)
			if chosen.Kernel == "" || score < least {
				chosen, least = Choice{kernel, v.mw, v.kw, uint32(grid)}, score
			}
		}
		if chosen.Kernel != "" {
			break
		}
	}
	if chosen.Kernel == "" {
		return chosen, fmt.Errorf("a %d x %d weight cannot have K split into %d shares: all blocks of a product are on the GPU at once, and its %d "+
			"multiprocessors have room for at most %d of each strip of rows", p.M, p.K, shares, d.SMs, most)
	}
	return chosen, nil
}
