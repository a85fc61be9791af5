// SPDX-License-Identifier: Apache-2.0

package kernels_test

import (
	"bytes"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/zipserv/zipserv/kernels"
	"github.com/zipserv/zipserv/kernels/emu"
)

// seeds are the schedules a case runs under: derived from its name, so that cases differ and every run of the tests is the same, or
// the one of ZS_EMU_SEED, to repeat a failure. ZS_EMU_SCHEDULES=n gives each case n times as many.
func seeds(t *testing.T, n int) []uint64 {
	if s := os.Getenv("ZS_EMU_SEED"); s != "" {
		seed, err := strconv.ParseUint(s, 10, 64)
		require.NoError(t, err)
		return []uint64{seed}
	}
	if s := os.Getenv("ZS_EMU_SCHEDULES"); s != "" {
		times, err := strconv.Atoi(s)
		require.NoError(t, err)
		n *= times
	}
	h := fnv.New64a()
	h.Write([]byte(t.Name()))
	out := make([]uint64, n)
	for i := range out {
		out[i] = (h.Sum64() + uint64(i)*0x9E3779B97F4A7C15) >> 1
	}
	return out
}

// mutant is the kernels' sources with one literal piece of text replaced.
func mutant(t *testing.T, file, old, replacement string) fs.FS {
	t.Helper()
	files, err := emu.Mutate(kernels.Sources, file, regexp.QuoteMeta(old), 0, strings.ReplaceAll(replacement, "$", "$$"))
	require.NoError(t, err)
	return files
}

func faultKind(err error) string {
	var f *emu.Fault
	if errors.As(err, &f) {
		return f.Kind
	}
	return ""
}

// requireSame compares 16-bit values bit by bit, and names the first few that differ.
func requireSame(t *testing.T, want, got []byte, columns int, what string) {
	t.Helper()
	if bytes.Equal(want, got) {
		return
	}
	require.Len(t, got, len(want), what)
	text, wrong := "", 0
	for i := range len(want) / 2 {
		w, g := le.Uint16(want[2*i:]), le.Uint16(got[2*i:])
		if w != g {
			if wrong++; wrong <= 8 {
				text += fmt.Sprintf("\n  element %d (row %d, column %d): %04x, want %04x", i, i/columns, i%columns, g, w)
			}
		}
	}
	t.Fatalf("%s: %d of %d values differ%s", what, wrong, len(want)/2, text)
}
