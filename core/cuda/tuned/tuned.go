// SPDX-License-Identifier: Apache-2.0

// Package tuned keeps what measurements on a GPU have chosen: one file for each kind of GPU and software, in the directory of the kernel cache. A file carries
// a checksum and what it was measured with; one that is damaged, or of something else, is not used.
package tuned

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/zipserv/zipserv/core/cuda/plan"
)

const (
	prefix   = "tuned-"
	suffix   = ".json"
	lockName = "tuned.lock"
	mostFile = 16 << 20 // bytes; a file of some hundred shapes has some ten thousand
)

// Key is what a measurement holds for. Everything that changes the kernels or their speed is in it.
type Key struct {
	GPU     string `json:"gpu"`
	SMs     int    `json:"sms"`
	Driver  string `json:"driver"` // its CUDA version
	NVRTC   string `json:"nvrtc"`
	Kernels string `json:"kernels"` // digest of the sources
	Plan    int    `json:"plan"`    // plan.Version
	ZipServ string `json:"zipserv"` // the package's version
}

func (k Key) name() string {
	text, _ := json.Marshal(k) // plain fields: cannot fail
	sum := sha256.Sum256(text)
	return prefix + hex.EncodeToString(sum[:12]) + suffix
}

// Problem is what a choice is for.
type Problem struct {
	M         uint64 `json:"m"`
	K         uint64 `json:"k"`
	Tokens    uint64 `json:"tokens"` // a bucket of plan.Bucket; 0 in the batch-invariant mode, whose choice serves every number
	Invariant bool   `json:"invariant,omitempty"`
}

// Entry is one measured choice.
type Entry struct {
	Problem
	Choice         plan.Choice `json:"choice"`
	Seconds        float64     `json:"seconds"`
	DefaultSeconds float64     `json:"default_seconds"` // of what is done without the choice
}

func (e Entry) check() error {
	switch {
	case e.M < 1 || e.K < 1:
		return fmt.Errorf("a weight of %d x %d", e.M, e.K)
	case e.Invariant != (e.Tokens == 0):
		return fmt.Errorf("%d tokens, batch-invariant: %v", e.Tokens, e.Invariant)
	case !e.Invariant && e.Tokens != plan.Bucket(e.Tokens):
		return fmt.Errorf("no choice is made for %d tokens", e.Tokens)
	case e.Seconds <= 0 || e.DefaultSeconds <= 0:
		return fmt.Errorf("a time of %g s, %g s before", e.Seconds, e.DefaultSeconds)
	}
	return nil
}

// Table is the content of a file.
type Table struct {
	Key     Key     `json:"key"`
	Entries []Entry `json:"entries"`
}

// document is how a table lies on disk.
type document struct {
	Checksum string          `json:"checksum"` // SHA-256 of the table's text
	Table    json.RawMessage `json:"table"`
}

// Path is where the table of a key lies in a directory.
func Path(dir string, key Key) string { return filepath.Join(dir, key.name()) }

// Read reads the table of a key. Where there is none it returns an empty one; where there is one that cannot be trusted, an empty one and the reason.
func Read(dir string, key Key) (Table, error) {
	empty := Table{Key: key}
	if dir == "" {
		return empty, nil
	}
	path := Path(dir, key)
	t, err := open(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return empty, nil
	case err != nil:
		return empty, fmt.Errorf("%s is not used: %w", path, err)
	case t.Key != key:
		return empty, fmt.Errorf("%s is not used: it is of another GPU or version: %+v", path, t.Key)
	}
	return t, nil
}

