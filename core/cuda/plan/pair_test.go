// SPDX-License-Identifier: Apache-2.0

package plan_test

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/zipserv/zipserv/core/cuda/plan"
)

var h100 = plan.Device{Capability: 90, SMs: 132, SmemBlock: 232448, SmemSM: 233472, Bandwidth: 3.35e12, ClockHz: 1.98e9}

// way names how a plan solves a problem: few, expand, relay, or pair or solo with the tokens of a block.
func way(t *testing.T, l plan.Linear) string {
	t.Helper()
	switch {
	case l.Expand:
		return "expand"
	case l.Kernel.Entry == "zs_zipgemm_pair":
		kernel := plan.Pair
		if l.Kernel.Cluster == 1 {
			kernel = plan.Solo
		}
		return fmt.Sprintf("%s %d", kernel, define(t, l.Kernel, "ZS_N"))
	case l.Kernel.Entry == "zs_zipgemm_relay":
		return "relay"
	}
	return "few"
}

// forMany says whether a plan is of a kernel for many tokens.
func forMany(l plan.Linear) bool {
	return l.Kernel.Entry == "zs_zipgemm_pair" || l.Kernel.Entry == "zs_zipgemm_relay"
}

// What an H100 measured (docs/performance.md, "Which way for how many tokens"; speed-up over cuBLAS's product with the uncompressed weight, in the same turns). The
// chosen way must be among the best.
func TestManyTokensAreSolvedInTheFastestWay(t *testing.T) {
	for _, c := range []struct {
		m, k, n uint64
		x       map[string]float64
	}{
		{4096, 4096, 256, map[string]float64{"few": 0.596, "expand": 0.513, "pair 128": 0.817, "pair 256": 0.596, "relay": 0.363, "solo 256": 0.623}},
		{4096, 4096, 512, map[string]float64{"few": 0.410, "expand": 0.559, "pair 128": 0.724, "pair 256": 0.749, "relay": 0.491}},
		{4096, 4096, 1024, map[string]float64{"expand": 0.691, "pair 128": 0.725, "pair 256": 0.906, "relay": 0.791}},
		{4096, 4096, 2048, map[string]float64{"expand": 0.831, "pair 128": 0.720, "pair 256": 0.916, "relay": 0.877}},
		{4096, 4096, 4096, map[string]float64{"expand": 0.910, "pair 128": 0.731, "pair 256": 0.918, "relay": 0.935}},
		{4096, 4096, 8192, map[string]float64{"expand": 0.957, "pair 128": 0.737, "pair 256": 0.916, "relay": 0.950}},
		{6144, 4096, 256, map[string]float64{"few": 0.559, "expand": 0.448, "pair 128": 0.732, "pair 256": 0.502, "relay": 0.426, "solo 256": 0.729}},
		{6144, 4096, 1024, map[string]float64{"expand": 0.696, "pair 128": 0.747, "pair 256": 0.831, "relay": 0.730}},
		{6144, 4096, 2048, map[string]float64{"expand": 0.816, "pair 128": 0.739, "pair 256": 0.933, "relay": 0.901}},
		{6144, 4096, 4096, map[string]float64{"expand": 0.909, "pair 128": 0.743, "pair 256": 0.928, "relay": 0.931}},
		{6144, 4096, 8192, map[string]float64{"expand": 0.952, "pair 128": 0.743, "pair 256": 0.960, "relay": 1.020}},
		{4096, 14336, 256, map[string]float64{"few": 0.752, "expand": 0.440, "pair 128": 0.896, "pair 256": 0.616, "relay": 0.482, "solo 256": 0.815}},
		{4096, 14336, 512, map[string]float64{"few": 0.520, "expand": 0.554, "pair 128": 0.721, "pair 256": 0.859, "relay": 0.681}},
		{4096, 14336, 1024, map[string]float64{"expand": 0.684, "pair 128": 0.724, "pair 256": 0.958, "relay": 0.828}},
		{4096, 14336, 2048, map[string]float64{"expand": 0.835, "pair 128": 0.724, "pair 256": 0.916, "relay": 0.926}},
		{4096, 14336, 4096, map[string]float64{"expand": 0.893, "pair 128": 0.726, "pair 256": 0.948, "relay": 0.974}},
		{4096, 14336, 8192, map[string]float64{"expand": 0.946, "pair 128": 0.724, "pair 256": 0.960, "relay": 0.941}},
		{28672, 4096, 256, map[string]float64{"few": 0.656, "expand": 0.421, "pair 128": 0.838, "pair 256": 0.597, "relay": 0.530, "solo 256": 0.911}},
		{28672, 4096, 1024, map[string]float64{"expand": 0.693, "pair 128": 0.730, "pair 256": 0.935, "relay": 0.835}},
		{28672, 4096, 2048, map[string]float64{"expand": 0.826, "pair 128": 0.739, "pair 256": 0.936, "relay": 0.913}},
		{28672, 4096, 4096, map[string]float64{"expand": 0.912, "pair 128": 0.734, "pair 256": 0.949, "relay": 0.912}},
		{28672, 4096, 8192, map[string]float64{"expand": 0.951, "pair 128": 0.721, "pair 256": 0.941, "relay": 0.914}},
		{3584, 3584, 256, map[string]float64{"few": 0.558, "expand": 0.529, "pair 128": 0.752, "pair 256": 0.554, "relay": 0.331, "solo 256": 0.602}},
		{3584, 3584, 512, map[string]float64{"few": 0.367, "expand": 0.568, "pair 128": 0.664, "pair 256": 0.673, "relay": 0.449}},
		{3584, 3584, 1024, map[string]float64{"expand": 0.692, "pair 128": 0.632, "pair 256": 0.839, "relay": 0.706}},
		{3584, 3584, 2048, map[string]float64{"expand": 0.820, "pair 128": 0.773, "pair 256": 0.911, "relay": 0.877}},
		{3584, 3584, 4096, map[string]float64{"expand": 0.894, "pair 128": 0.786, "pair 256": 0.920, "relay": 0.927}},
		{3584, 3584, 8192, map[string]float64{"expand": 0.944, "pair 128": 0.725, "pair 256": 0.934, "relay": 0.949}},
		{5120, 5120, 256, map[string]float64{"few": 0.682, "expand": 0.481, "pair 128": 0.802, "pair 256": 0.529, "relay": 0.415, "solo 256": 0.807}},
		{5120, 5120, 512, map[string]float64{"few": 0.419, "expand": 0.551, "pair 128": 0.669, "pair 256": 0.748, "relay": 0.546, "solo 256": 0.594}},
		{5120, 5120, 1024, map[string]float64{"expand": 0.697, "pair 128": 0.695, "pair 256": 0.762, "relay": 0.657}},
		{5120, 5120, 2048, map[string]float64{"expand": 0.824, "pair 128": 0.732, "pair 256": 0.865, "relay": 0.863}},
		{5120, 5120, 4096, map[string]float64{"expand": 0.905, "pair 128": 0.737, "pair 256": 0.936, "relay": 0.960}},
		{5120, 5120, 8192, map[string]float64{"expand": 0.924, "pair 128": 0.743, "pair 256": 0.958, "relay": 0.969}},
		// Numbers of tokens that fill no tiles.
		{4096, 4096, 1536, map[string]float64{"pair 128": 0.716, "pair 256": 0.884, "relay": 0.780}},
		{6144, 4096, 1536, map[string]float64{"pair 128": 0.696, "pair 256": 0.842, "relay": 0.776}},
		{4608, 3584, 512, map[string]float64{"pair 128": 0.590, "pair 256": 0.639, "relay": 0.489}},
		{4608, 3584, 1024, map[string]float64{"pair 128": 0.640, "pair 256": 0.699, "relay": 0.610}},
		{2048, 7168, 512, map[string]float64{"pair 128": 0.872, "pair 256": 0.725, "relay": 0.542, "solo 256": 0.726}},
		{7168, 2048, 512, map[string]float64{"pair 128": 0.644, "pair 256": 0.809, "relay": 0.587}},
		{7168, 2048, 1024, map[string]float64{"pair 128": 0.782, "pair 256": 0.936, "relay": 0.811}},
		// Runs of the pair kernel that begin anywhere, as some above.
		{4608, 3584, 256, map[string]float64{"few": 0.534, "pair 128": 0.654, "pair 256": 0.472, "relay": 0.346, "solo 256": 0.658}},
		{3584, 18944, 256, map[string]float64{"few": 0.714, "pair 128": 0.888, "pair 256": 0.581, "relay": 0.497, "solo 256": 0.844}},
		{3584, 18944, 512, map[string]float64{"pair 128": 0.633, "pair 256": 0.816, "relay": 0.676}},
		{5120, 27648, 256, map[string]float64{"few": 0.594, "pair 128": 0.829, "pair 256": 0.584, "relay": 0.491, "solo 256": 0.898}},
		{5120, 27648, 512, map[string]float64{"pair 128": 0.731, "pair 256": 0.894, "relay": 0.564}},
		// The layout whose blocks stand alone, as some above.
		{4096, 4096, 1280, map[string]float64{"pair 256": 0.726, "pair 128": 0.688, "solo 256": 0.697, "relay": 0.668}},
		{4096, 4096, 1792, map[string]float64{"pair 256": 0.909, "pair 128": 0.779, "solo 256": 0.806, "relay": 0.886}},
		{28672, 4096, 1280, map[string]float64{"pair 256": 0.798, "pair 128": 0.746, "solo 256": 0.833, "relay": 0.890}},
		{28672, 4096, 1792, map[string]float64{"pair 256": 0.809, "pair 128": 0.745, "solo 256": 0.826, "relay": 0.892}},
		{6144, 4096, 1280, map[string]float64{"pair 256": 0.710, "pair 128": 0.691, "solo 256": 0.819, "relay": 0.825}},
		{6144, 4096, 1792, map[string]float64{"pair 256": 0.833, "pair 128": 0.696, "solo 256": 0.723, "relay": 0.790}},
		{5120, 5120, 1280, map[string]float64{"pair 256": 0.811, "pair 128": 0.722, "solo 256": 0.692, "relay": 0.748}},
		{5120, 5120, 1792, map[string]float64{"pair 256": 0.830, "pair 128": 0.735, "solo 256": 0.777, "relay": 0.835}},
		{2048, 7168, 256, map[string]float64{"pair 128": 0.820, "pair 256": 0.553, "solo 256": 0.613}},
		{7168, 2048, 256, map[string]float64{"pair 128": 0.752, "pair 256": 0.569, "solo 256": 0.694}},
		{8192, 8192, 256, map[string]float64{"pair 128": 0.796, "pair 256": 0.563, "solo 256": 0.809}},
		{14336, 5120, 256, map[string]float64{"pair 128": 0.762, "pair 256": 0.526, "solo 256": 0.840}},
		{10240, 8192, 256, map[string]float64{"pair 128": 0.813, "pair 256": 0.539, "solo 256": 0.847}},
		{57344, 8192, 256, map[string]float64{"pair 128": 0.814, "pair 256": 0.540, "solo 256": 0.912}},
		{14336, 4096, 256, map[string]float64{"pair 128": 0.722, "pair 256": 0.517, "solo 256": 0.833}},
		{18944, 3584, 256, map[string]float64{"pair 128": 0.869, "pair 256": 0.566, "solo 256": 0.870}},
		// 2026-11-27, 11:50 UTC: a row is of one run, with the grids of 256 and 512 tokens.
		{2048, 7168, 192, map[string]float64{"pair 128": 0.692, "pair 256": 0.467, "relay": 0.385, "solo 256": 0.533, "solo 192": 0.630}},
		{3584, 3584, 192, map[string]float64{"pair 128": 0.739, "pair 256": 0.666, "relay": 0.336, "solo 256": 0.604, "solo 192": 0.643}},
		{3584, 18944, 192, map[string]float64{"pair 128": 0.895, "pair 256": 0.612, "relay": 0.506, "solo 256": 0.861, "solo 192": 1.013}},
		{4096, 4096, 192, map[string]float64{"pair 128": 0.719, "pair 256": 0.526, "relay": 0.319, "solo 256": 0.577, "solo 192": 0.673}},
		{4096, 14336, 192, map[string]float64{"pair 128": 0.906, "pair 256": 0.637, "relay": 0.497, "solo 256": 0.901, "solo 192": 0.936}},
		{4608, 3584, 192, map[string]float64{"pair 128": 0.693, "pair 256": 0.500, "relay": 0.374, "solo 256": 0.695, "solo 192": 0.812}},
		{5120, 5120, 192, map[string]float64{"pair 128": 0.767, "pair 256": 0.494, "relay": 0.389, "solo 256": 0.784, "solo 192": 0.830}},
		{5120, 27648, 192, map[string]float64{"pair 128": 0.854, "pair 256": 0.587, "relay": 0.489, "solo 256": 0.883, "solo 192": 0.862}},
		{6144, 4096, 192, map[string]float64{"pair 128": 0.682, "pair 256": 0.502, "relay": 0.410, "solo 256": 0.677, "solo 192": 0.832}},
		{6144, 4096, 512, map[string]float64{"pair 128": 0.710, "pair 256": 0.804, "solo 256": 0.675, "solo 192": 0.598}},
		{7168, 2048, 192, map[string]float64{"pair 128": 0.728, "pair 256": 0.546, "relay": 0.366, "solo 256": 0.684, "solo 192": 0.797}},
		{8192, 8192, 192, map[string]float64{"pair 128": 0.819, "pair 256": 0.574, "relay": 0.446, "solo 256": 0.856, "solo 192": 1.020}},
		{10240, 8192, 192, map[string]float64{"pair 128": 0.826, "pair 256": 0.555, "relay": 0.476, "solo 256": 0.843, "solo 192": 0.986}},
		{14336, 4096, 192, map[string]float64{"pair 128": 0.770, "pair 256": 0.532, "relay": 0.495, "solo 256": 0.876, "solo 192": 1.032}},
		{28672, 4096, 192, map[string]float64{"pair 128": 0.804, "pair 256": 0.556, "relay": 0.488, "solo 256": 0.859, "solo 192": 0.995}},
		{28672, 4096, 512, map[string]float64{"pair 128": 0.745, "pair 256": 0.929, "solo 256": 0.805, "solo 192": 0.669}},
		{57344, 8192, 192, map[string]float64{"pair 128": 0.775, "pair 256": 0.539, "relay": 0.438, "solo 256": 0.877, "solo 192": 1.060}},
		// 14:21 UTC, another card: the same, of clusters of 384 tokens, too, with the grids of 384 and 768 (1152: 2048) tokens. At 1152 and 640 tokens relay was not measured.
		{4096, 4096, 1152, map[string]float64{"pair 128": 0.613, "pair 192": 0.761, "pair 256": 0.649, "solo 192": 0.715, "solo 256": 0.618}},
		{2048, 7168, 384, map[string]float64{"pair 128": 0.809, "pair 192": 0.871, "pair 256": 0.721, "relay": 0.509, "solo 192": 0.856, "solo 256": 0.714}},
		{2048, 7168, 768, map[string]float64{"pair 128": 0.812, "pair 192": 0.989, "pair 256": 0.853, "relay": 0.731, "solo 192": 0.939, "solo 256": 0.821}},
		{3584, 3584, 384, map[string]float64{"pair 128": 0.597, "pair 192": 0.717, "pair 256": 0.610, "relay": 0.410, "solo 192": 0.683, "solo 256": 0.579}},
		{3584, 3584, 768, map[string]float64{"pair 128": 0.657, "pair 192": 0.785, "pair 256": 0.674, "relay": 0.590, "solo 192": 0.741, "solo 256": 0.624}},
		{3584, 18944, 384, map[string]float64{"pair 128": 0.602, "pair 192": 0.849, "pair 256": 0.724, "relay": 0.587, "solo 192": 0.795, "solo 256": 0.643}},
		{3584, 18944, 768, map[string]float64{"pair 128": 0.699, "pair 192": 0.747, "pair 256": 0.658, "relay": 0.584, "solo 192": 0.685, "solo 256": 0.546}},
		{4096, 4096, 320, map[string]float64{"pair 128": 0.554, "pair 192": 0.671, "pair 256": 0.585, "solo 192": 0.662, "solo 256": 0.543}},
		{4096, 4096, 384, map[string]float64{"pair 128": 0.612, "pair 192": 0.741, "pair 256": 0.639, "relay": 0.417, "solo 192": 0.724, "solo 256": 0.603}},
		{4096, 4096, 576, map[string]float64{"pair 128": 0.552, "pair 192": 0.661, "pair 256": 0.573, "solo 192": 0.647, "solo 256": 0.536}},
		{4096, 4096, 640, map[string]float64{"pair 128": 0.567, "pair 192": 0.689, "pair 256": 0.599, "solo 192": 0.653, "solo 256": 0.541}},
		{4096, 4096, 768, map[string]float64{"pair 128": 0.686, "pair 192": 0.834, "pair 256": 0.716, "relay": 0.625, "solo 192": 0.775, "solo 256": 0.662}},
		{4096, 14336, 384, map[string]float64{"pair 128": 0.749, "pair 192": 1.037, "pair 256": 0.909, "relay": 0.661, "solo 192": 0.967, "solo 256": 0.798}},
		{4096, 14336, 768, map[string]float64{"pair 128": 0.711, "pair 192": 0.825, "pair 256": 0.722, "relay": 0.658, "solo 192": 0.772, "solo 256": 0.636}},
		{4608, 3584, 384, map[string]float64{"pair 128": 0.582, "pair 192": 0.730, "pair 256": 0.620, "relay": 0.491, "solo 192": 0.653, "solo 256": 0.529}},
		{4608, 3584, 768, map[string]float64{"pair 128": 0.722, "pair 192": 0.719, "pair 256": 0.607, "relay": 0.758, "solo 192": 0.700, "solo 256": 0.830}},
		{5120, 5120, 384, map[string]float64{"pair 128": 0.533, "pair 192": 0.709, "pair 256": 0.593, "relay": 0.440, "solo 192": 0.581, "solo 256": 0.468}},
		{5120, 5120, 768, map[string]float64{"pair 128": 0.731, "pair 192": 0.745, "pair 256": 0.622, "relay": 0.771, "solo 192": 0.712, "solo 256": 0.825}},
		{5120, 27648, 384, map[string]float64{"pair 128": 0.588, "pair 192": 0.818, "pair 256": 0.723, "relay": 0.428, "solo 192": 0.573, "solo 256": 0.459}},
		{5120, 27648, 768, map[string]float64{"pair 128": 0.726, "pair 192": 0.852, "pair 256": 0.743, "relay": 0.871, "solo 192": 0.779, "solo 256": 0.798}},
		{6144, 4096, 320, map[string]float64{"pair 128": 0.684, "pair 192": 0.839, "pair 256": 0.748, "solo 192": 0.814, "solo 256": 0.657}},
		{6144, 4096, 384, map[string]float64{"pair 128": 0.542, "pair 192": 0.685, "pair 256": 0.606, "relay": 0.472, "solo 192": 0.649, "solo 256": 0.528}},
		{6144, 4096, 576, map[string]float64{"pair 128": 0.600, "pair 192": 0.677, "pair 256": 0.591, "solo 192": 0.742, "solo 256": 0.600}},
		{6144, 4096, 640, map[string]float64{"pair 128": 0.581, "pair 192": 0.682, "pair 256": 0.591, "solo 192": 0.644, "solo 256": 0.582}},
		{6144, 4096, 768, map[string]float64{"pair 128": 0.647, "pair 192": 0.759, "pair 256": 0.653, "relay": 0.602, "solo 192": 0.717, "solo 256": 0.645}},
		{7168, 2048, 384, map[string]float64{"pair 128": 0.557, "pair 192": 0.803, "pair 256": 0.711, "relay": 0.504, "solo 192": 0.789, "solo 256": 0.667}},
		{7168, 2048, 768, map[string]float64{"pair 128": 0.668, "pair 192": 0.759, "pair 256": 0.654, "relay": 0.506, "solo 192": 0.718, "solo 256": 0.682}},
		{8192, 8192, 384, map[string]float64{"pair 128": 0.564, "pair 192": 0.848, "pair 256": 0.734, "relay": 0.521, "solo 192": 0.778, "solo 256": 0.631}},
		{8192, 8192, 768, map[string]float64{"pair 128": 0.734, "pair 192": 0.829, "pair 256": 0.727, "relay": 0.757, "solo 192": 0.765, "solo 256": 0.786}},
		{10240, 8192, 384, map[string]float64{"pair 128": 0.586, "pair 192": 0.806, "pair 256": 0.694, "relay": 0.489, "solo 192": 0.743, "solo 256": 0.611}},
		{10240, 8192, 768, map[string]float64{"pair 128": 0.759, "pair 192": 0.870, "pair 256": 0.772, "relay": 0.830, "solo 192": 0.805, "solo 256": 0.834}},
		{14336, 4096, 384, map[string]float64{"pair 128": 0.560, "pair 192": 0.775, "pair 256": 0.679, "relay": 0.498, "solo 192": 0.721, "solo 256": 0.586}},
		{14336, 4096, 768, map[string]float64{"pair 128": 0.716, "pair 192": 0.791, "pair 256": 0.690, "relay": 0.733, "solo 192": 0.778, "solo 256": 0.771}},
		{28672, 4096, 320, map[string]float64{"pair 128": 0.547, "pair 192": 0.769, "pair 256": 0.690, "solo 192": 0.732, "solo 256": 0.598}},
		{28672, 4096, 384, map[string]float64{"pair 128": 0.602, "pair 192": 0.867, "pair 256": 0.751, "relay": 0.544, "solo 192": 0.801, "solo 256": 0.661}},
		{28672, 4096, 576, map[string]float64{"pair 128": 0.657, "pair 192": 0.744, "pair 256": 0.633, "solo 192": 0.878, "solo 256": 0.714}},
		{28672, 4096, 640, map[string]float64{"pair 128": 0.632, "pair 192": 0.715, "pair 256": 0.628, "solo 192": 0.665, "solo 256": 0.677}},
		{28672, 4096, 768, map[string]float64{"pair 128": 0.776, "pair 192": 0.867, "pair 256": 0.764, "relay": 0.800, "solo 192": 0.818, "solo 256": 0.835}},
		{57344, 8192, 384, map[string]float64{"pair 128": 0.602, "pair 192": 0.911, "pair 256": 0.795, "relay": 0.609, "solo 192": 0.836, "solo 256": 0.661}},
		{57344, 8192, 768, map[string]float64{"pair 128": 0.796, "pair 192": 0.890, "pair 256": 0.770, "relay": 0.915, "solo 192": 0.811, "solo 256": 0.868}},
	} {
		l, err := plan.ForLinear(h100, plan.Problem{M: c.m, K: c.k, N: c.n})
		require.NoError(t, err)
		nearBest(t, c.x, way(t, l), 1/1.075, fmt.Sprintf("%d x %d, N = %d", c.m, c.k, c.n))
	}
}

