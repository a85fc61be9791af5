// SPDX-License-Identifier: Apache-2.0

package plan

import "fmt"

// Relay is the Kernel of a Choice of the kernel that decodes every weight once for many tokens: MW strips a block and KW 1.
const Relay = "relay"

// The kernel for many tokens that decodes every weight once (zipgemm_relay.cu): an output tile of a cluster of two blocks is four strips by 256 tokens. Which tiles
// are split over how many clusters depends on the tokens, so it is never used in the batch-invariant mode.
const (
	relaySource  = "zipgemm_relay.cu"
	relayEntry   = "zs_zipgemm_relay"
	relayTokens  = 256 // of an output tile
	relayGroups  = 2   // strips of a block
	relayCluster = 2
	relayStages  = 4
	relayWarps   = 3 // that decode
	relayControl = 32
	relayThreads = 128*relayGroups + 128
)

// relayMost is the largest scratch memory: the decoded weight. Beyond it, decompression by rows could bound what a product takes; this kernel's order does not.
const relayMost = 4 << 30

// Least squares over an H100's times (docs/performance.md): a start, a column of tiles of all clusters, a round in which all decoders decode a tile, the sums of
// clusters that share tiles.
const (
	relayStartClocks  = 13500
	relayColumnClocks = 1320
	relayRoundClocks  = 5600
	relaySumsClocks   = 7000 // of each cluster that shares a tile
	relayBeside       = 0.1  // of the shorter of multiplying and decoding, what is not hidden by the longer
)

// relaySmem is ZS_GEMM_SMEM; a test compares it with the source.
func relaySmem() int {
	return relayStages*(relayTokens*128+relayGroups*tileData+16) + relayWarps*(tileData+spareBytes)
}

// relays says whether the kernel can solve a problem.
func relays(d Device, p Problem) bool {
	return many(d, p, relayCluster) && relaySmem() <= d.limit(blocksPerSM) && relayScratch(p) <= relayMost && relayTiles(p) < 1<<20
}

// relayTiles is the number of output tiles.
func relayTiles(p Problem) uint64 {
	return ceilDiv(ceilDiv(p.M, tileSide), relayGroups*relayCluster) * ceilDiv(p.N, relayTokens)
}

// relayClusters: all that fit; those without an output tile decode.
func relayClusters(d Device) uint64 { return uint64(d.SMs / relayCluster) }

// relayPairs are the strips in groups of a block, each of which has a flag for every column of tiles.
func relayPairs(p Problem) uint64 { return ceilDiv(ceilDiv(p.M, tileSide), relayGroups) }

func relayScratch(p Problem) uint64 {
	return relayPairs(p) * relayGroups * ceilDiv(p.K, tileSide) * tileData
}

// relayTime: a start, then multiplying and decoding at the same time.
func relayTime(d Device, p Problem) float64 {
	columns, sharers := run(relayTiles(p), relayClusters(d), ceilDiv(p.K, tileSide))
	rounds := float64(Tiles(p.M, p.K)) / float64(relayClusters(d)*relayCluster*relayWarps)
	multiply, decode := columns*relayColumnClocks, rounds*relayRoundClocks
	clocks := relayStartClocks + max(multiply, decode) + relayBeside*min(multiply, decode)
	if sharers > 1 {
		clocks += relaySumsClocks * float64(sharers)
	}
	return clocks / (d.clock() * clockReached)
}

// relayLaunch plans one launch for all tokens of a class.
func relayLaunch(p Problem, clusters uint64) Linear {
	grid := clusters * relayCluster
	sums := grid * relayGroups * tileSide * relayTokens * 4
	return Linear{
		Kernel: Kernel{
			Source: relaySource, Entry: relayEntry,
			Defines: []string{
				fmt.Sprintf("ZS_N=%d", relayTokens), fmt.Sprintf("ZS_GROUPS=%d", relayGroups), fmt.Sprintf("ZS_STAGES=%d", relayStages),
				fmt.Sprintf("ZS_CLUSTER=%d", relayCluster),
			},
			Grid: uint32(grid), Cluster: relayCluster, Resident: blocksPerSM, Block: relayThreads, Smem: uint32(relaySmem()), Programmatic: true,
		},
		ByRows:     true,
		Tokens:     Class(p.N),
		TensorRows: relayTokens / relayCluster,
		WholeBoxes: true,
		Workspace:  sums + 4*(relayControl+relayPairs(p)*ceilDiv(p.K, tileSide)),
		Flags:      sums,
		Scratch:    relayScratch(p),
		ResultRows: relayTokens,
	}
}