func open(path string) (Table, error) {
	info, err := os.Stat(path)
	if err != nil {
		return Table{}, err
	}
	if !info.Mode().IsRegular() || info.Size() > mostFile {
		return Table{}, errors.New("not a file of tuned choices")
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return Table{}, err
	}
	var d document
	if err := json.Unmarshal(data, &d); err != nil {
		return Table{}, fmt.Errorf("damaged: %w", err)
	}
	if d.Checksum != checksum(d.Table) {
		return Table{}, errors.New("damaged: wrong checksum")
	}
	var t Table
	if err := json.Unmarshal(d.Table, &t); err != nil {
		return Table{}, fmt.Errorf("damaged: %w", err)
	}
	seen := map[Problem]bool{}
	for _, e := range t.Entries {
		if err := e.check(); err != nil {
			return Table{}, fmt.Errorf("wrong content: %w", err)
		}
		if seen[e.Problem] {
			return Table{}, fmt.Errorf("wrong content: two choices for %+v", e.Problem)
		}
		seen[e.Problem] = true
	}
	return t, nil
}

func checksum(table []byte) string {
	sum := sha256.Sum256(table)
	return hex.EncodeToString(sum[:])
}

// Add writes entries into the table of a key, over those for the same problems. Readers see the whole file as it was or as it is; another process that
// adds at the same time waits. A file that cannot be trusted is replaced.
func Add(dir string, key Key, entries []Entry) (Table, error) {
	for _, e := range entries {
		if err := e.check(); err != nil {
			return Table{}, err
		}
	}
	if dir == "" {
		return Table{}, errors.New("there is no cache directory to keep choices in")
	}
	unlock, err := lock(dir)
	if err != nil {
		return Table{}, err
	}
	defer unlock()
	table, _ := Read(dir, key)
	at := map[Problem]int{}
	for i, e := range table.Entries {
		at[e.Problem] = i
	}
	for _, e := range entries {
		if i, known := at[e.Problem]; known {
			table.Entries[i] = e
			continue
		}
		at[e.Problem] = len(table.Entries)
		table.Entries = append(table.Entries, e)
	}
	sort.Slice(table.Entries, func(i, j int) bool { return table.Entries[i].before(table.Entries[j].Problem) })
	return table, write(Path(dir, key), table)
}

func (p Problem) before(q Problem) bool {
	for _, pair := range [][2]uint64{{p.M, q.M}, {p.K, q.K}, {p.Tokens, q.Tokens}} {
		if pair[0] != pair[1] {
			return pair[0] < pair[1]
		}
	}
	return false
}

func write(path string, table Table) error {
	text, err := json.Marshal(table)
	if err != nil {
		return err
	}
	data, err := json.Marshal(document{Checksum: checksum(text), Table: text})
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), "tmp-*") // the kernel cache removes what a dead writer left
	if err != nil {
		return err
	}
	_, err = f.Write(append(data, '\n'))
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name())
	}
	return err
}

// lock waits for other writers. Where the file system has no locks it goes on without.
func lock(dir string) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(dir, lockName), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != unix.EINTR {
			return func() { _ = f.Close() }, nil // closing unlocks
		}
	}
}

// File is one file of a directory, for whoever looks at them.
type File struct {
	Path  string `json:"path"`
	Table Table  `json:"table"`
	Error string `json:"error,omitempty"` // why it is not used
}

// List reads all files of a directory, of every GPU and version.
func List(dir string) ([]File, error) {
	if dir == "" {
		return nil, nil
	}
	names, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var out []File
	for _, n := range names {
		if !strings.HasPrefix(n.Name(), prefix) || !strings.HasSuffix(n.Name(), suffix) {
			continue
		}
		file := File{Path: filepath.Join(dir, n.Name())}
		table, err := open(file.Path)
		switch {
		case err != nil:
			file.Error = err.Error()
		case table.Key.name() != n.Name():
			file.Error = "it has the name of another GPU or version"
		default:
			file.Table = table
		}
		out = append(out, file)
	}
	return out, nil
}

// Clear removes all files of a directory and tells how many.
func Clear(dir string) (removed int, err error) {
	files, err := List(dir)
	for _, f := range files {
		if e := os.Remove(f.Path); e == nil {
			removed++
		} else if !errors.Is(e, os.ErrNotExist) {
			err = errors.Join(err, e)
		}
	}
	return removed, err
}
