// SPDX-License-Identifier: Apache-2.0

package codec

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/zipserv/zipserv/core/format"
)

// BenchmarkCheck is a check on one core: of the structure alone, and with the checksum of the weights. GB are of the blob.
func BenchmarkCheck(b *testing.B) {
	const m, k = 2048, 2048
	blob := encodeBlob(b, weights("gaussian", m*k), format.BF16, m, k)
	for _, full := range []bool{false, true} {
		b.Run(map[bool]string{false: "structure", true: "full"}[full], func(b *testing.B) {
			best := time.Hour // other work on the machine only ever lengthens it
			for b.Loop() {
				start := time.Now()
				require.NoError(b, Check(context.Background(), blob, full))
				best = min(best, time.Since(start))
			}
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(float64(len(blob))/float64(best), "GB/s")
		})
	}
}
