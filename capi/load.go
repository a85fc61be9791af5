// SPDX-License-Identifier: Apache-2.0

package main

// #include "zipserv_cuda.h"
import "C"

import (
	"context"
	"sync"
	"unsafe"

	"github.com/zipserv/zipserv/core/codec"
	"github.com/zipserv/zipserv/core/cuda/driver"
	"github.com/zipserv/zipserv/core/cuda/engine"
)

var loads = struct {
	sync.Mutex
	last uint64
	live map[uint64]*engine.Load
}{live: map[uint64]*engine.Load{}}

func findLoad(handle C.uint64_t) (*engine.Load, error) {
	loads.Lock()
	defer loads.Unlock()
	l, ok := loads.live[uint64(handle)]
	if !ok {
		return nil, badArgument("load %d is not known; was it finished already?", uint64(handle))
	}
	return l, nil
}

//export zsgo_cuda_load_start
func zsgo_cuda_load_start(device C.int32_t, after C.uint64_t, parts *C.zs_cuda_load_part_t, count C.uint64_t, lanes C.int32_t, handle *C.uint64_t) C.int32_t {
	return onDevice(device, func(d *engine.Device) error {
		list := make([]engine.LoadPart, 0, int(count))
		for _, p := range unsafe.Slice(parts, int(count)) {
			list = append(list, engine.LoadPart{File: int(p.file), Offset: uint64(p.offset), Bytes: uint64(p.bytes), To: driver.Pointer(p.to)})
		}
		l, err := d.StartLoad(driver.Stream(after), list, int(lanes))
		if err != nil {
			return err
		}
		loads.Lock()
		defer loads.Unlock()
		loads.last++
		loads.live[loads.last] = l
		*handle = C.uint64_t(loads.last)
		return nil
	})
}

//export zsgo_cuda_load_wait
func zsgo_cuda_load_wait(handle, part, after C.uint64_t, failed *C.int64_t) C.int32_t {
	return guard(C.ZS_ERR_CUDA, func() error {
		l, err := findLoad(handle)
		if err == nil && uint64(part) >= uint64(l.Parts()) {
			err = badArgument("part %d of %d", uint64(part), l.Parts())
		}
		if err != nil {
			return err
		}
		first, err := l.Await(int(part), driver.Stream(after))
		*failed = C.int64_t(first)
		return err
	})
}

//export zsgo_cuda_load_finish
func zsgo_cuda_load_finish(handle C.uint64_t, stop C.int32_t) C.int32_t {
	return guard(C.ZS_ERR_CUDA, func() error {
		l, err := findLoad(handle)
		if err != nil {
			return err
		}
		loads.Lock()
		delete(loads.live, uint64(handle))
		loads.Unlock()
		return l.Finish(stop != 0)
	})
}

//export zsgo_check_lists
func zsgo_check_lists(blob unsafe.Pointer, n C.uint64_t) C.int32_t {
	return guardLong(C.ZS_ERR_FORMAT, uint64(n)/16, func(ctx context.Context) error {
		b, err := memory("blob", blob, n)
		if err != nil {
			return err
		}
		return codec.CheckLists(ctx, b)
	})
}
