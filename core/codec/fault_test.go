// SPDX-License-Identifier: Apache-2.0

//go:build unix

package codec

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/zipserv/zipserv/core/format"
)

// A mapped file that is cut short under the reader's hands must end in a panic that the caller can recover, whichever worker meets it.
func TestFaultReachesTheCaller(t *testing.T) {
	const m, k = 1024, 1024
	for name, src := range map[string][]byte{"tiled": weights("gaussian", m*k), "raw": weights("random", m*k)} {
		blob := encodeBlob(t, src, format.BF16, m, k)
		path := filepath.Join(t.TempDir(), "blob")
		require.NoError(t, os.WriteFile(path, blob, 0o600))
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		require.NoError(t, err)
		mapped, err := unix.Mmap(int(f.Fd()), 0, len(blob), unix.PROT_READ, unix.MAP_SHARED)
		require.NoError(t, err)
		v, err := Parse(mapped)
		require.NoError(t, err)
		out := make([]byte, len(src))
		eachSet(t, func(t *testing.T) {
			require.NoError(t, f.Truncate(int64(len(blob))))
			require.NotPanics(t, func() { _ = v.Decode(ctx, out) })
			require.NoError(t, f.Truncate(8192))
			for task, run := range map[string]func(){
				"decode": func() { _ = v.Decode(ctx, out) },
				"check":  func() { _ = Check(ctx, mapped, true) },
				"linear": func() {
					_ = v.Linear(ctx, Product{Row1: m, Tokens: 1, X: src[:2*k], XStride: k, Y: make([]byte, 2*m), YStride: m, Threads: 2})
				},
			} {
				func() {
					defer func() {
						_, fault := recover().(interface{ Addr() uintptr })
						require.True(t, fault, "%s of the %s blob", task, name)
					}()
					run()
				}()
			}
		})
		require.NoError(t, unix.Munmap(mapped))
		require.NoError(t, f.Close())
	}
}