// nearBest checks that what was chosen has been measured, and reaches that share of the best.
func nearBest[K comparable](t *testing.T, measured map[K]float64, chosen K, share float64, label string) {
	t.Helper()
	most := 0.0
	for _, x := range measured {
		most = max(most, x)
	}
	x, known := measured[chosen]
	assert.True(t, known, "%s: %v", label, chosen)
	assert.GreaterOrEqual(t, x, share*most, "%s: %v", label, chosen)
}

// A plan serves every number of tokens of its class with one launch, whose blocks all have work, and whose partial sums have room.
func TestAPlanForManyTokensServesItsClass(t *testing.T) {
	seen, anywhere := map[string]int{}, 0
	for _, mk := range [][2]uint64{{1, 8}, {64, 64}, {1000, 776}, {4096, 4096}, {28672, 4096}, {4096, 14336}, {1, 1 << 20}, {1 << 20, 8}, {5120, 5120}} {
		for n := uint64(129); n < 1700; n += 1 + n%3 {
			p := plan.Problem{M: mk[0], K: mk[1], N: plan.Class(n)}
			list, err := plan.Candidates(h100, p)
			require.NoError(t, err)
			for _, c := range list {
				l, err := plan.Chosen(h100, p, c)
				require.NoError(t, err)
				if c.Kernel != plan.Pair && c.Kernel != plan.Solo {
					continue
				}
				seen[way(t, l)]++
				k := l.Kernel
				checkKernel(t, h100, k)
				assert.GreaterOrEqual(t, l.Tokens, n, "one launch")
				tokens := uint64(define(t, k, "ZS_N"))
				cluster := uint64(k.Cluster)
				assert.EqualValues(t, map[string]int{plan.Pair: 2, plan.Solo: 1}[c.Kernel], cluster)
				assert.EqualValues(t, tokens*cluster/4, l.TensorRows)
				assert.True(t, l.WholeBoxes, "the kernel waits for whole boxes")
				assert.EqualValues(t, tokens, l.ResultRows)
				assert.Zero(t, uint64(k.Grid)%cluster)
				assert.LessOrEqual(t, k.Grid, uint32(132))
				// Every cluster has a tile, or a part of one: what the kernel counts from the real n.
				tiles, clusters := ((p.M+63)/64+1)/2*((n+cluster*tokens-1)/(cluster*tokens)), uint64(k.Grid)/cluster
				if tiles < clusters && n <= cluster*tokens && clusters == 132/cluster && clusters%tiles != 0 {
					anywhere++
					parts := clusters / tiles
					assert.Less(t, parts, uint64(plan.MostSharers))
					assert.Greater(t, (p.K+63)/64*(clusters-tiles*parts), plan.Shorter*parts*clusters, "runs are not so much shorter")
				} else if tiles < clusters {
					parts := clusters / tiles
					assert.Equal(t, parts*tiles, clusters, "%v N=%d: a cluster without work", p, n)
					assert.LessOrEqual(t, parts, min(plan.MostSharers, (p.K+63)/64))
				}
				assert.GreaterOrEqual(t, l.Workspace, uint64(k.Grid)*2*64*tokens*4)
			}
		}
	}
	assert.Len(t, seen, 5)
	assert.Positive(t, anywhere)
}

