// SPDX-License-Identifier: Apache-2.0

package tuned_test

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/zipserv/zipserv/core/cuda/plan"
	"github.com/zipserv/zipserv/core/cuda/tuned"
)

var key = tuned.Key{GPU: "Some GPU", SMs: 132, Driver: "13.0", NVRTC: "13.0", Kernels: "abc", Plan: 1}

func entry(m, tokens uint64) tuned.Entry {
	return tuned.Entry{
		Problem: tuned.Problem{M: m, K: 4096, Tokens: tokens, Invariant: tokens == 0},
		Choice:  plan.Choice{Kernel: "mma", MW: 2, KW: 4, Blocks: 128}, Seconds: 1e-5, DefaultSeconds: 1.1e-5,
	}
}

func TestWhatIsAddedIsRead(t *testing.T) {
	dir := t.TempDir()
	table, err := tuned.Read(dir, key)
	require.NoError(t, err)
	assert.Empty(t, table.Entries)
	_, err = tuned.Add(dir, key, []tuned.Entry{entry(4096, 16), entry(1024, 0)})
	require.NoError(t, err)
	better := entry(4096, 16)
	better.Choice.Blocks = 64
	_, err = tuned.Add(dir, key, []tuned.Entry{better, entry(4096, 8192)})
	require.NoError(t, err)
	table, err = tuned.Read(dir, key)
	require.NoError(t, err)
	assert.Equal(t, tuned.Table{Key: key, Entries: []tuned.Entry{entry(1024, 0), better, entry(4096, 8192)}}, table)
	other := key
	other.Kernels = "abd"
	table, err = tuned.Read(dir, other)
	require.NoError(t, err)
	assert.Empty(t, table.Entries, "other kernels, other file")
	files, err := os.ReadDir(dir)
	require.NoError(t, err)
	assert.Len(t, files, 2, "the table and the lock, nothing temporary")
	table, err = tuned.Read("", key)
	require.NoError(t, err)
	assert.Empty(t, table.Entries)
}

func TestAFileThatCannotBeTrustedIsNotUsedAndReplaced(t *testing.T) {
	for name, c := range map[string]struct {
		damage func(data []byte) []byte
		reason string
	}{
		"cut short":    {func(b []byte) []byte { return b[:len(b)/2] }, "damaged"},
		"empty":        {func(b []byte) []byte { return nil }, "damaged"},
		"other bytes":  {func(b []byte) []byte { return bytes.Replace(b, []byte("128"), []byte("129"), 1) }, "checksum"},
		"no table":     {func(b []byte) []byte { return []byte("[]") }, "damaged"},
		"binary":       {func(b []byte) []byte { return bytes.Repeat([]byte{0xFF}, 5000) }, "damaged"},
		"another GPU":  {func(b []byte) []byte { return resealed(t, b, "Some GPU", "Some other") }, "another GPU"},
		"no times":     {func(b []byte) []byte { return resealed(t, b, `"seconds":0.00001`, `"seconds":-1`) }, "wrong content"},
		"odd tokens":   {func(b []byte) []byte { return resealed(t, b, `"tokens":16`, `"tokens":17`) }, "wrong content"},
		"no tokens":    {func(b []byte) []byte { return resealed(t, b, `"tokens":16`, `"tokens":0`) }, "wrong content"},
		"twice":        {func(b []byte) []byte { return resealed(t, b, `"m":1024`, `"m":4096`) }, "two choices"},
		"other values": {func(b []byte) []byte { return resealed(t, b, `"m":1024`, `"m":"big"`) }, "damaged"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			_, err := tuned.Add(dir, key, []tuned.Entry{entry(4096, 16), entry(1024, 16)})
			require.NoError(t, err)
			path := tuned.Path(dir, key)
			data, err := os.ReadFile(path)
			require.NoError(t, err)
			require.NoError(t, os.WriteFile(path, c.damage(data), 0o600))
			table, err := tuned.Read(dir, key)
			assert.Empty(t, table.Entries)
			require.ErrorContains(t, err, c.reason)
			assert.ErrorContains(t, err, path)
			files, err := tuned.List(dir)
			require.NoError(t, err)
			require.Len(t, files, 1)
			assert.NotEmpty(t, files[0].Error)
			_, err = tuned.Add(dir, key, []tuned.Entry{entry(2048, 32)})
			require.NoError(t, err)
			table, err = tuned.Read(dir, key)
			require.NoError(t, err)
			assert.Len(t, table.Entries, 1)
		})
	}
}

// resealed changes the table's text and gives it the checksum that fits.
func resealed(t *testing.T, data []byte, from, to string) []byte {
	t.Helper()
	text := string(data)
	at := strings.Index(text, `"table":`) + len(`"table":`)
	table := text[at:strings.LastIndex(text, "}")]
	require.Contains(t, table, from)
	return tuned.Sealed([]byte(strings.Replace(table, from, to, 1)))
}

func TestAddRefuses(t *testing.T) {
	_, err := tuned.Add("", key, nil)
	assert.ErrorContains(t, err, "no cache directory")
	for _, e := range []tuned.Entry{entry(0, 16), entry(64, 17), {Problem: tuned.Problem{M: 1, K: 1, Tokens: 16}}} {
		_, err = tuned.Add(t.TempDir(), key, []tuned.Entry{e})
		assert.Error(t, err)
	}
	_, err = tuned.Add(filepath.Join(t.TempDir(), "missing"), key, []tuned.Entry{entry(64, 16)})
	assert.Error(t, err)
}

func TestManyWritersLoseNothing(t *testing.T) {
	dir := t.TempDir()
	var wg sync.WaitGroup
	for i := range uint64(16) {
		wg.Go(func() {
			_, err := tuned.Add(dir, key, []tuned.Entry{entry(64*(i+1), 16)})
			assert.NoError(t, err)
		})
	}
	wg.Wait()
	table, err := tuned.Read(dir, key)
	require.NoError(t, err)
	assert.Len(t, table.Entries, 16)
}

func TestListAndClear(t *testing.T) {
	dir := t.TempDir()
	other := key
	other.GPU = "Another GPU"
	for _, k := range []tuned.Key{key, other} {
		_, err := tuned.Add(dir, k, []tuned.Entry{entry(64, 16)})
		require.NoError(t, err)
	}
	require.NoError(t, os.WriteFile(filepath.Join(dir, "kept.kernel"), nil, 0o600))
	files, err := tuned.List(dir)
	require.NoError(t, err)
	assert.Len(t, files, 2)
	n, err := tuned.Clear(dir)
	require.NoError(t, err)
	assert.Equal(t, 2, n)
	assert.FileExists(t, filepath.Join(dir, "kept.kernel"))
	n, err = tuned.Clear(filepath.Join(dir, "missing"))
	require.NoError(t, err)
	assert.Zero(t, n)
}
