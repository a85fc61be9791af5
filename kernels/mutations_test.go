// SPDX-License-Identifier: Apache-2.0

package kernels_test

import (
	"bytes"
	"io/fs"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/zipserv/zipserv/kernels"
	"github.com/zipserv/zipserv/kernels/emu"
)

// Bugs seeded in the real kernels, one at a time, of the sort that is made in practice: each must be caught, by a fault of a named kind
// or, where the kind is "wrong", by its result. A pattern that no longer matches fails the test: give it the kernel's new words.
var mutations = []struct {
	name, kernel, file, pattern string
	nth                         int
	replacement                 string
	want                        string
}{
	{"no __syncwarp between decode and escapes", "decompress", "decompress.cu", `__syncwarp\(\);`, 0, "", "race uninitialised"},
	{"no barrier before the tiles are written out", "decompress", "decompress.cu", `__syncthreads\(\);`, 0, "", "race uninitialised"},
	{"no barrier before the tile is written again", "decompress", "decompress.cu", `__syncthreads\(\);`, -1, "", "race"},
	{"lost escapes of one lane", "decompress", "format.cuh", `2 \* lane < h\.count \?`, 0, "lane != 7 && 2 * lane < h.count ?", "wrong"},
	{"swapped index bits", "decompress", "format.cuh", `\(pos >> 2\) & 0x70`, 0, "(pos >> 3) & 0x70", "wrong"},
	{"mask of the wrong plane", "decompress", "format.cuh", `\(p1, p2, M1\), p0, M2`, 0, "(p1, p2, M2), p0, M1", "wrong"},
	{"no __syncwarp between a row and its escapes", "gather", "gather.cu", `__syncwarp\(\);`, 0, "", "race uninitialised"},
	{"no __syncwarp before a row is written out", "gather", "gather.cu", `__syncwarp\(\);`, -1, "", "race"},
	{"bytes in the order of another row", "gather", "gather.cu", `row & 8 \?`, 0, "row & 4 ?", "wrong"},
	{"literals and zeros taken for entries", "gather", "gather.cu", `if \(index >= head\.count\) continue;`, 0, "", "wrong race"},
	{"literal of another entry", "gather", "gather.cu", `2 \* head\.count \+ index`, 0, "2 * head.count + index % 32", "wrong"},
	{"long lists from their start again", "gather", "gather.cu", `if \(first >= 128\) entries\.load\([^;]*;`, 0, "", "wrong race"},
	{"no wait for activations", "mma", "activations.cuh", `mbarrier_wait\([^;]*use_parity\);`, 0, "", "in-flight race uninitialised"},
	{"wrong parity at the start", "mma", "activations.cuh", `fill_parity = 1;`, 0, "fill_parity = 0;", "deadlock"},
	{"parity not flipped at the wrap-around", "mma", "activations.cuh", `use_parity \^= 1`, 0, "use_parity ^= 0", "deadlock in-flight race mbarrier"},
	{"one arrival too few", "mma", "activations.cuh", `mbarrier_init\(([^;]*), ZS_MW\);`, 0, "mbarrier_init($1, ZS_MW + 1);", "deadlock"},
	{"arrival that does not wait for the copies", "mma", "activations.cuh", `cp_async_mbarrier_arrive\(`, 0, "mbarrier_arrive(", "in-flight"},
	{"stage handed back by one lane for all", "mma", "zipgemm_mma.cu", `__syncwarp\(\);`, -1, "", "race"},
	{"no barrier before the scratch is read", "mma", "mma.cuh", `named_barrier_sync\([^;]*;`, 0, "", "race uninitialised"},
	{"no barrier before the scratch is written again", "mma", "mma.cuh", `named_barrier_sync\([^;]*;`, -1, "", "race"},
	{"no wait for the kernel before", "mma", "zipgemm_mma.cu", `griddep_wait\(\);`, 0, "", "dependency"},
	{"partial sums taken from one block only", "mma", "mma.cuh", `\(blockIdx\.x - h\) \* BLOCK`, 0, "(blockIdx.x - 1) * BLOCK", "deadlock wrong"},
	{"weights of the wrong item", "grouped", "grouped.cuh", `next = routing\.expert\(item - 1\);`, 0, "next = routing.expert(item);", "wrong"},
	{"rows of the first item", "grouped", "grouped.cuh", `rows = list \+ routing\.first\(item\);`, 0, "rows = list;", "wrong uninitialised bounds"},
	{"escapes of the expert before", "grouped", "zipgemm_grouped.cu", `blob = blob_after, exists`, 0, "exists", "wrong bounds race uninitialised"},
	{"blocks with nothing to do between others", "grouped", "grouped.cuh", `min\(gridDim\.x, total\)`, 0, "gridDim.x", "deadlock"},
	{"no wait for an item's activations", "grouped", "grouped.cuh", `mbarrier_wait\(bars[^;]*;`, 0, "", "in-flight race uninitialised"},
	{"no barrier before gates are applied", "gated", "mma.cuh", `named_barrier_sync\(11[^;]*;`, 0, "", "race uninitialised wrong"},
	{"no barrier before the scratch of gates is written again", "gated", "mma.cuh", `named_barrier_sync\(11[^;]*;`, 1, "", "race"},
	{"no wait for the router", "grouped", "zipgemm_grouped.cu", `griddep_wait\(\);`, 0, "", "dependency"},
	{"no barrier before the experts are counted", "route", "moe.cu", `__syncthreads\(\);`, 0, "", "race uninitialised"},
	{"no barrier before the counts are added up", "route", "moe.cu", `__syncthreads\(\);`, 1, "", "race uninitialised"},
	{"no barrier before the list is made", "route", "moe.cu", `__syncthreads\(\);`, 2, "", "race uninitialised wrong bounds"},
	{"pairs of a part over those of another", "route", "moe.cu", `counts\[e\] \+ sum - mine`, 0, "counts[e]", "race wrong"},
	{"no proxy fence", "wgmma", "zipgemm_wgmma.cu", `fence_proxy_async\(\);`, 0, "", "proxy"},
	{"no __syncwarp before a decoded tile is handed over", "wgmma", "zipgemm_wgmma.cu", `__syncwarp\(\);`, 1, "", "race proxy"},
	{"decoder does not wait for its stage", "wgmma", "zipgemm_wgmma.cu", `mbarrier_wait\(full \+ 8, stage\.parity \^ 1\);`, 0, "", "race"},
	{"loader does not wait for its stage", "wgmma", "zipgemm_wgmma.cu", `mbarrier_wait\(full \+ 8, stage\.parity \^ 1\);`, 1, "", "race mbarrier in-flight"},
	{"consumer does not wait for the decoders", "wgmma", "zipgemm_wgmma.cu", `mbarrier_wait\(unit \+ place[^;]*;`, 0, "", "race uninitialised proxy"},
	{"consumer does not wait for the activations", "wgmma", "zipgemm_wgmma.cu", `mbarrier_wait\(xfull[^;]*;`, 0, "", "in-flight race uninitialised"},
	{"stage handed back while wgmma reads it", "wgmma", "zipgemm_wgmma.cu", `wgmma_wait<ZS_LAG>\(\);`, 0, "", "race"},
	{"sums read while wgmma adds to them", "wgmma", "zipgemm_wgmma.cu", `wgmma_wait<0>\(\);`, 0, "", "wgmma race"},
	{"barriers not made known to the copy engine", "wgmma", "zipgemm_wgmma.cu", `fence_mbarrier_init\(\);`, 0, "", "proxy"},
	{"no wait for the kernel before the activations", "wgmma", "zipgemm_wgmma.cu", `griddep_wait\(\);`, 0, "", "dependency"},
	{"every strip group's blocks begin in the first one", "wgmma", "gemm.cuh", `set \* span`, 0, "0", "wrong deadlock uninitialised bounds"},
	{"partial sums of a warpgroup taken from one block only", "wgmma", "tiles.cuh", `theirs - h \* ZS_\w+ \* BLOCK`, -1, "theirs", "deadlock wrong"},
	{"a run that ends early for itself alone", "lead", "gemm.cuh", `unit - ZS_ANYWHERE_LEAD :`, 0, "unit - (block == blockIdx.x) :", "wrong deadlock race mbarrier"},
	{"the last part of a run in step from where the one before it ended", "in step", "walk.cuh", `else if \(piece < work\.ksteps\) kstep = [^;]*;`, 0, "", "wrong"},
	{"the first part of a run in step from its end on", "in step", "walk.cuh", `if \(ZS_IN_STEP\) kstep -= piece - 1;`, 0, "", "wrong"},
	{"a run in step beyond the end of k", "in step", "walk.cuh", `while \(ZS_IN_STEP && [^;]*;`, 0, "", "wrong bounds"},
	{"a part of a group taken for the whole", "in step", "walk.cuh", `<= work\.end; \}`, 0, "<= work.end + work.ksteps; }", "wrong deadlock"},
	{"no proxy fence behind a tile for both blocks", "pair", "zipgemm_pair.cu", `fence_proxy_async\(\);`, 0, "", "proxy"},
	{"no __syncwarp between decode and escapes of a tile for both blocks", "pair", "zipgemm_pair.cu", `__syncwarp\(\);(\s+escapes\.patch)`, 0, "$1", "race uninitialised"},
	{"a tile handed over by one lane for all", "pair", "zipgemm_pair.cu", `(fence_proxy_async\(\);\s+)__syncwarp\(\);`, 0, "$1", "race proxy uninitialised"},
	{"a tile copied before its escapes are in", "pair", "zipgemm_pair.cu", `__syncwarp\(\);(\s+escapes\.patch\([^;]*;\s+if \(!ALONE\) fence_proxy_async\(\);\s+__syncwarp\(\);[^{]*\{\s+)bulk_copy_to_block\(([^;]*);`, 0, "fence_proxy_async(); __syncwarp(); if (lane == 0) bulk_copy_to_block($2;$1", "race wrong"},
	{"decoded over a tile that is being read", "pair", "zipgemm_pair.cu", `mbarrier_wait\(full \+ 8, stage\.parity \^ 1\);`, 0, "", "race mbarrier in-flight"},
	{"activations over those that are being read", "pair", "zipgemm_pair.cu", `mbarrier_wait\(xfull \+ 8, xstage\.parity \^ 1\);`, 0, "", "race mbarrier in-flight"},
	{"a test of a stage not looked at", "pair", "zipgemm_pair.cu", `mbarrier_test\(xfull \+ 8, xstage\.parity \^ 1\)`, 0, "true", "race mbarrier in-flight"},
	{"each lane by its own look at the activations' barrier", "pair", "zipgemm_pair.cu", `__shfl_sync\(0xFFFFFFFFu, \(uint32_t\)(mbarrier_test\([^)]*\)), 0\)`, 0, "$1", "divergence deadlock race"},
	{"activations brought twice", "pair", "zipgemm_pair.cu", `if \(!brought\) \{`, 0, "{", "mbarrier in-flight deadlock race"},
	{"tiles into the own block", "pair", "zipgemm_pair.cu", `(bulk_copy_to_block\(tile, [^;]*) \^ 1\);`, 0, "$1);", "argument"},
	{"tiles in the place of the other strip", "pair", "zipgemm_pair.cu", `own \* 8192`, 0, "(own ^ 1) * 8192", "wrong"},
	{"both blocks decode the same strip", "pair", "zipgemm_pair.cu", `turn\.strip \+ \(int32_t\)own`, 0, "turn.strip", "wrong"},
	{"parts that end where the one after the next begins", "pair", "turns.cuh", `ends = cut\(cluster \+ 1\)`, 0, "ends = cut(cluster + 2)", "wrong deadlock mbarrier race"},
	{"runs that begin anywhere dealt to one cluster less", "pair", "turns.cuh", `tile = i \* rest / sharers`, 0, "tile = i * rest / (sharers - 1)", "wrong deadlock bounds mbarrier race"},
	{"sums of a run within a tile kept", "pair", "turns.cuh", `plan\.together \? below & d : below\)`, 0, "below & d)", "wrong deadlock"},
	{"a run that ends before the tile of its last column", "pair", "turns.cuh", ` - \(plan\.ends\.column == 0\)`, 0, " - 1", "wrong deadlock"},
	{"a run's second piece left out", "pair", "turns.cuh", `shared--;`, 0, "shared = -1;", "wrong deadlock"},
	{"a run's second piece from its first column on", "pair", "turns.cuh", `shared == \(int32_t\)plan\.begins\.tile \? plan\.begins\.column : 0`, 0, "plan.begins.column", "wrong deadlock mbarrier race"},
	{"a piece that ends with its tile taken for another one's", "pair", "turns.cuh", `c\.tile == tile && c\.column > 0`, 0, "c.tile == tile", "deadlock wrong bounds race"},
	{"the next tile's cluster taken for one of this", "pair", "turns.cuh", `c\.tile == tile && c\.column > 0`, 0, "c.column > 0", "deadlock wrong bounds race"},
	{"both blocks have the same tokens", "pair", "turns.cuh", `rank % ZS_ACROSS`, 0, "0 * rank", "wrong in-flight race"},
	{"the other block's tile not expected", "pair", "zipgemm_pair.cu", `mbarrier_arrive_expect_tx\(full, 8192\);`, 0, "mbarrier_arrive(full);", "race in-flight uninitialised mbarrier"},
	{"half of the other block's tile expected", "pair", "zipgemm_pair.cu", `mbarrier_arrive_expect_tx\(full, 8192\);`, 0, "mbarrier_arrive_expect_tx(full, 4096);", "race in-flight uninitialised mbarrier deadlock"},
	{"what warpgroups swap over tiles that are being multiplied", "pair gated", "zipgemm_pair.cu", `named_barrier_sync\(1, ZS_CONSUMERS\);`, 0, "", "race"},
	{"gates taken before they are there", "pair gated", "zipgemm_pair.cu", `named_barrier_sync\(1, ZS_CONSUMERS\);`, 1, "", "race uninitialised wrong"},
	{"gated results over what is still read", "pair gated", "zipgemm_pair.cu", `named_barrier_sync\(2 \+ G, 128\);`, 0, "", "race"},
	{"activations over what warpgroups swapped, without a fence", "pair gated", "zipgemm_pair.cu", `fence_proxy_async\(\);(\s+// activations)`, 0, "$1", "proxy"},
	{"the stage of gates handed back by one warpgroup at once", "pair gated", "zipgemm_pair.cu", `ZS_GATED \? plan\.settles\(turn\.tile\) :`, 0, "ZS_GATED ? plan.settles(turn.tile) && g == 1 :", "mbarrier race in-flight"},
	{"gates of the strip beside", "pair gated", "zipgemm_pair.cu", `own \* \(uint32_t\)\(plan\.strips / 2 \* plan\.ksteps\)`, 0, "own * plan.ksteps", "wrong"},
	{"both warpgroups' results to the first tokens", "pair gated", "zipgemm_pair.cu", `token0 \+ G \* \(ZS_N / 2\), 2`, 0, "token0, 2", "wrong in-flight race"},
	{"no wait for the kernel before activations", "pair", "zipgemm_pair.cu", `griddep_wait\(\);`, 0, "", "dependency"},
	{"no wait for a column's activations", "pair", "zipgemm_pair.cu", `mbarrier_wait\(xfull, xstage\.parity\);`, 0, "", "in-flight race uninitialised"},
	{"no wait for a column's tiles", "pair", "zipgemm_pair.cu", `mbarrier_wait\(full, stage\.parity\);`, 0, "", "in-flight race uninitialised proxy"},
	{"stages handed back before wgmma has read them", "pair", "zipgemm_pair.cu", `wgmma_wait<1>\(\);`, 0, "", "race"},
	{"sums taken while wgmma adds to them", "pair", "zipgemm_pair.cu", `wgmma_wait<0>\(\);`, 0, "", "wgmma race"},
	{"tiles handed back to this block alone", "pair", "zipgemm_pair.cu", `arrive_everywhere\(busy \+ 8\);`, 0, "mbarrier_arrive(busy + 8, 2);", "deadlock race mbarrier in-flight"},
	{"tiles handed back to the other block alone", "pair", "zipgemm_pair.cu", `arrive_everywhere\(busy \+ 8\);`, 0, "mbarrier_arrive_cluster(busy + 8, cluster_rank() ^ 1, 2);", "deadlock race mbarrier in-flight"},
	{"stages handed back for lanes that still multiply", "pair", "zipgemm_pair.cu", `(auto release = [^;]*)__syncwarp\(\);`, 0, "$1", "race"},
	{"the last column of a turn kept for good", "pair", "zipgemm_pair.cu", `(wgmma_wait<0>\(\);\s+)release\([^;]*;`, 0, "$1", "deadlock"},
	{"stages of results handed back at once", "pair", "zipgemm_pair.cu", `if \(!keep\) mbarrier_arrive`, 0, "mbarrier_arrive", "mbarrier race in-flight deadlock"},
	{"the first stage of results handed back at once", "pair", "zipgemm_pair.cu", `release\(sends && g == 0 && [^;]*;`, 0, "release(false);", "mbarrier race in-flight deadlock"},
	{"results over activations that the other warpgroup still reads", "pair", "zipgemm_pair.cu", `named_barrier_sync\(1, ZS_CONSUMERS\);`, -1, "", "race"},
	{"results of both warpgroups in one stage", "pair", "zipgemm_pair.cu", `stage_before\(2 - g\)`, 0, "stage_before(1)", "race mbarrier in-flight deadlock wrong"},
	{"results of a turn of one column through the stage before it", "pair", "zipgemm_pair.cu", `turn\.end - turn\.begin >= 2`, 0, "turn.end - turn.begin >= 1", "race mbarrier in-flight deadlock"},
	{"stage of a pair's results loaded while they are read", "pair", "zipgemm_pair.cu", `bulk_copies_read\(\);`, 0, "", "in-flight"},
	{"stage of a pair's results handed back by one arrival", "pair", "zipgemm_pair.cu", `mbarrier_arrive\(sent \+ 8, 4\)`, 0, "mbarrier_arrive(sent + 8)", "deadlock"},
	{"a pair's last results not waited for", "pair", "zipgemm_pair.cu", `if \(tid == 0\) bulk_copies_read\(\);`, -1, "", "in-flight"},
	{"a part's results sent to the first", "pair", "tiles.cuh", `token0, part, at`, 0, "token0, 0, at", "wrong in-flight race"},
	{"a part's results stored behind the first's columns", "pair", "tiles.cuh", `row0 / part_rows \* \(n \* ldy - part_rows\)`, 0, "0", "wrong bounds in-flight race"},
	{"a pair's results with no proxy fence", "pair", "tiles.cuh", `fence_proxy_async\(\);`, 0, "", "proxy"},
	{"one barrier for the results of both warpgroups", "pair", "zipgemm_pair.cu", `turn\.token, 2 \+ g, tid`, 0, "turn.token, 2, tid", "race uninitialised proxy in-flight"},
	{"a block that leaves while the other writes to it", "pair", "zipgemm_pair.cu", `cluster_sync\(\);`, 0, "", "cluster"},
	{"tiles into a block that has no barriers yet", "pair", "zipgemm_pair.cu", `#include "turns\.cuh"`, 0, "#include \"turns.cuh\"\n#define cluster_arrive_relaxed()\n#define cluster_wait() __syncthreads()", "cluster mbarrier race proxy in-flight"},
	{"the cluster's barrier not waited for", "pair", "zipgemm_pair.cu", `cluster_wait\(\);`, 0, "", "barrier mbarrier race"},
	{"barriers of a pair not made known to the copy engine", "pair", "zipgemm_pair.cu", `fence_mbarrier_init\(\);`, 0, "", "proxy race"},
	{"partial sums not restored", "pair", "tiles.cuh", `st_relaxed_v4\(from, [^;]*;`, 0, "", "wrong"},
	{"sums of the other block's tokens", "pair", "tiles.cuh", `\(first \+ h0\) \* ZS_\w+`, 0, "(first + h0)", "deadlock wrong race"},
	{"a pair's columns out of order across turns", "pair", "zipgemm_pair.cu", `turn\.end - 1 - over;`, 0, "turn.end - 1;", "wrong deadlock cluster"},
	{"activations of the column before", "pair", "zipgemm_pair.cu", `\(uint32_t\)at\.column \* ZS_TILE`, 0, "(uint32_t)max(at.column - 1, 0) * ZS_TILE", "wrong"},
	{"no proxy fence before a block multiplies by its own tiles", "solo", "zipgemm_pair.cu", `if \(ZS_CLUSTER == 1\) fence_proxy_async\(\);`, 0, "", "proxy"},
	{"a tile of the own block told of by one lane for all", "solo", "zipgemm_pair.cu", `__syncwarp\(\);(\s+if \(ALONE && lane == 0\) mbarrier_arrive)`, 0, "$1", "race proxy uninitialised"},
	{"one strip's tile taken for both", "solo", "zipgemm_pair.cu", `ZS_BARRIERS \+ s \* 16, ZS_HANDS\)`, 0, "ZS_BARRIERS + s * 16, 1)", "race mbarrier proxy uninitialised deadlock"},
	{"half of the activations taken for all", "solo", "zipgemm_pair.cu", `ZS_XBARRIERS \+ s \* 16, ZS_HANDS\)`, 0, "ZS_XBARRIERS + s * 16, 1)", "race mbarrier in-flight uninitialised deadlock"},
	{"all activations expected of each decoder", "solo", "zipgemm_pair.cu", `ZS_XBYTES / ZS_HANDS\)`, 0, "ZS_XBYTES)", "deadlock mbarrier"},
	{"both decoders bring the same tokens", "solo", "zipgemm_pair.cu", `\(ALONE \? own : 0\)`, 0, "0", "race in-flight uninitialised wrong"},
	{"both decoders of a block have the same strip", "solo", "zipgemm_pair.cu", `ALONE \? d % ZS_HANDS`, 0, "ALONE ? 0", "race uninitialised wrong mbarrier"},
	{"escapes of the first tile for all", "solo", "zipgemm_pair.cu", `escapes = coming, `, 0, "", "wrong race bounds"},
	{"a header for two tiles", "solo", "zipgemm_pair.cu", `, head = head_of\(later\);`, 0, ";", "wrong race bounds"},
	{"words of the own block's next tile loaded too early", "solo", "zipgemm_pair.cu", `decode_lane\(([^;]*;)(\s+)(if \(ALONE[^;]*;)`, 0, "$3$2decode_lane($1", "wrong uninitialised race"},
	{"tile goes out with no proxy fence", "relay", "zipgemm_relay.cu", `fence_proxy_async\(\);`, 0, "", "proxy"},
	{"no __syncwarp between decode and escapes of a tile to hand on", "relay", "zipgemm_relay.cu", `__syncwarp\(\);(\s+escapes\.patch)`, 0, "$1", "race uninitialised"},
	{"a tile sent by one lane for all", "relay", "zipgemm_relay.cu", `(fence_proxy_async\(\);\s+)__syncwarp\(\);`, 0, "$1", "race proxy uninitialised"},
	{"a tile decoded over one that is being sent", "relay", "zipgemm_relay.cu", `if \(lane == 0\) bulk_copies_read(?:<[^>]*>)?\(\);`, 0, "", "in-flight"},
	{"a tile decoded over one that lane 0 alone knows to be sent", "relay", "zipgemm_relay.cu", `(bulk_copies_read(?:<[^>]*>)?\(\);\s+)__syncwarp\(\);`, 0, "$1", "in-flight race"},
	{"flag before the tile is there", "relay", "zipgemm_relay.cu", `if \(lane == 0\) bulk_copies_done<1>\(\);`, 0, "", "in-flight race"},
	{"flag before the first tile is there", "relay", "zipgemm_relay.cu", `if \(lane == 0\) bulk_copies_done<0>\(\);`, 0, "", "in-flight race"},
	{"flag before the last tile is there", "relay", "zipgemm_relay.cu", `if \(lane == 0\) bulk_copies_done<0>\(\);`, -1, "", "in-flight race"},
	{"flag without a release", "relay", "zipgemm_relay.cu", `fence_release\(\);`, 0, "", "race"},
	{"flag of another column", "relay", "zipgemm_relay.cu", `told = flags \+ column;`, 0, "told = flags + column + 1;", "deadlock race in-flight bounds uninitialised"},
	{"flags of every second round lost", "relay", "zipgemm_relay.cu", `if \(told_before\) red_add_relaxed\(told_before, 1\);`, 0, "", "deadlock"},
	{"one strip taken for all", "relay", "zipgemm_relay.cu", `\+ 1 >= here;`, 0, "+ 1 >= 1;", "in-flight race uninitialised"},
	{"tile of the other strip", "relay", "zipgemm_relay.cu", `at\.strip % ZS_GROUPS \* 8192`, 0, "(at.strip + 1) % ZS_GROUPS * 8192", "wrong uninitialised race"},
	{"tiles read with no proxy fence", "relay", "zipgemm_relay.cu", `if \(ready > 0 && lane == 0\) fence_proxy_async_global\(\);`, 0, "", "proxy"},
	{"a vote taken for a fence", "relay", "zipgemm_relay.cu", `if \(ready > 0\) __syncwarp\(\);`, 0, "", "proxy race"},
	{"the first ticket skipped", "relay", "zipgemm_relay.cu", `ticket, 0\) \+ 1;`, 0, "ticket, 0) + 2;", "deadlock"},
	{"a guess of a ticket that is of no tile", "relay", "zipgemm_relay.cu", `if \(s\.column < 0\) s\.strip = -1;`, 0, "", "bounds"},
	{"tickets of no tile decoded", "relay", "relay.cuh", `column < begin \? -1 : column`, 0, "column", "race in-flight bounds wrong"},
	{"results over columns that are being read", "relay", "zipgemm_relay.cu", `mbarrier_wait\(bars \+ 8, stage\.parity \^ 1\);`, 0, "", "race in-flight"},
	{"results with no proxy fence", "relay", "tiles.cuh", `fence_proxy_async\(\);`, 0, "", "proxy"},
	{"results sent before all warps have them", "relay", "tiles.cuh", `named_barrier_sync\(barrier, 128\);`, 0, "", "race uninitialised proxy"},
	{"results of two warps exchanged", "relay", "tiles.cuh", `warp \* 2 \+ lane / 8 % 2`, 0, "warp % 2 * 4 + warp / 2 * 2 + lane / 8 % 2", "wrong"},
	{"stage of results loaded while they are read", "relay", "zipgemm_relay.cu", `bulk_copies_read(?:<[^>]*>)?\(\);`, 1, "", "in-flight"},
	{"stage of results handed back to this block alone", "relay", "zipgemm_relay.cu", `arrive_everywhere\(sent \+ 8, 4 \* ZS_GROUPS\);`, 0, "mbarrier_arrive(sent + 8, 4 * ZS_GROUPS);", "deadlock"},
	{"stage of results handed back by one arrival", "relay", "zipgemm_relay.cu", `\(sent \+ 8, 4 \* ZS_GROUPS\)`, 0, "(sent + 8)", "deadlock"},
	{"the last results not waited for", "relay", "zipgemm_relay.cu", `if \(tid == 0\) bulk_copies_read(?:<[^>]*>)?\(\);`, -1, "", "in-flight"},
	{"round of the results not told of", "relay", "zipgemm_relay.cu", `, mbarrier_arrive\(full\);`, 0, ";", "deadlock mbarrier in-flight race"},
	{"round of the results told of too early", "relay", "zipgemm_relay.cu", `mbarrier_wait\(full \+ 8, stage\.parity \^ 1\), `, 0, "", "mbarrier in-flight race"},
	{"the last stage of results handed back to a block that has not come to it", "relay", "zipgemm_relay.cu", `if \(tid == 0\) bulk_copies_read(?:<[^>]*>)?\(\);  // nothing`, 0, "outbox.hand_back(tid);  // ", "mbarrier race deadlock"},
	{"no stages for the results in the loader's ring", "relay", "zipgemm_relay.cu", `g < ZS_GROUPS; g\+\+, stage\.advance\(1, ZS_STAGES\)`, 0, "g < ZS_GROUPS; g++", "deadlock mbarrier in-flight race uninitialised"},
	{"no stages for the results in the consumers' ring", "relay", "zipgemm_relay.cu", `stage\.advance\(ZS_GROUPS - g, ZS_STAGES\);`, 0, "", "deadlock mbarrier in-flight race uninitialised"},
	{"columns loaded over those that are being read", "relay", "zipgemm_relay.cu", `mbarrier_wait\(full \+ 8, stage\.parity \^ 1\);`, 0, "", "race in-flight mbarrier"},
	{"no wait for a column", "relay", "zipgemm_relay.cu", `mbarrier_wait\(full, stage\.parity\);`, 0, "", "in-flight race uninitialised"},
	{"columns handed back before wgmma has read them", "relay", "zipgemm_relay.cu", `wgmma_wait<1>\(\);`, 0, "", "race"},
	{"columns handed back to this block alone", "relay", "zipgemm_relay.cu", `arrive_everywhere\(busy \+ 8\)`, 0, "mbarrier_arrive(busy + 8, 2)", "deadlock race mbarrier in-flight"},
	{"the last column of a turn kept", "relay", "zipgemm_relay.cu", `(wgmma_wait<0>\(\);\s+)release\(\);`, 0, "$1", "deadlock"},
	{"the peer's half of a column left out", "relay", "zipgemm_relay.cu", `\(1 << ZS_CLUSTER\) - 1`, 0, "1 << plan.rank", "deadlock uninitialised"},
	{"both blocks bring the same tokens", "relay", "zipgemm_relay.cu", `turn\.token \+ plan\.rank \* ROWS`, 0, "turn.token", "wrong"},
	{"whole turns a round short", "relay", "turns.cuh", `coming \+= (plan\.\w+)`, 0, "coming += 2 * $1", "wrong uninitialised deadlock"},
	{"sums of parts from one that has none below", "relay", "turns.cuh", `others >= d\)`, 0, "1)", "deadlock bounds wrong race"},
	{"sums of parts always from the neighbour", "relay", "turns.cuh", `add_sums\(acc, slot, d, `, 0, "add_sums(acc, slot, 1, ", "deadlock wrong race"},
	{"no wait for the kernel before the tiles that it may still read", "relay", "zipgemm_relay.cu", `griddep_wait\(\);`, 0, "", "dependency"},
	{"no wait for the kernel before columns", "relay", "zipgemm_relay.cu", `griddep_wait\(\);`, 2, "", "dependency"},
	{"flags not cleared", "relay", "zipgemm_relay.cu", `i < words;`, 0, "i < ZS_CONTROL;", "wrong"},
	{"tickets not cleared", "relay", "zipgemm_relay.cu", `uint64_t i = tid; i < words`, 0, "uint64_t i = tid + 1; i < words", "wrong"},
	{"flags cleared while others look at them", "relay", "zipgemm_relay.cu", `atom_add_acq_rel\(flags \+ 1, 1\)`, 0, "atomicAdd(flags + 1, 1u)", "race"},
	{"flags cleared by a block that is not done", "relay", "zipgemm_relay.cu", `named_barrier_sync\(7, 128\);`, 0, "", "race wrong deadlock"},
	{"no barrier before a block knows whether it is the last", "relay", "zipgemm_relay.cu", `named_barrier_sync\(7, 128\);`, 1, "", "race uninitialised wrong"},
	{"a block of results that leaves while its peer writes to it", "relay", "zipgemm_relay.cu", `cluster_sync\(\);`, 0, "", "cluster"},
	{"columns into a block that has no barriers yet", "relay", "zipgemm_relay.cu", `cluster_arrive_relaxed\(\);\s+cluster_wait\(\);`, 0, "__syncthreads();", "cluster mbarrier race proxy"},
	{"no barrier before the first group is read", "compress", "compress.cu", `__syncthreads\(\);(\s+uint32_t group)`, 0, "$1", "race uninitialised"},
	{"who looks back does not wait for the plans", "compress", "compress.cu", `named_barrier_sync\(barrier, all\);`, 0, "", "race uninitialised deadlock"},
	{"no wait for the place of a list", "compress", "compress.cu", `named_barrier_sync\(barrier, all\);`, 2, "", "race uninitialised deadlock"},
	{"the next tile over one whose list is written", "compress", "compress.cu", `__syncwarp\(\);  // all have read the tile before[^\n]*`, 0, "", "race in-flight"},
	{"one place for the units of two groups", "compress", "compress.cu", `board\.units\[odd\]`, -1, "board.units[0]", "race uninitialised wrong"},
	{"one place for the lists of two groups", "compress", "compress.cu", `board\.starts\[odd\]`, 0, "board.starts[0]", "race uninitialised wrong"},
	{"no wait for a tile", "compress", "compress.cu", `cp_async_wait<0>\(\);`, 0, "", "in-flight race uninitialised"},
	{"no __syncwarp before a tile is read", "compress", "compress.cu", `__syncwarp\(\);(\s+\}\s+// A lane's weights)`, 0, "$1", "in-flight race uninitialised"},
	{"the next tile into the same buffer", "compress", "compress.cu", `begin\(next, odd \^ 1\)`, 0, "begin(next, odd)", "race in-flight wrong uninitialised"},
	{"blocks that end before the last sum is there", "compress", "compress.cu", `while \(\(through = ([^;]*)\) == 0\) __nanosleep\(100\);`, 0, "through = $1;", "wrong bounds"},
	{"no barrier before total and checksums are read", "compress", "compress.cu", `__syncthreads\(\);(\s+const uint32_t total)`, 0, "$1", "race uninitialised wrong"},
	{"a header without one of the CRC's parts", "compress", "compress.cu", `i < 3; i\+\+\) crc`, 0, "i < 2; i++) crc", "wrong"},
	{"memory cleared that is not spare", "compress", "compress.cu", `\(uint64_t\)total \+ blockIdx`, 0, "(uint64_t)total - 1 + blockIdx", "race wrong"},
	{"no barrier before the samples are added up", "compress", "compress.cu", `__syncthreads\(\);(\s+if \(threadIdx)`, 0, "$1", "race uninitialised"},
	{"no __syncwarp before the histogram is summed", "compress", "tally.cuh", `(total = 0;\s+)__syncwarp\(\);`, 0, "$1", "race"},
	{"scratch memory not cleared", "compress", "compress.cu", `i = blockIdx\.x \* blockDim\.x`, 0, "i = 1 + blockIdx.x * blockDim.x", "bounds uninitialised wrong deadlock"},
	{"a look-back that takes what is not there for nothing", "compress", "compress.cu", `if \(wait >> last\)`, 0, "if (false)", "race wrong bounds"},
	{"a look-back that waits for nobody's sum", "compress", "compress.cu", `if \(end\) return sum;`, 0, "", "race wrong bounds"},
	{"a look-back that counts blocks below the one that knows", "compress", "compress.cu", `lane >= last \? part : 0`, 0, "part", "race wrong bounds"},
	{"lists beyond the room", "compress", "compress.cu", `<= room`, 0, "<= room + 1", "bounds"},
	{"a sum that stays", "compress", "compress.cu", `\*sum = 0;`, 0, "", "wrong"},
}