func TestWhereTheKernelForManyTokensIsNotUsed(t *testing.T) {
	for name, d := range devices {
		for _, mk := range matrices {
			for _, n := range []uint64{1, 64, 128, 129, 256, 512, 4096} {
				for _, p := range []plan.Problem{{}, {Invariant: true}, {Unaligned: true}} {
					p.M, p.K, p.N = mk[0], mk[1], n
					l, err := plan.ForLinear(d, p)
					require.NoError(t, err)
					if forMany(l) {
						assert.Equal(t, 90, d.Capability, name)
						assert.False(t, p.Invariant || p.Unaligned || p.K%8 != 0 || n <= 128, "%s %+v", name, p)
					}
				}
			}
		}
	}
}

// Gates: on Hopper by a kernel that applies them, whose sums for few tokens do not depend on their number; nowhere else, and not where a token's result must be the same
// for every number of tokens.
func TestPlansWithGates(t *testing.T) {
	for name, d := range devices {
		for _, mk := range [][2]uint64{{128, 64}, {28672, 4096}, {37888, 3584}, {8192, 2048}} {
			var first plan.Linear
			for _, n := range []uint64{1, 8, 32, 64, 128, 129, 256, 384, 512, 1024, 8192} {
				label := fmt.Sprintf("%s %v N=%d", name, mk, n)
				for _, p := range []plan.Problem{{Invariant: true}, {Unaligned: true}, {}, {Apart: true}} {
					p.M, p.K, p.N, p.Gated = mk[0], mk[1], n, true
					l, err := plan.ForLinear(d, p)
					require.NoError(t, err, label)
					if d.Capability != 90 || p.Invariant || p.Unaligned || p.Apart && n > 128 {
						require.True(t, l.Expand, "%s %+v", label, p)
						continue
					}
					require.False(t, l.Expand, label)
					require.Equal(t, n > 128, forMany(l), label)
					assert.Equal(t, 1, define(t, l.Kernel, "ZS_GATED"), label)
					checkKernel(t, d, l.Kernel)
					if n == 1 {
						first = l
					}
					if n <= 32 {
						require.Equal(t, first.Kernel.Grid, l.Kernel.Grid, label)
					}
				}
			}
		}
		_, err := plan.ForLinear(d, plan.Problem{M: 192, K: 64, N: 1, Gated: true})
		assert.ErrorContains(t, err, "a multiple of 128", name)
	}
}
