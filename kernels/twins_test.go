// SPDX-License-Identifier: Apache-2.0

package kernels_test

import (
	"io/fs"
	"os"
	"regexp"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/zipserv/zipserv/kernels"
)

// Every function that exists only on a device (in ptx.cuh and wgmma.cuh, outside ZS_EMU) has a host twin.
func TestEveryInstructionHasAHostTwin(t *testing.T) {
	twins, err := os.ReadFile("emu/ptx_host.h")
	require.NoError(t, err)
	function := regexp.MustCompile(`(?m)^(?:inline|ZS_DEVICE)\s+[\w ]+?\b(\w+)\(`)
	var have []string
	for _, m := range function.FindAllSubmatch(twins, -1) {
		have = append(have, string(m[1]))
	}
	count := 0
	for _, file := range []string{"ptx.cuh", "wgmma.cuh"} {
		text, err := fs.ReadFile(kernels.Sources, file)
		require.NoError(t, err)
		end := regexp.MustCompile(`(?m)^#endif\s+// ZS_EMU`).FindIndex(text)
		require.NotNil(t, end, "%s: the device part ends with `#endif  // ZS_EMU`", file)
		for _, m := range function.FindAllSubmatch(text[:end[0]], -1) {
			require.True(t, slices.Contains(have, string(m[1])), "%s in %s has no host twin in emu/ptx_host.h", m[1], file)
			count++
		}
	}
	require.Greater(t, count, 25)
}
