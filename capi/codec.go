// SPDX-License-Identifier: Apache-2.0

package main

// #include "internal.h"
import "C"

import (
	"context"
	"sync"
	"unsafe"

	"github.com/zipserv/zipserv/core/codec"
	"github.com/zipserv/zipserv/core/format"
)

// plans holds the plans between zs_plan_new and zs_plan_free. C gets numbers, never Go pointers.
var plans = struct {
	sync.Mutex
	last uint64
	live map[uint64]*codec.Plan
}{live: map[uint64]*codec.Plan{}}

func findPlan(handle C.uint64_t) (*codec.Plan, error) {
	plans.Lock()
	defer plans.Unlock()
	p, ok := plans.live[uint64(handle)]
	if !ok {
		return nil, badArgument("plan %d is not known; was it freed already?", uint64(handle))
	}
	return p, nil
}

func dtypeOf(dtype C.int32_t) (format.DType, error) {
	switch dtype {
	case C.ZS_BF16:
		return format.BF16, nil
	case C.ZS_FP16:
		return format.FP16, nil
	}
	return 0, badArgument("dtype %d is not known; %d is BF16, %d is FP16", int32(dtype), C.ZS_BF16, C.ZS_FP16)
}

// matrix views an m x k matrix at p.
func matrix(name string, p unsafe.Pointer, m, k C.uint64_t) ([]byte, error) {
	if m < 1 || k < 1 || m >= 1<<31 || k >= 1<<31 {
		return nil, badArgument("a matrix of %d x %d weights is not possible; rows and columns must be 1 to 2^31-1", uint64(m), uint64(k))
	}
	return memory(name, p, 2*m*k)
}

//export zsgo_plan_new
func zsgo_plan_new(src unsafe.Pointer, dtype C.int32_t, m, k C.uint64_t, shape *C.uint64_t, ndim C.int32_t, size, handle *C.uint64_t) C.int32_t {
	return guardLong(C.ZS_ERR_ARGUMENT, 2*uint64(m)*uint64(k), func(ctx context.Context) error {
		dt, err := dtypeOf(dtype)
		if err != nil {
			return err
		}
		from, err := matrix("src", src, m, k)
		if err != nil {
			return err
		}
		dims := append([]uint64(nil), unsafe.Slice((*uint64)(shape), ndim)...)
		p, err := codec.NewPlan(ctx, from, dt, dims, uint64(m), uint64(k))
		if err != nil {
			return err
		}
		plans.Lock()
		defer plans.Unlock()
		plans.last++
		plans.live[plans.last] = p
		*size, *handle = C.uint64_t(p.Size()), C.uint64_t(plans.last)
		return nil
	})
}

//export zsgo_plan_encode
func zsgo_plan_encode(handle C.uint64_t, dst unsafe.Pointer, n C.uint64_t) C.int32_t {
	return guardLong(C.ZS_ERR_ARGUMENT, uint64(n), func(ctx context.Context) error {
		p, err := findPlan(handle)
		if err != nil {
			return err
		}
		if uint64(n) != p.Size() {
			return badArgument("dst has %d bytes; this plan's blob takes %d", uint64(n), p.Size())
		}
		to, err := memory("dst", dst, n)
		if err != nil {
			return err
		}
		return p.Encode(ctx, to)
	})
}

//export zsgo_plan_free
func zsgo_plan_free(handle C.uint64_t) C.int32_t {
	return guard(C.ZS_ERR_ARGUMENT, func() error {
		if _, err := findPlan(handle); err != nil {
			return err
		}
		plans.Lock()
		defer plans.Unlock()
		delete(plans.live, uint64(handle))
		return nil
	})
}

// fillHeader writes what the header alone tells.
func fillHeader(h format.Header, info *C.zs_info_t) {
	*info = C.zs_info_t{
		m: C.uint64_t(h.M), k: C.uint64_t(h.K), checksum: C.uint32_t(h.Checksum),
		dtype: C.int32_t(h.DType), mode: C.int32_t(h.Mode), ndim: C.int32_t(len(h.Shape)),
		nbytes: C.uint64_t(h.Sections().Total),
	}
	for i, n := range h.Shape {
		info.shape[i] = C.uint64_t(n)
	}
}