func TestSeededBugsAreCaught(t *testing.T) {
	for _, m := range mutations {
		t.Run(m.name, func(t *testing.T) {
			t.Parallel()
			files, err := emu.Mutate(kernels.Sources, m.file, m.pattern, m.nth, m.replacement)
			require.NoError(t, err)
			// Some of relay's mistakes show where a warp stops between two instructions, some of pair's in one product of seven.
			tries := max(10, map[string]int{"relay": 80, "pair": 30, "solo": 30, "pair gated": 30}[m.kernel])
			for _, seed := range seeds(t, tries) {
				kind := runMutant(t, m.kernel, seed, files)
				if kind == "" {
					continue // this schedule does not show it
				}
				require.Contains(t, strings.Fields(m.want), kind)
				return
			}
			t.Fatal("the bug is not caught")
		})
	}
}

// runMutant returns what caught the bug, or "" if nothing did.
func runMutant(t *testing.T, kernel string, seed uint64, files fs.FS) string {
	switch kernel {
	case "compress":
		return compressMutant(t, seed, files)
	case "decompress":
		d := newDecompressor(t, files, 2)
		c := decompressCase{x: newMatrix("gaussian", 130, 130, seed), blocks: 1, ld: 130, align: 16, seed: seed}
		got, err := d.run(c)
		return verdict(t, err, bytes.Equal(got, c.expected()))
	case "gather":
		return gatherMutant(t, seed, files)
	case "route":
		return routeMutant(t, seed, files)
	case "grouped", "gated":
		return groupedMutant(t, kernel == "gated", seed, files)
	}
	v, p := mutantProduct(kernel, seed)
	want, err := newGEMM(t, kernels.Sources, kernel, v).run(p)
	require.NoError(t, err)
	got, err := newGEMM(t, files, kernel, v).run(p)
	if kernel != "mma" && err != nil && faultKind(err) == "" {
		return "wrong" // what the others are to leave as it was
	}
	return verdict(t, err, slices.Equal(want, got))
}

