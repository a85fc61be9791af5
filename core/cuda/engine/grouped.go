// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"slices"

	"github.com/zipserv/zipserv/core/cuda/driver"
	"github.com/zipserv/zipserv/core/cuda/plan"
	"github.com/zipserv/zipserv/core/format"
)

// Routing is a router's choice, on device memory: Pairs expert numbers, Top of each token. Numbers below 0 or from Experts on are of no expert here.
type Routing struct {
	Stream         driver.Stream
	IDs            driver.Pointer // signed integers of IDBytes
	IDBytes        uint64         // 4 or 8
	Pairs, Experts uint64
	Top            uint64         // pairs of a token
	Tile           uint64         // pairs of an expert that are multiplied at a time
	Words          driver.Pointer // out: plan.RoutingWords(Pairs) words of 32 bits, for Grouped
}

// Grouped is the product of every pair's row with its expert: y[pair] = x[row] W[expert]^T, on device memory, BF16.
type Grouped struct {
	Stream driver.Stream
	Blobs  driver.Pointer // of all experts, each M x K and tiled
	Step   uint64         // bytes from one to the next
	M, K   uint64
	X      driver.Pointer // [tokens or pairs, K], without gaps
	ByPair bool           // a row of x for every pair, not for every token
	Gated  bool           // y[pair] is [M / 2], silu(upper half of the rows) * lower half; M is a multiple of 128
	Y      driver.Pointer // [Pairs, M], without gaps
	Words  driver.Pointer // of a Routing with the same Pairs and Tile
	Pairs  uint64
	Tile   uint64
}

// Combination is out[token] = sum of Weights[pair] Y[pair] over the token's pairs, in the order of their experts' numbers.
type Combination struct {
	Stream  driver.Stream
	Y       driver.Pointer // [Tokens * Top, M], BF16
	IDs     driver.Pointer
	IDBytes uint64
	Weights driver.Pointer // [Tokens, Top], float32
	Tokens  uint64
	Top     uint64
	Experts uint64
	M       uint64
	Out     driver.Pointer // [Tokens, M], BF16
}

type groupedKey struct {
	m, k, tile       uint64
	invariant, gated bool
}
type routeKey struct{ combine bool }

func checkIDs(ids driver.Pointer, idBytes, experts uint64) error {
	if err := checkNumbers("expert", ids, idBytes); err != nil {
		return err
	}
	if experts-1 >= plan.RouteExperts {
		return badArgument("a layer has 1 to %d experts, not %d", plan.RouteExperts, experts)
	}
	return nil
}

func checkPairs(pairs, tile uint64) error {
	if pairs-1 >= plan.RoutePairs {
		return badArgument("the tokens' experts are 1 to %d a launch, not %d", plan.RoutePairs, pairs)
	}
	if !slices.Contains(plan.GroupedTiles, tile) {
		return badArgument("%v pairs are multiplied at a time, not %d", plan.GroupedTiles, tile)
	}
	return nil
}

// Route queues the kernel that prepares a router's choice for Grouped.
func (d *Device) Route(p *Routing) error {
	if err := checkIDs(p.IDs, p.IDBytes, p.Experts); err != nil {
		return err
	}
	if err := checkPairs(p.Pairs, p.Tile); err != nil {
		return err
	}
	if p.Top == 0 || p.Pairs%p.Top != 0 {
		return badArgument("%d pairs are not tokens of %d experts each", p.Pairs, p.Top)
	}
	l, err := d.moe(false)
	if err != nil {
		return err
	}
	return d.launchEarly(l, p.Stream, true, uint64(p.IDs), p.IDBytes, p.Pairs, p.Top, p.Experts, p.Tile, uint64(p.Words))
}

