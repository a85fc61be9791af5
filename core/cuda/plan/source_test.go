// SPDX-License-Identifier: Apache-2.0

package plan_test

import (
	"fmt"
	"io/fs"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/zipserv/zipserv/core/cuda/drivertest"
	"github.com/zipserv/zipserv/core/cuda/jit"
	"github.com/zipserv/zipserv/core/cuda/nvrtc"
	"github.com/zipserv/zipserv/core/cuda/plan"
	"github.com/zipserv/zipserv/kernels"
)

// The plans repeat the kernels' arithmetic of shared memory and threads. Here the compiler says what the sources make of it.
func TestPlansAgreeWithTheSources(t *testing.T) {
	lib := drivertest.Compiler(t)
	files := map[string]string{}
	require.NoError(t, fs.WalkDir(kernels.Sources, ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := fs.ReadFile(kernels.Sources, p)
		files[p] = string(data)
		return err
	}))
	seen := map[string]bool{}
	for name, d := range devices {
		c, many := plan.Compress(d, 4096, 4096), plan.Compress(d, 131072, 4096)
		plans := []plan.Kernel{plan.Decompress(d, 4096, 4096), c.Sample, c.Write, many.Sample, many.Write, plan.Gather(d, false), plan.Gather(d, true), plan.Route(d), plan.Combine(d)}
		for _, tile := range plan.GroupedTiles {
			g, err := plan.Grouped(d, 4096, 4096, tile, tile == 16, tile == 8)
			require.NoError(t, err)
			plans = append(plans, g.Kernel)
		}
		for _, m := range []uint64{4096, 28672} {
			for _, n := range []uint64{1, 64, 128} {
				l, err := plan.ForLinear(d, plan.Problem{M: m, K: 4096, N: n})
				require.NoError(t, err)
				if !l.Expand {
					plans = append(plans, l.Kernel)
				}
			}
		}
		list, err := plan.Candidates(d, plan.Problem{M: 28672, K: 4096, N: 512})
		require.NoError(t, err)
		if l, err := plan.ForLinear(d, plan.Problem{M: 28672, K: 4096, N: 512, Gated: true}); assert.NoError(t, err) && !l.Expand {
			plans = append(plans, l.Kernel)
		}
		for _, c := range list {
			if c.Kernel == plan.Pair || c.Kernel == plan.Solo || c.Kernel == plan.Relay { // all layouts
				l, err := plan.Chosen(d, plan.Problem{M: 28672, K: 4096, N: 512}, c)
				require.NoError(t, err)
				plans = append(plans, l.Kernel)
			}
		}
		for _, k := range plans {
			id := fmt.Sprint(k.Entry, k.Defines, d.Capability/10)
			if seen[id] {
				continue
			}
			seen[id] = true
			t.Run(fmt.Sprintf("%s/%s/%s", name, k.Entry, strings.Join(k.Defines, ",")), func(t *testing.T) {
				smem := "ZS_GEMM_SMEM"
				threads := "ZS_THREADS"
				switch k.Entry {
				case "zs_decompress":
					smem, threads = "ZS_DECOMPRESS_SMEM", "32 * ZS_WARPS"
				case "zs_gather":
					smem, threads = "ZS_GATHER_SMEM", "ZS_THREADS"
				case "zs_moe_route":
					smem = "ZS_ROUTE_SMEM"
				case "zs_moe_combine":
					smem, threads = "ZS_COMBINE_SMEM", "ZS_COMBINE_THREADS"
				case "zs_compress_sample":
					smem, threads = "ZS_SAMPLE_SMEM", "32 * ZS_WARPS"
				case "zs_compress":
					smem, threads = "ZS_COMPRESS_SMEM", "32 * (ZS_WARPS + 1)"
				}
				got := constants(t, lib, files, k, d.Capability, smem, threads)
				assert.Equal(t, []int{int(k.Smem), int(k.Block)}, got, "shared memory and threads")
				// What those who add up have more, and where runs begin: a header that sets its default first would take it away unseen.
				anywhereLead := 0
				if slices.Contains(k.Defines, "ZS_ANYWHERE_LEAD=1") {
					anywhereLead = 1
				}
				for name, want := range map[string]map[string]int{"zs_zipgemm_wgmma": {"ZS_LEAD": wgmmaLead, "ZS_ANYWHERE_LEAD": anywhereLead}, "zs_zipgemm_pair": {"ZS_PART_LEAD": 2, "ZS_ANYWHERE": 1, "ZS_SHORTER": plan.Shorter}, "zs_zipgemm_relay": {"ZS_PART_LEAD": 0, "ZS_ANYWHERE": 0}}[k.Entry] {
					assert.Equal(t, []int{want}, constants(t, lib, files, k, d.Capability, name), name)
				}
				if k.Entry == "zs_zipgemm_relay" {
					r := constants(t, lib, files, k, d.Capability, "ZS_CONTROL", "ZS_MOST_SHARERS", "ZS_DECODERS", "ZS_HELPER_REGISTERS", "ZS_CONSUMER_REGISTERS", "ZS_CONSUMERS")
					require.Len(t, r, 6)
					assert.Equal(t, []int{plan.RelayControl, plan.MostSharers, plan.RelayWarps}, r[:3])
					assert.Zero(t, r[3]%8+r[4]%8)
					assert.LessOrEqual(t, 128*r[3]+r[4]*r[5], 65536)
				}
				if k.Entry != "zs_zipgemm_pair" {
					return
				}
				// Registers are dealt in eights, at most 64 Ki; what is read at once of partial sums has to fit beside the sums.
				r := constants(t, lib, files, k, d.Capability, "ZS_DECODER_REGISTERS", "ZS_CONSUMER_REGISTERS", "ZS_CONSUMERS", "ZS_PIECES_AT_ONCE", "1000 + ZS_MOST_SHARERS", "2000 + ZS_DECODERS") // equal ones are written once
				require.Len(t, r, 6)
				assert.Zero(t, r[0]%8+r[1]%8)
				assert.LessOrEqual(t, 32*(r[5]-2000)*r[0]+r[1]*r[2], 65536)
				assert.LessOrEqual(t, define(t, k, "ZS_N")/2+4*r[3]+24, r[1], "sums, pieces, and addresses")
				assert.Equal(t, 1000+plan.MostSharers, r[4])
			})
		}
	}
}