// mutantProduct is a product for which a seeded bug of a ZipGEMM kernel shows, by some seed.
func mutantProduct(kernel string, seed uint64) (variant, product) {
	type size struct{ m, k, n, grid int }
	v, s := seededVariant(kernel, 8), size{130, 900, 5, 5}
	switch kernel {
	case "in step":
		s = size{320, 1100, 5, 3} // runs of 15 units, of which a group has nine
	case "lead":
		s = size{192, 1792, 5, 5} // two runs of eight units that begin and end within a group
	case "wgmma":
		if seed%3 == 2 {
			s = size{250, 1160, 5, 4} // two blocks for each strip group, with a lead
		}
	case "pair", "solo":
		// A tile in three parts, of which the second block has no tokens; in four; turns, and tiles in two parts; tiles for fewer clusters than there are; two turns that
		// go round the rings; turns of one column; runs that begin anywhere.
		s = []size{{70, 900, 5, 6}, {70, 600, 12, 8}, {130, 400, 75, 8}, {70, 900, 60, 10}, {100, 460, 60, 2}, {256, 64, 130, 4}, {640, 460, 12, 18}}[seed%7]
		s.grid = s.grid * v.cluster / 2
	case "pair gated":
		// A tile in three parts; turns of one column; tiles in two parts; runs that begin anywhere; turns that go round the rings.
		s = []size{{128, 900, 5, 6}, {256, 64, 130, 4}, {256, 400, 75, 8}, {640, 460, 60, 18}, {128, 460, 120, 2}}[seed%5]
	case "relay":
		// A cluster with ten turns of three columns; one tile in three parts, of which none has as many columns as another; in four; turns and two parts; one turn that goes
		// round the ring.
		s = []size{{250, 130, 150, 2}, {200, 200, 9, 6}, {70, 600, 12, 8}, {384, 260, 40, 8}, {100, 400, 16, 2}}[seed%5]
	}
	p := newProduct(s.m, s.k, s.n, 2*seed)
	p.grid, p.seed = s.grid, seed
	switch kernel {
	case "pair", "solo", "relay":
		p.parts = partsOf(s.m)
		p.ldy = (s.m/p.parts + 7) / 8 * 8
	case "pair gated":
		p.ldy = s.m/2 + int(seed%3)/2*5 // with 5 no copy can write it
	default:
		p.ldx = (s.k + 7) / 8 * 8 // 16-byte aligned rows
	}
	return v, p
}

