// SPDX-License-Identifier: Apache-2.0

package main

// #include "zipserv_cuda.h"
import "C"

import (
	"encoding/json"
	"errors"
	"path/filepath"

	"github.com/zipserv/zipserv/core/cuda/driver"
	"github.com/zipserv/zipserv/core/cuda/engine"
	"github.com/zipserv/zipserv/core/format"
)

// onDevice runs fn for a device of the process's engine.
func onDevice(device C.int32_t, fn func(*engine.Device) error) C.int32_t {
	return guard(C.ZS_ERR_CUDA, func() error {
		e, err := engine.Default()
		if err != nil {
			return err
		}
		d, err := e.Device(int(device))
		if err == nil {
			err = fn(d)
		}
		if wrong, ok := errors.AsType[engine.ArgumentError](err); ok {
			return badArgument("%s", string(wrong))
		}
		return err
	})
}

//export zsgo_cuda_set_dirs
func zsgo_cuda_set_dirs(dirs *C.char) C.int32_t {
	return guard(C.ZS_ERR_CUDA, func() error {
		engine.SetCompilerDirs(filepath.SplitList(C.GoString(dirs)))
		return nil
	})
}

//export zsgo_cuda_describe
func zsgo_cuda_describe(text *C.char, capacity C.uint64_t, length *C.uint64_t) C.int32_t {
	return guard(C.ZS_ERR_CUDA, func() error {
		out, err := json.Marshal(engine.Describe())
		if err != nil {
			return err
		}
		copyText(text, capacity, length, out)
		return nil
	})
}

//export zsgo_cuda_clear_cache
func zsgo_cuda_clear_cache() C.int32_t {
	return guard(C.ZS_ERR_CUDA, engine.ClearCache)
}

//export zsgo_cuda_set_batch_invariant
func zsgo_cuda_set_batch_invariant(on C.int32_t) C.int32_t {
	return guard(C.ZS_ERR_CUDA, func() error {
		engine.SetInvariant(on != 0)
		return nil
	})
}

//export zsgo_cuda_linear
func zsgo_cuda_linear(device C.int32_t, job *C.zs_cuda_linear_t, needs *C.uint64_t) C.int32_t {
	*needs = 0
	return onDevice(device, func(d *engine.Device) error {
		p := engine.Matmul{
			Stream: driver.Stream(job.stream), Blob: driver.Pointer(job.blob), M: uint64(job.m), K: uint64(job.k), N: uint64(job.n),
			X: driver.Pointer(job.x), LdX: uint64(job.ldx), Bias: driver.Pointer(job.bias), Y: driver.Pointer(job.y), LdY: uint64(job.ldy),
			Scratch: driver.Pointer(job.scratch), ScratchBytes: uint64(job.scratch_bytes), Row0: uint64(job.row0), Rows: uint64(job.rows), PartRows: uint64(job.part_rows), Gated: job.gated != 0,
		}
		n, err := d.Linear(&p)
		*needs = C.uint64_t(n)
		return err
	})
}

//export zsgo_cuda_changed
func zsgo_cuda_changed(device C.int32_t, blob C.uint64_t) C.int32_t {
	return onDevice(device, func(d *engine.Device) error {
		d.Changed(driver.Pointer(blob))
		return nil
	})
}

//export zsgo_cuda_decompress
func zsgo_cuda_decompress(device C.int32_t, stream, blob, m, k, row0, rows, out, ld C.uint64_t) C.int32_t {
	return onDevice(device, func(d *engine.Device) error {
		return d.Decompress(driver.Stream(stream), driver.Pointer(blob), uint64(m), uint64(k), uint64(row0), uint64(rows), driver.Pointer(out), uint64(ld))
	})
}

//export zsgo_cuda_gather
func zsgo_cuda_gather(device C.int32_t, job *C.zs_cuda_gather_t) C.int32_t {
	return onDevice(device, func(d *engine.Device) error {
		return d.Gather(&engine.Lookup{
			Stream: driver.Stream(job.stream), Blob: driver.Pointer(job.blob), DType: format.DType(job.dtype), M: uint64(job.m), K: uint64(job.k),
			N: uint64(job.n), IDs: driver.Pointer(job.ids), IDBytes: uint64(uint32(job.id_bytes)), Out: driver.Pointer(job.out),
		})
	})
}

//export zsgo_cuda_route
func zsgo_cuda_route(device C.int32_t, job *C.zs_cuda_route_t) C.int32_t {
	return onDevice(device, func(d *engine.Device) error {
		return d.Route(&engine.Routing{
			Stream: driver.Stream(job.stream), IDs: driver.Pointer(job.ids), IDBytes: uint64(uint32(job.id_bytes)), Pairs: uint64(job.pairs), Top: uint64(job.top),
			Experts: uint64(job.experts), Tile: uint64(job.tile), Words: driver.Pointer(job.routing),
		})
	})
}

