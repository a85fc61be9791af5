// SPDX-License-Identifier: Apache-2.0

package engine_test

import (
	"os"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

var sharedCache = sync.OnceValues(func() (string, error) { return os.MkdirTemp("", "zipserv-engine-") })

func cacheDir(t testing.TB) string {
	t.Helper()
	dir, err := sharedCache()
	require.NoError(t, err)
	return dir
}

func TestMain(m *testing.M) {
	code := m.Run()
	if dir, err := sharedCache(); err == nil {
		_ = os.RemoveAll(dir)
	}
	os.Exit(code)
}