func compressMutant(t *testing.T, seed uint64, files fs.FS) string {
	// Some blocks look at two windows of others; the room is one unit too small now and then.
	c := newCompressor(t, files, 2)
	kind := []string{"outliers", "random"}[seed>>3%2]
	in := compressCase{x: newMatrix(kind, 130, 130, seed), blocks: 1 + int(seed>>2%2), ld: 136 - 5*int(seed>>4%2), room: -int(seed % 2), seed: seed}
	if seed%4 >= 2 {
		in = compressCase{x: lists(280), blocks: 11, ld: 280 * 64, samples: 40, room: 1000 * int(seed>>2%2), seed: seed}
	}
	got, _, err := c.run(t, in)
	if err != nil {
		if faultKind(err) == "" {
			return "wrong" // the mail, or the sum
		}
		return faultKind(err)
	}
	if in.room >= 0 && !bytes.Equal(got, encodeTiled(in.x)) {
		return "wrong"
	}
	return ""
}

func gatherMutant(t *testing.T, seed uint64, files fs.FS) string {
	g := newGatherer(t, files, false)
	for _, kind := range []string{"mixed", "outliers"} {
		c := gatherCase{x: newMatrix(kind, 130, 200, seed), ids: someRows(130, 30, seed), idBytes: 8, align: 16, seed: seed}
		got, err := g.run(c)
		if kind := verdict(t, err, bytes.Equal(got, c.expected())); kind != "" {
			return kind
		}
	}
	return ""
}