//export zsgo_header
func zsgo_header(header unsafe.Pointer, n C.uint64_t, info *C.zs_info_t) C.int32_t {
	return guard(C.ZS_ERR_FORMAT, func() error {
		b, err := memory("header", header, n)
		if err != nil {
			return err
		}
		h, err := format.ParseHeader(b)
		if err != nil {
			return err
		}
		fillHeader(h, info)
		return nil
	})
}

// view parses the caller's blob.
func view(blob unsafe.Pointer, n C.uint64_t) (*codec.View, error) {
	b, err := memory("blob", blob, n)
	if err != nil {
		return nil, err
	}
	return codec.Parse(b)
}

//export zsgo_info
func zsgo_info(blob unsafe.Pointer, n C.uint64_t, info *C.zs_info_t) C.int32_t {
	return guardLong(C.ZS_ERR_FORMAT, uint64(n), func(ctx context.Context) error {
		v, err := view(blob, n)
		if err != nil {
			return err
		}
		fillHeader(v.Header, info)
		s, err := v.Stats(ctx)
		if err != nil {
			return err
		}
		info.tiles, info.dense_tiles = C.uint64_t(s.Tiles), C.uint64_t(s.DenseTiles)
		info.escapes, info.literals = C.uint64_t(s.Escapes), C.uint64_t(s.Literals)
		return nil
	})
}

//export zsgo_check
func zsgo_check(blob unsafe.Pointer, n C.uint64_t, full C.int32_t) C.int32_t {
	return guardLong(C.ZS_ERR_FORMAT, uint64(n), func(ctx context.Context) error {
		b, err := memory("blob", blob, n)
		if err != nil {
			return err
		}
		return codec.Check(ctx, b, full != 0)
	})
}

//export zsgo_decode
func zsgo_decode(blob unsafe.Pointer, n C.uint64_t, dst unsafe.Pointer, dstLen C.uint64_t) C.int32_t {
	return guardLong(C.ZS_ERR_FORMAT, uint64(dstLen), func(ctx context.Context) error {
		v, err := view(blob, n)
		if err != nil {
			return err
		}
		if want := 2 * v.Header.M * v.Header.K; uint64(dstLen) != want {
			return badArgument("dst has %d bytes; the decoded matrix of %d x %d weights takes %d", uint64(dstLen), v.Header.M, v.Header.K, want)
		}
		to, err := memory("dst", dst, dstLen)
		if err != nil {
			return err
		}
		return v.Decode(ctx, to)
	})
}

//export zsgo_decode_rows
func zsgo_decode_rows(blob unsafe.Pointer, n, row0, row1 C.uint64_t, dst unsafe.Pointer, dstLen, stride C.uint64_t) C.int32_t {
	return guardLong(C.ZS_ERR_FORMAT, uint64(dstLen), func(ctx context.Context) error {
		v, err := view(blob, n)
		if err != nil {
			return err
		}
		if row0 > row1 || uint64(row1) > v.Header.M {
			return badArgument("rows %d to %d are not a range of a matrix with %d rows", uint64(row0), uint64(row1), v.Header.M)
		}
		if uint64(stride) < v.Header.K || stride >= 1<<46 {
			return badArgument("a stride of %d weights is not possible for rows of %d", uint64(stride), v.Header.K)
		}
		if row0 == row1 {
			return nil
		}
		gaps, fits := bounded(uint64(stride), uint64(row1-row0-1))
		if want := 2 * (gaps + v.Header.K); !fits || uint64(dstLen) < want {
			return badArgument("dst has %d bytes; %d rows of %d weights with a stride of %d take %d",
				uint64(dstLen), uint64(row1-row0), v.Header.K, uint64(stride), want)
		}
		to, err := memory("dst", dst, dstLen)
		if err != nil {
			return err
		}
		return v.DecodeRows(ctx, uint64(row0), uint64(row1), to, uint64(stride))
	})
}

