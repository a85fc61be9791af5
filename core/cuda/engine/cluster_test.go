// SPDX-License-Identifier: Apache-2.0

package engine_test

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/zipserv/zipserv/core/cuda/driver"
	"github.com/zipserv/zipserv/core/cuda/plan"
)

// The fake has GPCs of 18 SMs; of its devices 0 has 132 SMs and 1 has 100.
func TestAKernelInClusters(t *testing.T) {
	f, e := open(t)
	d := device(t, e, 0)
	one := plan.Kernel{Source: "zipgemm_wgmma.cu", Entry: "zs_zipgemm_wgmma", Grid: 132, Block: 384, Smem: 200 << 10, Programmatic: true, Resident: 1}
	for _, c := range []struct {
		cluster, grid, perSM, resident uint32
		want                           string
	}{
		{0, 132, 0, 1, "grid 132,1,1 block 384 smem 204800 stream 0 pdl 1 args"},
		{1, 131, 0, 1, "grid 131,1,1 block 384 smem 204800 stream 0 pdl 1 args"},
		{2, 132, 0, 1, "grid 132,1,1 block 384 smem 204800 stream 0 pdl 1 cluster 2 args"},
		{2, 64, 0, 1, "grid 64,1,1 block 384 smem 204800 stream 0 pdl 1 cluster 2 args"},
		// Two of the 18 SMs of a GPC have no place in a cluster of four.
		{4, 132, 0, 1, "grid 116,1,1 block 384 smem 204800 stream 0 pdl 1 cluster 4 args"},
		{4, 1 << 20, 1, 0, "grid 116,1,1 block 384 smem 204800 stream 0 pdl 1 cluster 4 args"},
		{4, 1 << 20, 0, 0, "grid 1048576,1,1 block 384 smem 204800 stream 0 pdl 1 cluster 4 args"},
	} {
		k := one
		k.Cluster, k.Grid, k.PerSM, k.Resident = c.cluster, c.grid, c.perSM, c.resident
		f.Reset()
		require.NoError(t, d.LaunchPlan(k, true))
		require.Len(t, launches(f), 1)
		assert.Contains(t, launches(f)[0], c.want)
	}
	k := one
	k.Cluster, k.Grid = 4, 130
	require.ErrorContains(t, d.LaunchPlan(k, true), "a grid of 130 blocks is not of clusters of 4")
	k.Cluster, k.Grid = 16, 128
	require.ErrorContains(t, d.LaunchPlan(k, true), "cuOccupancyMaxActiveClusters: CUDA_ERROR_INVALID_CLUSTER_SIZE")
	k.Cluster, k.Grid = 2, 128
	f.Fail("cuOccupancyMaxActiveClusters", driver.OutOfMemory, 0)
	var failed *driver.Error
	require.ErrorAs(t, d.LaunchPlan(k, true), &failed)
}