func routeMutant(t *testing.T, seed uint64, files fs.FS) string {
	rng := rand.New(rand.NewPCG(seed, 1))
	ids := make([]int, 100)
	for i := range ids {
		ids[i] = rng.IntN(20)
	}
	got, err := route(newRouter(t, files), ids, 4, 20, 8, 8, seed)
	if err != nil {
		return verdict(t, err, false)
	}
	want, lists := words32(routing(ids, 4, 20, 8)), 16+16*len(ids)
	return verdict(t, nil, bytes.Equal(want[:4], got[:4]) && bytes.Equal(want[lists:], got[lists:]))
}

func groupedMutant(t *testing.T, gated bool, seed uint64, files fs.FS) string {
	m, compile := 130, func(files fs.FS, v variant) grouped { return newGrouped(t, files, v, false) }
	if gated {
		m, compile = 256, func(files fs.FS, v variant) grouped { return newGated(t, files, v) }
	}
	l := newLayer("everywhere", 9, 2, m, 200, 3*seed+1) // rows of x are tokens
	l.grid = 3
	if !gated {
		l.grid = 4 + int(seed%2)*60 // more blocks than units, or fewer
		if seed%2 == 1 {
			l.ids = l.ids[:2]
		}
	}
	v := variant{n: 8, mw: 2, kw: 2, xstages: 2}
	want, err := compile(kernels.Sources, v).run(l)
	require.NoError(t, err)
	got, err := compile(files, v).run(l)
	return verdict(t, err, slices.Equal(want, got))
}

// verdict is the kind of the emulator's fault, which a run that failed must have, "wrong" or "".
func verdict(t *testing.T, err error, right bool) string {
	t.Helper()
	switch {
	case err != nil:
		require.NotEmpty(t, faultKind(err), err)
		return faultKind(err)
	case !right:
		return "wrong"
	}
	return ""
}

// The seeds of the tests are not lucky: other schedules of the unchanged kernels pass too.
func TestUnchangedKernelsPass(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(uint64(len(mutations)), 3))
	for _, kernel := range []string{"compress", "decompress", "gather", "gated", "grouped", "in step", "mma", "pair", "pair gated", "relay", "route", "solo", "wgmma"} {
		for range 3 {
			require.Empty(t, runMutant(t, kernel, rng.Uint64()>>1, kernels.Sources))
		}
	}
}
