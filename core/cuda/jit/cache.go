// SPDX-License-Identifier: Apache-2.0

package jit

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"time"
)

const (
	// EnvCacheDir names the variable that says where compiled kernels are kept; "0" or "off" means nowhere.
	EnvCacheDir = "ZIPSERV_CACHE_DIR"
	// EnvCacheSize names the variable that limits the cache, in MiB.
	EnvCacheSize = "ZIPSERV_CACHE_SIZE"

	defaultCacheMiB = 256
	suffix          = ".kernel"
	staleAfter      = time.Hour // of a temporary file whose writer must have died
)

// cacheMagic opens every cache file: then come the SHA-256 of the key and of the image, the image's length, and the image.
var cacheMagic = [8]byte{'Z', 'S', 'K', 'E', 'R', 'N', '0', '1'}

const cacheHeader = 8 + 32 + 32 + 8

// Cache keeps compiled kernels in a directory that many processes share. It never fails: what cannot be read or written is compiled again.
type Cache struct {
	dir   string
	limit int64
}

// OpenCache opens the directory that the environment names, by default $XDG_CACHE_HOME/zipserv or ~/.cache/zipserv. Where it cannot be
// made, the cache is off and the reason is returned beside it.
func OpenCache() (*Cache, error) {
	limit := int64(defaultCacheMiB) << 20
	if v := os.Getenv(EnvCacheSize); v != "" {
		if n, err := strconv.ParseInt(v, 10, 32); err == nil && n >= 0 {
			limit = n << 20
		}
	}
	dir := os.Getenv(EnvCacheDir)
	switch strings.ToLower(dir) {
	case "0", "off":
		return &Cache{}, fmt.Errorf("switched off by %s", EnvCacheDir)
	case "":
		base, err := os.UserCacheDir()
		if err != nil {
			return &Cache{}, err
		}
		dir = filepath.Join(base, "zipserv")
	}
	return NewCache(dir, limit)
}

// NewCache opens a cache in dir of at most limit bytes.
func NewCache(dir string, limit int64) (*Cache, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return &Cache{}, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return &Cache{}, err
	}
	return &Cache{dir: dir, limit: limit}, nil
}

// Dir is the directory, or "" when the cache is off.
func (c *Cache) Dir() string { return c.dir }

// Limit is the most bytes that the cache keeps.
func (c *Cache) Limit() int64 { return c.limit }

func (c *Cache) path(name string, key [32]byte) string {
	return filepath.Join(c.dir, fmt.Sprintf("%s-%x%s", name, key[:12], suffix))
}

// Get returns the image stored for key, or nil. A file that is damaged is removed.
func (c *Cache) Get(name string, key [32]byte) []byte {
	if c.dir == "" {
		return nil
	}
	path := c.path(name, key)
	data, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	image, err := open(data, key)
	if err != nil {
		_ = os.Remove(path)
		return nil
	}
	// The age decides what is dropped first; a day's precision is enough and spares most writes.
	if st, err := os.Stat(path); err == nil && time.Since(st.ModTime()) > 24*time.Hour {
		now := time.Now()
		_ = os.Chtimes(path, now, now)
	}
	return image
}

func open(data []byte, key [32]byte) ([]byte, error) {
	if len(data) < cacheHeader || !bytes.Equal(data[:8], cacheMagic[:]) || !bytes.Equal(data[8:40], key[:]) {
		return nil, errors.New("not a kernel of this key")
	}
	image := data[cacheHeader:]
	if binary.LittleEndian.Uint64(data[72:80]) != uint64(len(image)) {
		return nil, errors.New("cut short")
	}
	if sum := sha256.Sum256(image); !bytes.Equal(sum[:], data[40:72]) {
		return nil, errors.New("checksum")
	}
	return image, nil
}

// Put stores an image. Readers see the whole file or none of it.
func (c *Cache) Put(name string, key [32]byte, image []byte) {
	if c.dir == "" || int64(len(image)) > c.limit {
		return
	}
	f, err := os.CreateTemp(c.dir, "tmp-*")
	if err != nil {
		return
	}
	sum := sha256.Sum256(image)
	head := make([]byte, 0, cacheHeader)
	head = append(head, cacheMagic[:]...)
	head = append(head, key[:]...)
	head = append(head, sum[:]...)
	head = binary.LittleEndian.AppendUint64(head, uint64(len(image)))
	_, err = f.Write(append(head, image...))
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(f.Name(), c.path(name, key))
	}
	if err != nil {
		_ = os.Remove(f.Name())
		return
	}
	c.prune()
}

// Size counts the files and bytes in the cache.
func (c *Cache) Size() (files int, bytes int64) {
	for _, e := range c.entries() {
		files++
		bytes += e.size
	}
	return files, bytes
}

// Clear removes every cached kernel.
func (c *Cache) Clear() error {
	var errs []error
	for _, e := range c.entries() {
		if err := os.Remove(e.path); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

type entry struct {
	path string
	size int64
	used time.Time
}

func (c *Cache) entries() []entry {
	if c.dir == "" {
		return nil
	}
	list, err := os.ReadDir(c.dir)
	if err != nil {
		return nil
	}
	var out []entry
	for _, e := range list {
		info, err := e.Info()
		if err != nil || !info.Mode().IsRegular() {
			continue
		}
		switch {
		case strings.HasSuffix(e.Name(), suffix):
			out = append(out, entry{filepath.Join(c.dir, e.Name()), info.Size(), info.ModTime()})
		case strings.HasPrefix(e.Name(), "tmp-") && time.Since(info.ModTime()) > staleAfter:
			_ = os.Remove(filepath.Join(c.dir, e.Name()))
		}
	}
	return out
}

// prune drops the kernels used longest ago until the cache is within its limit. Two processes that prune at once do no harm: a file that
// is gone is compiled again.
func (c *Cache) prune() {
	all := c.entries()
	var total int64
	for _, e := range all {
		total += e.size
	}
	if total <= c.limit {
		return
	}
	sort.Slice(all, func(i, j int) bool { return all[i].used.Before(all[j].used) })
	for _, e := range all {
		if total <= c.limit {
			return
		}
		if os.Remove(e.path) == nil {
			total -= e.size
		}
	}
}
