// SPDX-License-Identifier: Apache-2.0

package plan

// What the kernels for many tokens, pair and relay, share: when they can be asked for, and how turns.cuh deals output tiles to clusters.

// many says whether a kernel for many tokens can be asked for: as wgmma, for more tokens than one launch of that takes, and in clusters of so many blocks.
func many(d Device, p Problem, cluster int) bool {
	return tensor(d, p) && !p.Invariant && !p.Apart && Class(p.N) > wgmma.tokens && d.SMs >= cluster
}

// mostSharers is ZS_MOST_SHARERS.
const mostSharers = 4

// parts is how many clusters have a part of each of fewer tiles than there are clusters, where they are cut alike.
func parts(tiles, clusters, steps uint64) uint64 {
	return min(clusters/tiles, mostSharers, steps)
}

// run is what a cluster multiplies, in columns of tiles, and how many share the tiles that do not go round evenly, as turns.cuh deals them without a lead.
func run(tiles, clusters, steps uint64) (columns float64, sharers uint64) {
	columns, sharers = float64(tiles/clusters*steps), 1
	if rest := tiles % clusters; rest > 0 {
		sharers = parts(rest, clusters, steps)
		columns += float64(ceilDiv(steps, sharers))
	}
	return columns, sharers
}

// shorter is ZS_SHORTER.
const shorter = 20

// anywhere says whether turns.cuh lets the runs of the tiles that do not go round evenly begin anywhere in k, where there is one token tile.
func anywhere(tiles, clusters, steps uint64) bool {
	rest := tiles % clusters
	if rest == 0 {
		return false
	}
	each := parts(rest, clusters, steps)
	return each < mostSharers && (clusters-each*rest)*steps > shorter*each*clusters
}
