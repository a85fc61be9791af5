// SPDX-License-Identifier: Apache-2.0

package jit

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

const (
	lockShards = 16
	lockPoll   = 10 * time.Millisecond
	// lockWait is how long another process may take to compile. After it the kernel is compiled here as well, which is only a waste.
	lockWait = 30 * time.Second
)

// lock keeps other processes from compiling the same kernel meanwhile. Locks are advisory help: where the file system has none, or the
// holder does not get done, the caller goes on without. The files are few and stay.
func (c *Cache) lock(ctx context.Context, key [32]byte) (unlock func()) {
	nothing := func() {}
	if c.dir == "" {
		return nothing
	}
	f, err := os.OpenFile(filepath.Join(c.dir, fmt.Sprintf("lock-%02d", key[31]%lockShards)), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nothing
	}
	deadline := time.Now().Add(lockWait)
	for {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { _ = f.Close() } // closing unlocks
		}
		if (err != unix.EWOULDBLOCK && err != unix.EINTR) || time.Now().After(deadline) {
			break
		}
		select {
		case <-ctx.Done():
			_ = f.Close()
			return nothing
		case <-time.After(lockPoll):
		}
	}
	_ = f.Close()
	return nothing
}