// linearPoll: so many bytes of products take less time than decoding one.
const linearPoll = 256

//export zsgo_linear
func zsgo_linear(blob unsafe.Pointer, n, m, k, row0, row1 C.uint64_t, x unsafe.Pointer, xStride, rows C.uint64_t, bias, y unsafe.Pointer, yStride C.uint64_t, threads C.int32_t) C.int32_t {
	size := uint64(n) * (uint64(rows)/4 + 1) / linearPoll
	return guardLong(C.ZS_ERR_FORMAT, size, func(ctx context.Context) error {
		v, err := view(blob, n)
		if err != nil {
			return err
		}
		if v.Header.M != uint64(m) || v.Header.K != uint64(k) {
			return badArgument("the blob holds %d x %d weights, not %d x %d", v.Header.M, v.Header.K, uint64(m), uint64(k))
		}
		if row0 > row1 || row1 > m {
			return badArgument("rows %d to %d are not a range of a matrix with %d rows", uint64(row0), uint64(row1), v.Header.M)
		}
		p := codec.Product{
			Row0: uint64(row0), Row1: uint64(row1), Tokens: uint64(rows), XStride: uint64(xStride), YStride: uint64(yStride), Threads: int(threads),
		}
		if size < pollFrom && threads > 1 { // else this is another thread than the caller's
			p.Team = team
		}
		if rows == 0 || row0 == row1 {
			return v.Linear(ctx, p)
		}
		if p.X, err = strided("x", x, rows, xStride, k); err != nil {
			return err
		}
		if p.Y, err = strided("y", y, rows, yStride, row1-row0); err != nil {
			return err
		}
		if bias != nil {
			if p.Bias, err = memory("bias", bias, 2*(row1-row0)); err != nil {
				return err
			}
		}
		return v.Linear(ctx, p)
	})
}

//export zsgo_linear_few
func zsgo_linear_few() C.uint64_t { return C.uint64_t(codec.FewTokens()) }

// strided views rows of 16-bit elements, the last of which may end with its columns.
func strided(name string, p unsafe.Pointer, rows, stride, columns C.uint64_t) ([]byte, error) {
	gaps, fits := bounded(uint64(stride), uint64(rows-1))
	if !fits || rows > 1 && stride < columns {
		return nil, badArgument("%s: %d rows of %d elements with a stride of %d are not possible", name, uint64(rows), uint64(columns), uint64(stride))
	}
	return memory(name, p, C.uint64_t(2*(gaps+uint64(columns))))
}

// bounded multiplies; fits says that twice the product and more is still far from overflow.
func bounded(a, b uint64) (product uint64, fits bool) {
	return a * b, b == 0 || a <= (1<<61)/b
}

//export zsgo_histogram
func zsgo_histogram(src unsafe.Pointer, n C.uint64_t, dtype C.int32_t, counts *C.uint64_t) C.int32_t {
	return guardLong(C.ZS_ERR_ARGUMENT, 2*uint64(n), func(context.Context) error {
		dt, err := dtypeOf(dtype)
		if err != nil {
			return err
		}
		if n >= 1<<46 {
			return badArgument("%d weights are more than can be addressed", uint64(n))
		}
		from, err := memory("src", src, 2*n)
		if err != nil {
			return err
		}
		h := codec.Histogram(from, dt)
		copy(unsafe.Slice((*uint64)(counts), len(h)), h[:])
		return nil
	})
}

//export zsgo_checksum
func zsgo_checksum(src unsafe.Pointer, m, k C.uint64_t, checksum *C.uint32_t) C.int32_t {
	return guardLong(C.ZS_ERR_ARGUMENT, 2*uint64(m)*uint64(k), func(ctx context.Context) error {
		from, err := matrix("src", src, m, k)
		if err != nil {
			return err
		}
		sum, err := codec.Checksum(ctx, from, uint64(m), uint64(k))
		*checksum = C.uint32_t(sum)
		return err
	})
}
