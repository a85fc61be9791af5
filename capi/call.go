// SPDX-License-Identifier: Apache-2.0

package main

// #include "internal.h"
import "C"

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"time"
	"unsafe"

	"github.com/zipserv/zipserv/core/format"
)

const (
	// pollEvery is how long a stop request may wait.
	pollEvery = 20 * time.Millisecond
	// pollFrom is the work, in bytes, below which a call is over before it could be asked to stop.
	pollFrom = 4 << 20
)

// codedError is an error whose code is known; any other gets the code that its call's guard was given.
type codedError struct {
	code C.int32_t
	error
}

func (e codedError) Unwrap() error { return e.error }

// badArgument makes an error of the caller's.
func badArgument(format string, args ...any) error {
	return codedError{C.ZS_ERR_ARGUMENT, fmt.Errorf(format, args...)}
}

// fault makes an error of the library's own out of a recovered panic.
func fault(p any) error {
	if err, ok := p.(interface{ Addr() uintptr }); ok {
		return codedError{C.ZS_ERR_INTERNAL, fmt.Errorf("memory at %#x cannot be read or written; was a mapped file cut short while in use?", err.Addr())}
	}
	return codedError{C.ZS_ERR_INTERNAL, fmt.Errorf("internal error, please report it: %v\n%s", p, debug.Stack())}
}

// guard runs fn, which must be quick, and returns the code for C; code is that of errors which do not have their own.
// No panic passes it.
func guard(code C.int32_t, fn func() error) (result C.int32_t) {
	defer func() {
		if p := recover(); p != nil {
			result = report(fault(p), code)
		}
	}()
	// A fault in memory that the caller handed over becomes a panic here, not the end of the process.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	return report(fn(), code)
}

// guardLong is guard for work over that many bytes: where the thread has a poll function, the work runs beside it and its context is
// cancelled when the poll function says so. The poll function is called on the thread that entered.
func guardLong(code C.int32_t, bytes uint64, fn func(context.Context) error) C.int32_t {
	if bytes < pollFrom || C.zs_has_poll() == 0 {
		return guard(code, func() error { return fn(context.Background()) })
	}
	return guard(code, func() error {
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		done := make(chan error, 1)
		go func() {
			defer func() {
				if p := recover(); p != nil {
					done <- fault(p)
				}
			}()
			debug.SetPanicOnFault(true)
			done <- fn(ctx)
		}()
		tick := time.NewTicker(pollEvery)
		defer tick.Stop()
		for {
			select {
			case err := <-done:
				return err
			case <-tick.C:
				if C.zs_call_poll() != 0 {
					cancel()
					<-done // the work may still write to the caller's memory until it returns
					return codedError{C.ZS_ERR_CANCELLED, context.Canceled}
				}
			}
		}
	})
}

// report stores err's message for the thread and returns its code.
func report(err error, code C.int32_t) C.int32_t {
	if err == nil {
		return C.ZS_OK
	}
	if coded, ok := errors.AsType[codedError](err); ok {
		code = coded.code
	} else if errors.Is(err, context.Canceled) {
		code = C.ZS_ERR_CANCELLED
	} else if errors.Is(err, format.ErrArgument) {
		code = C.ZS_ERR_ARGUMENT
	} else if errors.Is(err, format.ErrInvalid) {
		code = C.ZS_ERR_FORMAT
	}
	text := err.Error()
	C.zs_set_error((*C.char)(unsafe.Pointer(unsafe.StringData(text))), C.uint64_t(len(text)))
	return code
}

// memory views n bytes of the caller's at p.
func memory(name string, p unsafe.Pointer, n C.uint64_t) ([]byte, error) {
	const most = 1<<47 - 1 // user addresses have no more bits
	if uint64(n) > most {
		return nil, badArgument("%s: a length of %d bytes is more than can be addressed", name, uint64(n))
	}
	if n == 0 {
		return nil, nil
	}
	if p == nil {
		return nil, badArgument("%s is NULL", name)
	}
	return unsafe.Slice((*byte)(p), uint64(n)), nil
}
