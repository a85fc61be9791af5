// SPDX-License-Identifier: Apache-2.0

package emu

import (
	"bytes"
	"io/fs"
	"time"
)

// overlay is a file system with the content of one file exchanged.
type overlay struct {
	fs.FS
	name string
	data []byte
}

func (o overlay) Open(name string) (fs.File, error) {
	if name != o.name {
		return o.FS.Open(name)
	}
	return &memFile{bytes.NewReader(o.data), o}, nil
}

type memFile struct {
	*bytes.Reader
	o overlay
}

func (f *memFile) Close() error               { return nil }
func (f *memFile) Stat() (fs.FileInfo, error) { return memInfo{f.o}, nil }

type memInfo struct{ o overlay }

func (i memInfo) Name() string       { return i.o.name }
func (i memInfo) Size() int64        { return int64(len(i.o.data)) }
func (i memInfo) Mode() fs.FileMode  { return 0o444 }
func (i memInfo) ModTime() time.Time { return time.Time{} }
func (i memInfo) IsDir() bool        { return false }
func (i memInfo) Sys() any           { return nil }
