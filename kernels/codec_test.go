// SPDX-License-Identifier: Apache-2.0

package kernels_test

import (
	"context"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/zipserv/zipserv/core/codec"
	"github.com/zipserv/zipserv/core/format"
)

// The encoder of these tests and the codec of the library were written apart from the same page: they must agree byte for byte wherever
// the codec chooses the tiled form, so that what a kernel is compared with is what the library writes.
func TestReferenceEncoderAgreesWithCodec(t *testing.T) {
	ctx := context.Background()
	tiled := 0
	for kind := range kinds {
		for _, s := range [][2]int{{64, 64}, {130, 200}, {256, 320}, {333, 1000}} {
			x := newMatrix(kind, s[0], s[1], 11)
			src := x.bytes()
			plan, err := codec.NewPlan(ctx, src, format.BF16, []uint64{uint64(x.m), uint64(x.k)}, uint64(x.m), uint64(x.k))
			require.NoError(t, err)
			ours := encodeTiled(x)
			if plan.Header().Mode == format.Tiled {
				tiled++
				blob := make([]byte, plan.Size())
				require.NoError(t, plan.Encode(ctx, blob))
				requireSameBlob(t, blob, ours, kind)
			}
			require.NoError(t, codec.Check(ctx, ours, true), kind)
		}
	}
	require.Greater(t, tiled, 12)
}