// Grouped queues the product: one launch, whatever the router chose. It starts early, for it reads nothing, the blobs included, before the work ahead of it has ended.
func (d *Device) Grouped(p *Grouped) error {
	if err := checkPairs(p.Pairs, p.Tile); err != nil {
		return err
	}
	if p.M-1 >= maxSide || p.K-1 >= maxSide || p.Pairs*plan.Tiles(p.M, p.K) > maxSide {
		return badArgument("M and K must be at least 1, and all pairs' tiles fewer than 2^31; got %d and %d, %d pairs", p.M, p.K, p.Pairs)
	}
	if p.Blobs%16 != 0 || p.Step%16 != 0 {
		return badArgument("the blobs at %#x, %d bytes apart, are not aligned to 16 bytes", p.Blobs, p.Step)
	}
	// Length alone tells a raw blob, in which the kernel would look for tiles.
	if raw := format.RawSize(p.M, p.K); p.Step >= raw {
		return badArgument("blobs of %d x %d weights, %d bytes apart: a raw blob has %d bytes, and raw ones can't be multiplied together", p.M, p.K, p.Step, raw)
	}
	if p.Gated && (p.M%128 != 0 || p.Tile > plan.GatedTile) {
		return badArgument("gates need two halves of whole tiles, M a multiple of 128, and at most %d pairs at a time, not %d and %d", plan.GatedTile, p.M, p.Tile)
	}
	l, err := d.grouped(groupedKey{p.M, p.K, p.Tile, Invariant(), p.Gated})
	if err != nil {
		return err
	}
	ws, err := d.workspaces.Get(p.Stream, l.plan.Workspace)
	if err != nil {
		return err
	}
	byToken := uint64(1)
	if p.ByPair {
		byToken = 0
	}
	return d.launchEarly(l.kernel, p.Stream, true, uint64(p.Blobs), p.Step, uint64(p.X), byToken, uint64(p.Y), p.M, p.K, uint64(p.Words), p.Pairs, uint64(ws))
}

// Combine queues the sum over each token's experts.
func (d *Device) Combine(p *Combination) error {
	if err := checkIDs(p.IDs, p.IDBytes, p.Experts); err != nil {
		return err
	}
	if p.Top-1 >= plan.CombineTop || p.M-1 >= maxSide || p.Tokens > 65535 {
		return badArgument("at most 65535 tokens of 1 to %d experts, M from 1 on; got %d, %d and %d", plan.CombineTop, p.Tokens, p.Top, p.M)
	}
	l, err := d.moe(true)
	if err != nil || p.Tokens == 0 {
		return err
	}
	launch := d.prepared(l, p.Stream, true, uint64(p.Y), uint64(p.IDs), p.IDBytes, uint64(p.Weights), p.Top, p.Experts, p.M, uint64(p.Out))
	launch.Grid = [3]uint32{plan.CombineBlocks(p.M), uint32(p.Tokens), 1}
	return d.ctx.Launch(&launch)
}

func (d *Device) grouped(key groupedKey) (*linearPlan, error) {
	return ready(d, key, func() (*linearPlan, error) {
		p, err := plan.Grouped(d.planDevice, key.m, key.k, key.tile, key.invariant, key.gated)
		if err != nil {
			return nil, err
		}
		return d.prepareLinear(p)
	})
}

func (d *Device) moe(combine bool) (*kernel, error) {
	return ready(d, routeKey{combine}, func() (*kernel, error) {
		if combine {
			return d.prepare(plan.Combine(d.planDevice))
		}
		return d.prepare(plan.Route(d.planDevice))
	})
}

// WarmGrouped compiles and loads what the experts of a layer need for up to the largest tile.
func (d *Device) WarmGrouped(m, k uint64, gated bool) error {
	for _, combine := range []bool{false, true} {
		if _, err := d.moe(combine); err != nil {
			return err
		}
	}
	for _, tile := range plan.GroupedTiles {
		if gated && tile > plan.GatedTile {
			break
		}
		if _, err := d.grouped(groupedKey{m, k, tile, Invariant(), gated}); err != nil {
			return err
		}
	}
	return nil
}