// constants compiles a source, with a kernel in place of its own that stores the values of expressions, and reads them from the PTX.
func constants(t *testing.T, lib *nvrtc.Library, files map[string]string, k plan.Kernel, capability int, expressions ...string) (values []int) {
	t.Helper()
	last := strings.LastIndex(files[k.Source], "extern \"C\" __global__") // compiling it takes most of the time, and no constant stands behind it
	require.Positive(t, last, k.Source)
	source := files[k.Source][:last] + "extern \"C\" __global__ void probe(unsigned *p) {\n"
	for i, e := range expressions {
		source += fmt.Sprintf("p[%d] = 1000000000u + (unsigned)(%s);\n", i, e)
	}
	arch, err := jit.Target(capability/10, capability%10, lib.Archs())
	require.NoError(t, err)
	options := []string{"-std=c++17", "-default-device", "-G", "-arch=" + strings.Replace(arch.Name, "sm_", "compute_", 1)}
	for _, d := range k.Defines {
		options = append(options, "-D"+d)
	}
	r, err := lib.Compile("probe.cu", source+"}", files, options, true)
	require.NoError(t, err)
	text := string(r.Image)
	text = text[strings.Index(text, ".entry probe("):]
	for _, found := range regexp.MustCompile(`\b1\d{9}\b`).FindAllString(text, len(expressions)) {
		var v int
		_, err := fmt.Sscan(found, &v)
		require.NoError(t, err)
		values = append(values, v-1000000000)
	}
	return values
}