//export zsgo_cuda_grouped
func zsgo_cuda_grouped(device C.int32_t, job *C.zs_cuda_grouped_t) C.int32_t {
	return onDevice(device, func(d *engine.Device) error {
		return d.Grouped(&engine.Grouped{
			Stream: driver.Stream(job.stream), Blobs: driver.Pointer(job.blobs), Step: uint64(job.step), M: uint64(job.m), K: uint64(job.k), X: driver.Pointer(job.x),
			ByPair: job.by_pair != 0, Gated: job.gated != 0, Y: driver.Pointer(job.y), Words: driver.Pointer(job.routing), Pairs: uint64(job.pairs), Tile: uint64(job.tile),
		})
	})
}

//export zsgo_cuda_combine
func zsgo_cuda_combine(device C.int32_t, job *C.zs_cuda_combine_t) C.int32_t {
	return onDevice(device, func(d *engine.Device) error {
		return d.Combine(&engine.Combination{
			Stream: driver.Stream(job.stream), Y: driver.Pointer(job.y), IDs: driver.Pointer(job.ids), IDBytes: uint64(uint32(job.id_bytes)),
			Weights: driver.Pointer(job.weights), Tokens: uint64(job.tokens), Top: uint64(job.top), Experts: uint64(job.experts), M: uint64(job.m),
			Out: driver.Pointer(job.out),
		})
	})
}

//export zsgo_cuda_warm_grouped
func zsgo_cuda_warm_grouped(device C.int32_t, m, k C.uint64_t, gated C.int32_t) C.int32_t {
	return onDevice(device, func(d *engine.Device) error { return d.WarmGrouped(uint64(m), uint64(k), gated != 0) })
}

//export zsgo_cuda_compress_scratch
func zsgo_cuda_compress_scratch(device C.int32_t, m, k C.uint64_t, bytes *C.uint64_t) C.int32_t {
	return onDevice(device, func(d *engine.Device) error {
		*bytes = C.uint64_t(d.CompressScratch(uint64(m), uint64(k)))
		return nil
	})
}

// compression reads a C job; shape errors are found when it is checked.
func compression(job *C.zs_cuda_compress_t) (engine.Compression, error) {
	if job.ndim < 1 || job.ndim > C.ZS_MAX_DIMS {
		return engine.Compression{}, badArgument("a tensor must have 1 to %d dimensions, got %d", C.ZS_MAX_DIMS, int32(job.ndim))
	}
	h := format.Header{M: uint64(job.m), K: uint64(job.k), Checksum: uint32(job.checksum)}
	for _, n := range job.shape[:job.ndim] {
		h.Shape = append(h.Shape, uint64(n))
	}
	return engine.Compression{
		Stream: driver.Stream(job.stream), Src: driver.Pointer(job.src), Ld: uint64(job.ld), Header: h, Scratch: driver.Pointer(job.scratch),
	}, nil
}

//export zsgo_cuda_compress_plan
func zsgo_cuda_compress_plan(device C.int32_t, job *C.zs_cuda_compress_t) C.int32_t {
	return onDevice(device, func(d *engine.Device) error {
		p, err := compression(job)
		if err != nil {
			return err
		}
		nbytes, err := d.CompressPlan(&p)
		job.nbytes = C.uint64_t(nbytes)
		return err
	})
}

//export zsgo_cuda_compress_write
func zsgo_cuda_compress_write(device C.int32_t, job *C.zs_cuda_compress_t, blob, room C.uint64_t) C.int32_t {
	return onDevice(device, func(d *engine.Device) error {
		p, err := compression(job)
		if err != nil {
			return err
		}
		if err := d.CompressWrite(&p, driver.Pointer(blob), uint64(room)); err != nil {
			return err
		}
		job.mode, job.checksum = C.int32_t(p.Header.Mode), C.uint32_t(p.Header.Checksum)
		job.escape_bytes, job.nbytes = C.uint64_t(p.Header.EscapeBytes), C.uint64_t(p.Header.Sections().Total)
		return nil
	})
}

//export zsgo_cuda_compress_raw
func zsgo_cuda_compress_raw(device C.int32_t, job *C.zs_cuda_compress_t, blob C.uint64_t) C.int32_t {
	return onDevice(device, func(d *engine.Device) error {
		p, err := compression(job)
		if err != nil {
			return err
		}
		return d.CompressRaw(&p, driver.Pointer(blob))
	})
}

//export zsgo_cuda_warm
func zsgo_cuda_warm(device C.int32_t, m, k, tokens C.uint64_t, gated C.int32_t) C.int32_t {
	return onDevice(device, func(d *engine.Device) error { return d.Warm(uint64(m), uint64(k), uint64(tokens), gated != 0) })
}

//export zsgo_cuda_side_stream
func zsgo_cuda_side_stream(device, i C.int32_t, stream *C.uint64_t) C.int32_t {
	return onDevice(device, func(d *engine.Device) error {
		*stream = C.uint64_t(d.SideStream(int(i)))
		return nil
	})
}

//export zsgo_cuda_follow
func zsgo_cuda_follow(device C.int32_t, after, before C.uint64_t) C.int32_t {
	return onDevice(device, func(d *engine.Device) error { return d.Follow(driver.Stream(after), driver.Stream(before)) })
}
