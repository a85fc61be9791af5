// SPDX-License-Identifier: Apache-2.0

package main

// #include "zipserv_cuda.h"
import "C"

import (
	"errors"
	"unsafe"

	"github.com/zipserv/zipserv/core/cuda/engine"
)

func init() { engine.SetVersion(C.GoString(C.zs_version())) }

//export zsgo_cuda_control
func zsgo_cuda_control(device C.int32_t, request *C.char, text *C.char, capacity C.uint64_t, length *C.uint64_t) C.int32_t {
	return guard(C.ZS_ERR_CUDA, func() error {
		out, err := engine.Control(int(device), []byte(C.GoString(request)))
		if wrong, ok := errors.AsType[engine.ArgumentError](err); ok {
			return badArgument("%s", string(wrong))
		}
		if err != nil {
			return err
		}
		copyText(text, capacity, length, out)
		return nil
	})
}

// copyText hands a text to C with an ending zero, as much of it as has room; *length is what it takes.
func copyText(text *C.char, capacity C.uint64_t, length *C.uint64_t, out []byte) {
	*length = C.uint64_t(len(out) + 1)
	if capacity > 0 {
		dst := unsafe.Slice((*byte)(unsafe.Pointer(text)), uint64(capacity))
		dst[copy(dst[:len(dst)-1], out)] = 0
	}
}
