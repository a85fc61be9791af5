// SPDX-License-Identifier: Apache-2.0

package codec

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/zipserv/zipserv/core/format"
)

// exampleWeights is the matrix of docs/format.md section 9.
func exampleWeights() []byte {
	src := make([]byte, tileBytes)
	set := func(r, c int, w uint16) { le.PutUint16(src[2*(r*64+c):], w) }
	for r := range 64 {
		for c := range 64 {
			set(r, c, 0x3F80)
		}
	}
	for c := range 64 {
		set(20, c, 0x3C80)
	}
	set(0, 0, 0xC049)
	set(8, 1, 0xBF8A)
	set(0, 2, 0x40A0)
	set(1, 3, 0x3C00)
	set(1, 4, 0x3B80)
	set(2, 0, 0x0000)
	set(63, 63, 0x7FC1)
	return src
}

// The dump in docs/format.md section 9 is the blob that the codec makes.
func TestWorkedExample(t *testing.T) {
	blob := encodeBlob(t, exampleWeights(), format.BF16, 64, 64)
	require.NoError(t, Check(ctx, blob, true))
	page, err := os.ReadFile("../../docs/format.md")
	require.NoError(t, err)
	_, section, found := strings.Cut(string(page), "## 9.")
	require.True(t, found)
	_, section, found = strings.Cut(section, "```text\n")
	require.True(t, found)
	want, _, found := strings.Cut(section, "```")
	require.True(t, found)
	require.Equal(t, want, dump(blob))
}

// dump prints 16 bytes a line, and `*` for lines that repeat the one before.
func dump(b []byte) string {
	var out strings.Builder
	var last []byte
	repeated := false
	for o := 0; o < len(b); o += 16 {
		line := b[o:min(o+16, len(b))]
		if bytes.Equal(line, last) {
			if !repeated {
				out.WriteString("*\n")
			}
			repeated = true
			continue
		}
		last, repeated = line, false
		digits := hex.EncodeToString(line)
		fmt.Fprintf(&out, "%04x ", o)
		for i := 0; i < len(digits); i += 8 {
			out.WriteString(" " + digits[i:min(i+8, len(digits))])
		}
		out.WriteByte('\n')
	}
	fmt.Fprintf(&out, "%04x\n", len(b))
	return out.String()
}
